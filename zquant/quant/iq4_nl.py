"""IQ4_NL: 32 4-bit indices into sixteen values share one float16 scale; 18 bytes.

    byte 0 half d, 2 qs[16]
    w[e] = d * VALUES[q[e]], q[e] = nibble as in Q4_0

The values and the search are in `iq4.py`.

Source: ggml `block_iq4_nl`, `quantize_row_iq4_nl_impl`, `dequantize_row_iq4_nl`.
"""

import numpy as np
import numpy.typing as npt
import torch

from zquant.quant.columns import from_columns
from zquant.quant.iq4 import look_up, nearest, search_values
from zquant.quant.simple import inverse, split_nibbles

__all__ = ["dequantize", "quantize"]


def quantize(
    weights: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.uint8]:
    """Quantize float32 `[N, K]`, contiguous, K a multiple of 32, to uint8 `[N, 18*K/32]`."""
    x, scale = search_values(weights, importance, 32)
    q = nearest(x, inverse(scale))[0]
    d = scale.half().view(-1, 1).view(torch.uint8).t()
    return from_columns([d, q[:16] | (q[16:] << 4)], weights, 32)


def dequantize(qblocks: torch.Tensor, out: torch.Tensor) -> None:
    """Decode uint8 `[n, 18]` into float32 `out [n, 32]`, both contiguous on one device."""
    d = qblocks[:, :2].contiguous().view(torch.float16).float()
    look_up(split_nibbles(qblocks[:, 2:]), out).mul_(d)
