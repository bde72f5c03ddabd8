"""Q4_0: 32 4-bit weights share one float16 scale; 18 bytes.

    byte 0 half d, 2 qs[16]
    w[e] = d * (q[e] - 8), q[e] = low nibble of qs[e] for e < 16, high nibble of qs[e-16] otherwise

Source: ggml `block_q4_0`, `quantize_row_q4_0_ref`, `quantize_row_q4_0_impl`,
`dequantize_row_q4_0`.
"""

import numpy as np
import numpy.typing as npt
import torch

from zquant.quant.simple import join_nibbles, signed_levels, split_nibbles

__all__ = ["dequantize", "quantize"]

HALF = 8  # the level that means 0


def quantize(
    weights: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.uint8]:
    """Quantize float32 `[N, K]`, contiguous, K a multiple of 32, to uint8 `[N, 18*K/32]`."""
    d, q = signed_levels(weights, HALF, importance)
    packed = torch.empty(len(q), 18, dtype=torch.uint8)
    packed.view(torch.float16)[:, :1].copy_(d)
    packed[:, 2:].copy_(join_nibbles(q))
    result: npt.NDArray[np.uint8] = packed.numpy()
    return result.reshape(len(weights), -1)


def dequantize(qblocks: torch.Tensor, out: torch.Tensor) -> None:
    """Decode uint8 `[n, 18]` into float32 `out [n, 32]`, both contiguous on one device."""
    d = qblocks[:, :2].contiguous().view(torch.float16).float()
    levels = split_nibbles(qblocks[:, 2:]).view(torch.int8).sub_(HALF)
    out.copy_(levels).mul_(d)
