"""The gated feed-forward, and the powers of two that keep it and its neighbours inside float16.

    out = down( silu(gate x) * (up x) )

Z-Image drives `silu(gate x) * (up x)` to several 100,000 and float16 ends at 65,504. So with
float16 compute every normalized activation enters its linears times `INPUT_SCALE`, and the product
is scaled by `PRODUCT_SCALE` once more. Both are powers of two, so nothing is rounded differently;
whoever reads the result divides the scale out, or is an RMSNorm, which ignores it. Other dtypes
use 1.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["input_scale", "swiglu"]

INPUT_SCALE = 2.0**-5
PRODUCT_SCALE = 2.0**-4


class _Linear(Protocol):
    def __call__(self, x: Tensor) -> Tensor: ...


def input_scale(dtype: torch.dtype) -> float:
    """The factor on normalized activations before they enter linears computed in `dtype`."""
    return INPUT_SCALE if dtype == torch.float16 else 1.0


def swiglu(x: Tensor, gate: _Linear, up: _Linear, down: _Linear) -> tuple[Tensor, float]:
    """Feed-forward of `x [..., D]`, already times `input_scale(x.dtype)`.

    Returns:
        `(out, scale)`: `out [..., D]` in the dtype of `x` is `scale` times the true result.
    """
    if x.dtype != torch.float16:
        return down(F.silu(gate(x), inplace=True).mul_(up(x))), 1.0
    product = F.silu(gate(x).float().mul_(1 / INPUT_SCALE), inplace=True)
    product.mul_(up(x)).mul_(PRODUCT_SCALE)
    return down(product.to(x.dtype)), INPUT_SCALE * PRODUCT_SCALE
