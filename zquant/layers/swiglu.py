"""The gated feed-forward, and the powers of two that keep it and its neighbours inside float16.

    out = down( silu(gate x) * (up x) )

Z-Image drives `silu(gate x) * (up x)` to several 100,000 and float16 ends at 65,504. So with
float16 compute every normalized activation enters its linears times `INPUT_SCALE`, and the product
is scaled by `PRODUCT_SCALE` once more. Both are powers of two, so nothing is rounded differently;
whoever reads the result divides the scale out, or is an RMSNorm, which ignores it. Other dtypes
use 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from zquant_kernels.fused_swiglu import fused_swiglu

from zquant.layers.compute import Tokens, as_tokens

__all__ = ["input_scale", "swiglu"]

Linear = Callable[..., Tensor]  # a `QuantLinear`: tokens, and `out`
INPUT_SCALE = 2.0**-5
PRODUCT_SCALE = 2.0**-4


def input_scale(dtype: torch.dtype) -> float:
    """The factor on normalized activations before they enter linears computed in `dtype`."""
    return INPUT_SCALE if dtype == torch.float16 else 1.0


def swiglu(
    x: Tokens,
    gate: Linear,
    up: Linear,
    down: Linear,
    group: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Feed-forward of tokens `x`, already times `input_scale(x.dtype)`.

    Args:
        x: `[..., D]`, or quantized tokens `[M, D]`.
        gate: the first linear; `up` and `down` likewise.
        up: see `gate`.
        down: see `gate`.
        group: rotation of the tokens that enter `down` quantized; None leaves them floats.
        out: `[M, D]` for the result; for `x [M, D]`.

    Returns:
        `(out, scale)`: `out [..., D]` in the dtype of `x` is `scale` times the true result.
    """
    half = x.dtype == torch.float16
    g = gate(x)
    shape, g, u = g.shape, g.flatten(0, -2), up(x).flatten(0, -2)
    product, scale = fused_swiglu(
        g,
        u,
        x.dtype if group is None else torch.int8,
        gate_factor=1 / INPUT_SCALE if half else 1.0,
        factor=PRODUCT_SCALE if half else 1.0,
        group=group or 0,
        out=g if group is None and not g.requires_grad else None,
    )
    del g, u  # the largest activations of all
    tokens = as_tokens(product, scale, group or 0, x.dtype)
    out = down(tokens) if out is None else down(tokens, out=out)
    return out.view(*shape[:-1], out.shape[-1]), INPUT_SCALE * PRODUCT_SCALE if half else 1.0
