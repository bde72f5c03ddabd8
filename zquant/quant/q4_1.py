"""Q4_1: 32 4-bit weights share a float16 scale and minimum; 20 bytes.

    byte 0 half d, 2 half m, 4 qs[16]
    w[e] = d * q[e] + m, q[e] = nibble as in Q4_0

Source: ggml `block_q4_1`, `quantize_row_q4_1_ref`, `quantize_row_q4_1_impl`,
`dequantize_row_q4_1`.
"""

import numpy as np
import numpy.typing as npt
import torch

from zquant.quant.simple import join_nibbles, offset_levels, split_nibbles

__all__ = ["dequantize", "quantize"]

TOP = 15  # largest level


def quantize(
    weights: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.uint8]:
    """Quantize float32 `[N, K]`, contiguous, K a multiple of 32, to uint8 `[N, 20*K/32]`."""
    d, m, q = offset_levels(weights, TOP, importance)
    packed = torch.empty(len(q), 20, dtype=torch.uint8)
    packed.view(torch.float16)[:, :1].copy_(d)
    packed.view(torch.float16)[:, 1:2].copy_(m)
    packed[:, 4:].copy_(join_nibbles(q))
    result: npt.NDArray[np.uint8] = packed.numpy()
    return result.reshape(len(weights), -1)


def dequantize(qblocks: torch.Tensor, out: torch.Tensor) -> None:
    """Decode uint8 `[n, 20]` into float32 `out [n, 32]`, both contiguous on one device."""
    d, m = qblocks[:, :4].contiguous().view(torch.float16).float().chunk(2, dim=1)
    out.copy_(split_nibbles(qblocks[:, 4:])).mul_(d).add_(m)
