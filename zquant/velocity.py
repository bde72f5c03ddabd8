"""The velocity of one denoising step: the DiT, guided where guidance is on, and proven finite.

Every block leaves a flag, and all flags are read once per step. Where one says that numbers
overflowed, the step is run again from its start with that block in float32: the blocks before it
give what they gave. The next step begins as if nothing had been, so a step depends on its latents
alone and a picture can be resumed at any. Numbers that are not finite in float32 either are an
error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zquant import sampling
from zquant.errors import ZQuantError
from zquant.models.dit import FLOAT32, DiT, Modulation, Prompt

__all__ = ["Guidance", "Velocity", "check_finite", "not_finite"]


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


HALVES = ("attention", "ffn")


class Velocity:
    """`velocity(latents, step)` of one picture, as the denoising loop calls it.

    `redone` says which blocks were computed again, and in which step.

    Args:
        dit: the network.
        modulations: one per step.
        prompts: of the prompt, and of the negative prompt if guidance is on.
        guidance: used with two prompts.
    """

    def __init__(
        self,
        dit: DiT,
        modulations: Sequence[Modulation],
        prompts: Sequence[Prompt],
        guidance: Guidance,
    ) -> None:
        self.dit, self.modulations, self.prompts = dit, modulations, prompts
        self.guidance = guidance
        self.redone: list[str] = []

    def __call__(self, latents: Tensor, step: int) -> Tensor:
        """float32 velocity of `latents [1, C, H, W]`.

        Raises:
            ZQuantError: it is not finite, in float32 neither.
        """
        guidance = self.guidance
        positive = self._branch(latents, step, self.prompts[0])
        if len(self.prompts) == 1 or guidance.taus[step] > guidance.truncation:
            return positive
        negative = self._branch(latents, step, self.prompts[1])
        return sampling.guide(positive, negative, guidance.scale, guidance.normalization)

    def _branch(self, latents: Tensor, step: int, prompt: Prompt) -> Tensor:
        names = self.dit.step_blocks
        self.dit.in_float32.clear()
        while True:
            sums = latents.new_zeros(len(names), len(HALVES))
            velocity = self.dit.velocity(latents, self.modulations[step], prompt, sums)
            # the one time in a step that the host waits for the device
            finite = torch.isfinite(torch.cat((sums.flatten(), velocity.sum()[None]))).tolist()
            if all(finite):
                return velocity
            self._raise_precision(names, finite.index(False), step)

    def _raise_precision(self, names: Sequence[str], bad: int, step: int) -> None:
        """Compute the block of flag `bad` in float32, or say that this is no remedy."""
        dit = self.dit
        index, half = divmod(bad, len(HALVES))
        where = f"step {step + 1} of {len(self.modulations)}"
        if index == len(names):
            raise ZQuantError(not_finite(f"{where}: the final layer", torch.float32))
        name = names[index]
        if name in dit.in_float32 or dit.compute == FLOAT32:
            raise ZQuantError(not_finite(f"{where}: block {name!r}", torch.float32))
        dit.in_float32.add(name)
        self.redone.append(f"block {name} {HALVES[half]}, step {step + 1}, redone in float32")


def check_finite(values: Tensor, who: str, dtype: torch.dtype) -> None:
    """Raise ZQuantError that names `who` computed in `dtype` unless all values are finite."""
    if not torch.isfinite(values).all():
        raise ZQuantError(not_finite(who, dtype))


def not_finite(who: str, dtype: torch.dtype) -> str:
    """Message: `who`, computed in `dtype`, gave numbers that are not finite."""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float32:
        remedy = "In float32 this means a damaged weight: download or convert the model again."
    else:
        remedy = "Use --compute-dtype float32; if that fails too, a weight is damaged."
    return f"{who} gave values that are not finite (computed in {name}). {remedy}"
