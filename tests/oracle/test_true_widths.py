"""One block of everything at the true widths of Z-Image, BF16 as published, against diffusers.

Widths decide what small models cannot show: heads, axis split, feed-forward, vocabulary, VAE
channels. The checkpoint takes 2.5 GB on disk and each side 5 GB of memory, one after the other.
"""

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import zquant
from tests.oracle.conftest import load_pipeline, paint, paint_ours, relative_l2
from zquant.memory.machine import ram_available

pytestmark = pytest.mark.oracle

# float32 on both sides; longer sums than in the tiny model
SAME = 1e-5
FREE_BYTES = 4e9
FREE_RAM_BYTES = 7e9


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from make_checkpoint import Spec, make_checkpoint

    folder = tmp_path_factory.mktemp("wide")
    if shutil.disk_usage(folder).free < FREE_BYTES:
        pytest.skip("needs 4 GB of free disk for a checkpoint of true widths")
    if ram_available() < FREE_RAM_BYTES:
        pytest.skip("needs 7 GB of free RAM for a checkpoint of true widths")
    yield make_checkpoint(folder, Spec(preset="wide", layers=1))
    shutil.rmtree(folder)


def test_true_widths(wide_folder: Path) -> None:
    prompt, size = "a paper boat on a pond", {"width": 80, "height": 48, "steps": 2}
    pipeline = load_pipeline(wide_folder, torch.float32)
    theirs = paint(pipeline, prompt, max_sequence_length=64, **size)  # pads cost time only
    del pipeline
    gc.collect()
    engine = zquant.Engine.open(wide_folder, device="cpu", compute_dtype="float32")
    ours = paint_ours(engine, prompt, **size)
    engine.close()
    assert relative_l2(ours.prompt_embeds, theirs.prompt_embeds) <= SAME
    assert relative_l2(ours.latents, theirs.latents) <= SAME
    assert np.abs(ours.images.astype(int) - theirs.images.astype(int)).max() <= 1
