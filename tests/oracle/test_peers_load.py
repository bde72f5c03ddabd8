"""diffusers opens a DiT that zquant wrote, of many types in one file, and paints what zquant does.

`test_converted.py` compares each side with the weights that gguf-py decodes, and transformers with
our text encoder.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zquant
from tests.oracle.conftest import paint, paint_ours, relative_l2
from zquant.cli.main import main

pytestmark = pytest.mark.oracle

PROMPT = "a lighthouse at night"
SIZE = {"width": 64, "height": 48}
OPTIONS = {
    "mixed": (
        *("--qtype", "Q4_0", "--tensor-type", r"layers\.0\.attention=Q6_K"),
        *("--tensor-type", r"layers\.0\.feed_forward\.w1=Q2_K"),
        *("--tensor-type", r"layers\.1\.feed_forward\.w1=IQ4_XS"),
        *("--tensor-type", r"layers\.1\.feed_forward\.w2=F16"),
        *("--tensor-type", r"noise_refiner.*w1=BF16", "--tensor-type", r"noise_refiner.*w3=Q4_1"),
        *("--tensor-type", r"context_refiner.*w1=Q3_K", "--tensor-type", r"context.*w2=IQ4_NL"),
    ),
}


@pytest.fixture(scope="module")
def made(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`made(name)`: the DiT by `OPTIONS`, the text encoder exact."""

    @functools.cache
    def make(name: str) -> Path:
        out = tmp_path_factory.mktemp("peers") / name
        command = ["convert", str(tiny_folder), str(out), "--text-encoder-qtype", "F32"]
        assert main([*command, *OPTIONS[name]]) == 0
        return out

    return make


@pytest.mark.parametrize("name", OPTIONS)
def test_diffusers_paints_with_our_dit_what_zquant_does(
    name: str, oracle: Any, made: Callable[[str], Path], tiny_folder: Path
) -> None:
    from diffusers import GGUFQuantizationConfig, ZImagePipeline, ZImageTransformer2DModel

    (file,) = made(name).glob("dit-*.gguf")
    transformer = ZImageTransformer2DModel.from_single_file(
        str(file),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        config=str(tiny_folder / "transformer"),
        torch_dtype=torch.float32,
    )
    pipeline = ZImagePipeline(**{**oracle.components, "transformer": transformer})
    pipeline.set_progress_bar_config(disable=True)
    theirs = paint(pipeline, PROMPT, **SIZE)
    engine = zquant.Engine.open(made(name), device="cpu", compute_dtype="float32")
    ours = paint_ours(engine, PROMPT, **SIZE)
    engine.close()
    assert relative_l2(ours.prompt_embeds, theirs.prompt_embeds) <= 1e-5
    # diffusers multiplies scales and levels in float16, which moves every weight by up to 5e-4
    assert relative_l2(ours.latents, theirs.latents) <= 5e-3
