"""Q5_1: 32 5-bit weights share a float16 scale and minimum; 24 bytes.

    byte 0 half d, 2 half m, 4 u32 qh, 8 qs[16]
    w[e] = d * q[e] + m, q[e] = nibble as in Q4_0, plus 16 if bit e of qh is set

Source: ggml `block_q5_1`, `quantize_row_q5_1_ref`, `quantize_row_q5_1_impl`,
`dequantize_row_q5_1`.
"""

import numpy as np
import numpy.typing as npt
import torch

from zquant.quant.simple import (
    add_fifth_bits,
    fifth_bits,
    join_nibbles,
    offset_levels,
    split_nibbles,
)

__all__ = ["dequantize", "quantize"]

TOP = 31  # largest level


def quantize(
    weights: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.uint8]:
    """Quantize float32 `[N, K]`, contiguous, K a multiple of 32, to uint8 `[N, 24*K/32]`."""
    d, m, q = offset_levels(weights, TOP, importance)
    packed = torch.empty(len(q), 24, dtype=torch.uint8)
    packed.view(torch.float16)[:, :1].copy_(d)
    packed.view(torch.float16)[:, 1:2].copy_(m)
    packed[:, 4:8].copy_(fifth_bits(q))
    packed[:, 8:].copy_(join_nibbles(q))
    result: npt.NDArray[np.uint8] = packed.numpy()
    return result.reshape(len(weights), -1)


def dequantize(qblocks: torch.Tensor, out: torch.Tensor) -> None:
    """Decode uint8 `[n, 24]` into float32 `out [n, 32]`, both contiguous on one device."""
    d, m = qblocks[:, :4].contiguous().view(torch.float16).float().chunk(2, dim=1)
    q = add_fifth_bits(split_nibbles(qblocks[:, 8:]), qblocks[:, 4:8])
    out.copy_(q).mul_(d).add_(m)
