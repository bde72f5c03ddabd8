"""The sigma schedule and the denoising loop: pure functions over float32 latents.

    u_i = 1 - i / steps,  sigma_i = shift u_i / (1 + (shift - 1) u_i),  sigma_steps = 0
    latents <- latents + (sigma_{i+1} - sigma_i) * velocity(latents, i)

Guidance follows diffusers: `velocity = pos + guidance_scale * (pos - neg)`, so its scale is one
less than in A1111 and ComfyUI, and 0 means that the negative prompt is not even looked at.

Source: diffusers `FlowMatchEulerDiscreteScheduler` and `ZImagePipeline` (>= 0.39), as facts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["denoise", "guide", "initial_noise", "sigmas", "taus"]


def sigmas(steps: int, shift: float) -> Tensor:
    """float32 `[steps + 1]` noise levels from 1 to 0.

    Raises:
        ValueError: `steps` < 1 or `shift` <= 0.
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"steps must be at least 1 and shift positive; got {steps} and {shift}")
    # rounded as the reference does: the time embedding sees the last bit
    u = torch.linspace(1.0, 1 / steps, steps)
    return torch.cat((shift * u / (1 + (shift - 1) * u), torch.zeros(1)))


def taus(schedule: Tensor) -> Tensor:
    """float32 `[steps]` times that the DiT is told, 1 - sigma, rounded as the reference does."""
    return (1000 - schedule[:-1] * 1000) / 1000


def initial_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """float32 noise from a CPU generator: the same on every device, and diffusers' own."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


def guide(
    positive: Tensor, negative: Tensor, guidance_scale: float, normalization: float
) -> Tensor:
    """Combine the two branches of classifier-free guidance.

    Args:
        positive: float32 `[B, C, H, W]` velocity with the prompt.
        negative: the same with the negative prompt.
        guidance_scale: diffusers' scale, > 0.
        normalization: 0 for off; k limits each sample's norm to k times that of `positive`.
    """
    guided = positive + guidance_scale * (positive - negative)
    if normalization > 0:
        dims = tuple(range(1, positive.ndim))
        limit = normalization * torch.linalg.vector_norm(positive, dim=dims, keepdim=True)
        norm = torch.linalg.vector_norm(guided, dim=dims, keepdim=True)
        guided = torch.where(norm > limit, guided * (limit / norm), guided)
    return guided


def denoise(
    velocity: Callable[[Tensor, int], Tensor],
    latents: Tensor,
    schedule: Tensor,
    after_step: Callable[[int, Tensor], None] = lambda *_: None,
    *,
    first: int = 0,
) -> Tensor:
    """Euler steps along `schedule`.

    Args:
        velocity: `(latents, step) -> d latents / d sigma`, float32.
        latents: float32 `[B, C, H, W]` noise; not modified.
        schedule: float32 `[steps + 1]`.
        after_step: called with the step's index and its result.
        first: step to begin with; `latents` are the result of the one before.

    Returns:
        float32 `[B, C, H, W]`.
    """
    for step in range(first, len(schedule) - 1):
        delta = (schedule[step + 1] - schedule[step]).item()
        latents = latents + delta * velocity(latents, step)
        after_step(step, latents)
    return latents
