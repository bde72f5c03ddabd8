"""The demo checkpoint is a Z-Image like any other: diffusers paints the same with its weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.oracle.conftest import load_pipeline, paint, paint_ours, relative_l2
from zquant import Engine

pytestmark = pytest.mark.oracle

CHECKPOINT = Path(__file__).parents[1] / "demo" / "z-image-demo"


@pytest.mark.parametrize("prompt", ["a red circle left of a blue square", "绿色圆环，灰色背景"])
def test_diffusers_paints_the_demo_as_zquant_does(prompt: str) -> None:
    size = {"width": 128, "height": 128}
    theirs = paint(load_pipeline(CHECKPOINT, torch.float32), prompt, steps=8, **size)
    engine = Engine.open(CHECKPOINT, device="cpu", compute_dtype="float32")
    ours = paint_ours(engine, prompt, steps=8, **size)
    engine.close()
    assert relative_l2(ours.prompt_embeds, theirs.prompt_embeds) <= 1e-5
    assert relative_l2(ours.latents[-1], theirs.latents[-1]) <= 1e-4
    assert np.abs(ours.images.astype(int) - theirs.images.astype(int)).max() <= 1
