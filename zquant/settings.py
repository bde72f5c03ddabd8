"""A request with every default of the model filled in, and what follows from it."""

import secrets
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import zquant
from zquant import sampling
from zquant.memory.activations import Picture
from zquant.memory.device import Device
from zquant.models.checkpoint import Checkpoint
from zquant.request import RunRequest
from zquant.velocity import Guidance

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`request` without open questions; the fields are its own.

    `prompts` are the prompt, and the negative prompt where guidance uses it; `schedule` is float32
    `[steps + 1]`.
    """

    request: RunRequest
    width: int
    height: int
    steps: int
    seed: int
    guidance_scale: float
    shift: float
    prompts: tuple[str, ...]
    schedule: Tensor

    @classmethod
    def of(cls, request: RunRequest, checkpoint: Checkpoint) -> "Settings":
        """The request as this model fills it in; a seed that is not given is drawn."""
        variant = checkpoint.files.variant
        guidance = request.guidance_scale
        guidance = variant.guidance_scale if guidance is None else guidance
        steps = variant.steps if request.steps is None else request.steps
        shift = variant.shift if request.shift is None else request.shift
        width, height = checkpoint.files.size
        negative = (request.negative_prompt,) if guidance > 0 else ()
        return cls(
            request=request,
            width=width if request.width is None else request.width,
            height=height if request.height is None else request.height,
            steps=steps,
            seed=secrets.randbelow(2**32) if request.seed is None else request.seed,
            guidance_scale=guidance,
            shift=shift,
            prompts=(request.prompt, *negative),
            schedule=sampling.sigmas(steps, shift),
        )

    @property
    def guidance(self) -> Guidance:
        """What the sampler needs to know of it."""
        return Guidance(
            scale=self.guidance_scale,
            normalization=float(self.request.cfg_normalization),
            truncation=self.request.cfg_truncation,
            taus=sampling.taus(self.schedule).tolist(),
        )

    def picture(self, n_prompt: int) -> Picture:
        """What decides its memory, with a longest prompt of so many tokens."""
        return Picture(
            width=self.width,
            height=self.height,
            n_prompt=n_prompt,
            n_prompts=len(self.prompts),
            steps=self.steps,
        )

    def noise(self, checkpoint: Checkpoint) -> Tensor:
        """float32 `[count, C, H, W]` on the CPU.

        Raises:
            ValueError: `initial_latents` are not that.
        """
        config, request = checkpoint.vae_config, self.request
        size = (self.height // config.scale, self.width // config.scale)
        shape = (checkpoint.dit_config.in_channels, *size)
        given = request.initial_latents
        if given is None:
            seeds = range(self.seed, self.seed + request.count)
            return torch.cat([sampling.initial_noise((1, *shape), seed) for seed in seeds])
        if given.shape != (request.count, *shape) or not given.is_floating_point():
            raise ValueError(
                f"initial_latents are {given.dtype} {list(given.shape)}; expected floats "
                f"{[request.count, *shape]} for {request.count} of {self.width}x{self.height}"
            )
        noise = given.float().cpu()
        if not torch.isfinite(noise).all():
            n_bad = int((~torch.isfinite(noise)).sum())
            raise ValueError(f"initial_latents hold {n_bad} values that are not finite")
        return noise

    def recipe(self, index: int, checkpoint: Checkpoint, device: Device) -> dict[str, Any]:
        """Everything that is needed to paint picture `index` again."""
        files, request = checkpoint.files, self.request
        return {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "width": self.width,
            "height": self.height,
            "steps": self.steps,
            "seed": self.seed + index,
            "guidance_scale": self.guidance_scale,
            "cfg_normalization": request.cfg_normalization,
            "cfg_truncation": request.cfg_truncation,
            "shift": self.shift,
            "initial_latents": request.initial_latents is not None,
            "compute_dtype": str(device.compute_dtype).removeprefix("torch."),
            "compute": device.compute.mode,
            "attention": "int8" if device.compute.int8_attention else "sdpa",
            "device": device.name,
            "variant": files.variant.name,
            "model": {name: path.name for name, path in checkpoint.paths.items()},
            "sha256": checkpoint.sha256,
            "zquant": zquant.__version__,
            "torch": torch.__version__,
        }
