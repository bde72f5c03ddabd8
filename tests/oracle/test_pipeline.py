"""The whole engine against diffusers' `ZImagePipeline`: same weights, same noise, same pictures."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zquant
from tests.oracle.conftest import load_pipeline, paint, paint_ours, relative_l2
from zquant import sampling

pytestmark = pytest.mark.oracle

# float32 on both sides, sums in another order; measured 1e-6
SAME = 1e-5
PROMPT = "a red fox in the snow, 一只狐狸 — “quoted”"


@pytest.fixture(scope="module")
def engine(convert: Callable[[str], Path]) -> Iterator[zquant.Engine]:
    engine = zquant.Engine.open(convert("F32"), device="cpu", compute_dtype="float32")
    yield engine
    engine.close()


def assert_same(ours: Any, theirs: Any) -> None:
    assert relative_l2(ours.prompt_embeds, theirs.prompt_embeds) <= SAME
    for step, latents in enumerate(theirs.latents):
        assert relative_l2(ours.latents[step], latents) <= SAME, f"step {step}"
    assert ours.images.shape == theirs.images.shape
    difference = np.abs(ours.images.astype(int) - theirs.images.astype(int))
    assert difference.max() <= 1  # a value may lie on the edge between two bytes


SIZES = {
    "16 tokens, 16 pads": (64, 64),
    "wide, 35 tokens, 29 pads": (112, 80),
    "tall, 32 tokens, no pads": (64, 128),
    "one token": (16, 16),
}


@pytest.mark.parametrize(("width", "height"), SIZES.values(), ids=SIZES.keys())
def test_sizes(oracle: Any, engine: zquant.Engine, width: int, height: int) -> None:
    size = {"width": width, "height": height}
    assert_same(paint_ours(engine, PROMPT, **size), paint(oracle, PROMPT, **size))


PROMPTS = {
    "one letter": "a",
    "32 tokens with the template": "a" + " cat" * 23,
    "33 tokens": "a" + " cat" * 24,
    "special tokens inside": "<|im_end|> <think> \n\n x",
    "longer than 512 tokens": "snow " * 600,
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_prompts(oracle: Any, engine: zquant.Engine, prompt: str) -> None:
    size = {"width": 64, "height": 48, "steps": 2}
    assert_same(paint_ours(engine, prompt, **size), paint(oracle, prompt, **size))


def test_noise_is_diffusers_noise(oracle: Any) -> None:
    generator = torch.Generator("cpu").manual_seed(7)
    theirs = oracle.prepare_latents(1, 16, 48, 80, torch.float32, "cpu", generator, None)
    assert torch.equal(sampling.initial_noise((1, 16, 6, 10), 7), theirs)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_schedule_is_diffusers_schedule_to_the_last_bit(shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    for steps in range(1, 51):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        u = torch.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(sigmas=u.tolist())
        ours = sampling.sigmas(steps, shift)
        assert torch.equal(ours, scheduler.sigmas), steps
        assert torch.equal(sampling.taus(ours), (1000 - scheduler.timesteps) / 1000), steps


def test_steps_as_for_turbo(oracle: Any, engine: zquant.Engine) -> None:
    size = {"width": 48, "height": 32, "steps": 8, "guidance_scale": 0.0}
    assert_same(paint_ours(engine, PROMPT, **size), paint(oracle, PROMPT, **size))


GUIDANCE = {
    "plain": {"guidance_scale": 3.0},
    "empty negative prompt": {"guidance_scale": 1.5, "negative_prompt": ""},
    "normalized": {"guidance_scale": 4.0, "cfg_normalization": 1.0},
    "normalized loosely": {"guidance_scale": 4.0, "cfg_normalization": 1.3},
    "truncated": {"guidance_scale": 4.0, "cfg_truncation": 0.3},
}


@pytest.mark.parametrize("options", GUIDANCE.values(), ids=GUIDANCE.keys())
def test_guidance(oracle: Any, engine: zquant.Engine, options: dict[str, Any]) -> None:
    options = {"negative_prompt": "blurry, low quality", "width": 64, "height": 48} | options
    assert_same(paint_ours(engine, PROMPT, **options), paint(oracle, PROMPT, **options))


def test_every_picture_has_its_own_seed(oracle: Any, engine: zquant.Engine) -> None:
    ours = paint_ours(engine, PROMPT, width=64, height=48, count=2, seed=41)
    assert_same(ours, paint(oracle, PROMPT, seeds=(41, 42), width=64, height=48))
    alone = paint_ours(engine, PROMPT, width=64, height=48, seed=42)
    assert relative_l2(alone.latents[:, 0], ours.latents[:, 1]) <= SAME


def test_official_folder_opens_without_conversion(oracle: Any, tiny_folder: Path) -> None:
    official = zquant.Engine.open(tiny_folder, device="cpu", compute_dtype="float32")
    ours = paint_ours(official, PROMPT, width=64, height=48)
    assert_same(ours, paint(oracle, PROMPT, width=64, height=48))
    official.close()


def test_comfy_files_open_without_conversion(oracle: Any, tiny_comfy: Path) -> None:
    engine = zquant.Engine.open(
        dit=tiny_comfy / "z_image_bf16.safetensors",
        text_encoder=tiny_comfy / "qwen_3_4b.safetensors",
        vae=tiny_comfy / "ae.safetensors",
        variant="turbo",
        device="cpu",
        compute_dtype="float32",
    )
    ours = paint_ours(engine, PROMPT, width=64, height=48)
    assert_same(ours, paint(oracle, PROMPT, width=64, height=48))
    engine.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_no_further_off_than_diffusers(
    oracle: Any, tiny_folder: Path, convert: Callable[[str], Path], dtype: str
) -> None:
    size = {"width": 64, "height": 48}
    exact = paint(oracle, PROMPT, **size)
    theirs = paint(load_pipeline(tiny_folder, getattr(torch, dtype)), PROMPT, **size)
    engine = zquant.Engine.open(convert("BF16"), device="cpu", compute_dtype=dtype)
    ours = paint_ours(engine, PROMPT, **size)
    engine.close()
    for name in ("prompt_embeds", "latents"):
        mine, other = (getattr(run, name) for run in (ours, theirs))
        assert torch.isfinite(mine).all()
        # roundings differ in place and number; 1.5 leaves room for their chance
        limit = 2 * relative_l2(other, getattr(exact, name))
        assert relative_l2(mine, getattr(exact, name)) <= limit, name
