"""Rotary position embeddings: the angles of both networks, and Qwen3's half-split rotation.

    angle[l, p] = position[l] * theta^(-2 p / d),  (a, b) -> (a cos - b sin, a sin + b cos)

Angles are computed in float64 and rounded once to float32; the rotation is float32. The DiT rotates
neighbours, in `zquant_kernels.fused_qk`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["angles", "axis_angles", "rotate_half"]


def angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    """float32 `[L, dim / 2]` angles of integer `positions [L]`."""
    powers = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    return torch.outer(positions.double().cpu(), theta**-powers).float()


def axis_angles(positions: Tensor, axes_dims: Sequence[int], theta: float) -> Tensor:
    """float32 `[L, sum(axes_dims) / 2]` angles of integer `positions [L, axes]`, axes joined."""
    return torch.cat(
        [angles(positions[:, a], dim, theta) for a, dim in enumerate(axes_dims)], dim=-1
    )


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `(p, p + d / 2)` of `x [B, L, heads, d]` by `cos, sin [L, d / 2]`; float32."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
