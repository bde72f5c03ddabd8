"""The velocity of one denoising step: the DiT, guided where guidance is on, and proven finite.

Where numbers stop being finite the step is run once more with every block watched, so that the
message names the first that failed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from zquant import sampling
from zquant.errors import ZQuantError
from zquant.models.dit import DiT, Modulation, Prompt

__all__ = ["Guidance", "Velocity", "check_finite"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """How the second, negative prompt is used, where there is one.

    Attributes:
        scale: diffusers' scale.
        normalization: limit of the guided norm in units of the unguided; 0 is off.
        truncation: no guidance in steps whose tau exceeds it.
        taus: 1 - sigma of every step.
    """

    scale: float
    normalization: float
    truncation: float
    taus: list[float]


class Velocity:
    """`velocity(latents, step)`, as the denoising loop calls it.

    Args:
        dit: the network.
        modulations: one per step.
        prompts: of the prompt, and of the negative prompt if guidance is on.
        guidance: used with two prompts.
    """

    def __init__(
        self, dit: DiT, modulations: list[Modulation], prompts: list[Prompt], guidance: Guidance
    ) -> None:
        self.dit, self.modulations, self.prompts = dit, modulations, prompts
        self.guidance = guidance

    def __call__(self, latents: Tensor, step: int) -> Tensor:
        """float32 velocity of `latents [1, C, H, W]`.

        Raises:
            ZQuantError: it is not finite.
        """
        guidance = self.guidance
        positive = self._branch(latents, step, self.prompts[0])
        if len(self.prompts) == 1 or guidance.taus[step] > guidance.truncation:
            return positive
        negative = self._branch(latents, step, self.prompts[1])
        return sampling.guide(positive, negative, guidance.scale, guidance.normalization)

    def _branch(self, latents: Tensor, step: int, prompt: Prompt) -> Tensor:
        velocity = self.dit.velocity(latents, self.modulations[step], prompt)
        if torch.isfinite(velocity).all():
            return velocity
        who = self._first_bad(latents, step, prompt)
        where = f"step {step + 1} of {len(self.modulations)}: {who}"
        raise ZQuantError(_not_finite(where, self.dit.compute.dtype))

    def _first_bad(self, latents: Tensor, step: int, prompt: Prompt) -> str:
        """Run the step again and watch every block."""
        bad: list[str] = []

        def observe(name: str, x: Tensor) -> None:
            if not bad and not torch.isfinite(x).all():
                bad.append(f"block {name!r}")

        if not torch.isfinite(prompt.tokens).all():
            return "the context refiner"
        self.dit.velocity(latents, self.modulations[step], prompt, observe)
        return bad[0] if bad else "the final layer"


def check_finite(values: Tensor, who: str, dtype: torch.dtype) -> None:
    """Raise ZQuantError that names `who` computed in `dtype` unless all values are finite."""
    if not torch.isfinite(values).all():
        raise ZQuantError(_not_finite(who, dtype))


def _not_finite(who: str, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float32:
        remedy = "In float32 this means a damaged weight: download or convert the model again."
    else:
        remedy = "Use --compute-dtype float32; if that fails too, a weight is damaged."
    return f"{who} gave values that are not finite (computed in {name}). {remedy}"
