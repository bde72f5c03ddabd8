"""diffusers' own pipeline as the oracle, and what zquant converts from the same weights."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Painted:
    """One run of either pipeline."""

    prompt_embeds: Tensor  # [T, width]
    latents: Tensor  # [steps, B, C, H, W]
    images: np.ndarray  # uint8 [B, H, W, 3]


def relative_l2(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, in float64."""
    assert ours.shape == theirs.shape
    difference = ours.double() - theirs.double()
    return (difference.norm() / theirs.double().norm()).item()


def load_pipeline(folder: Path, dtype: torch.dtype) -> Any:
    """diffusers' ZImagePipeline of an official folder, on the CPU."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the two libraries
        pipeline = diffusers.ZImagePipeline.from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(pipeline: Any, prompt: str, *, seeds: Sequence[int] = (0,), **options: Any) -> Painted:
    """Run diffusers; every picture has a CPU generator of its own."""
    steps, embeds = [], []

    def keep(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        steps.append(values["latents"].clone())
        embeds.append(values["prompt_embeds"][0].float())
        return values

    options = {"guidance_scale": 0.0, "num_inference_steps": options.pop("steps", 3)} | options
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        images = pipeline(
            prompt,
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="np",
            callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
            **options,
        ).images
    pictures = (images * 255).round().astype(np.uint8)
    return Painted(prompt_embeds=embeds[0], latents=torch.stack(steps), images=pictures)


def paint_ours(engine: Any, prompt: str, **options: Any) -> Painted:
    """Run zquant."""
    import zquant

    options = {"guidance_scale": 0.0, "steps": 3, "seed": 0} | options
    result = engine.generate(zquant.RunRequest(prompt=prompt, keep_latents=True, **options))
    pictures = np.stack([np.asarray(image) for image in result.images])
    embeds = result.prompt_embeds[0].float()
    return Painted(prompt_embeds=embeds, latents=result.latents, images=pictures)


@pytest.fixture(scope="session")
def oracle(tiny_folder: Path) -> Any:
    """diffusers on the tiny checkpoint, float32."""
    return load_pipeline(tiny_folder, torch.float32)


@pytest.fixture(scope="session")
def convert(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`convert(policy)`: the tiny checkpoint converted by the command line, once per policy."""
    from zquant.cli.main import main

    done: dict[str, Path] = {}

    def once(policy: str) -> Path:
        if policy not in done:
            out = tmp_path_factory.mktemp("converted") / policy
            assert main(["convert", str(tiny_folder), str(out), "--qtype", policy]) == 0
            done[policy] = out
        return done[policy]

    return once
