"""Q5_0: 32 5-bit weights share one float16 scale; 22 bytes.

    byte 0 half d, 2 u32 qh, 6 qs[16]
    w[e] = d * (q[e] - 16), q[e] = nibble as in Q4_0, plus 16 if bit e of qh is set

Source: ggml `block_q5_0`, `quantize_row_q5_0_ref`, `quantize_row_q5_0_impl`,
`dequantize_row_q5_0`.
"""

import numpy as np
import numpy.typing as npt
import torch

from zquant.quant.simple import (
    add_fifth_bits,
    fifth_bits,
    join_nibbles,
    signed_levels,
    split_nibbles,
)

__all__ = ["dequantize", "quantize"]

HALF = 16  # the level that means 0


def quantize(
    weights: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.uint8]:
    """Quantize float32 `[N, K]`, contiguous, K a multiple of 32, to uint8 `[N, 22*K/32]`."""
    d, q = signed_levels(weights, HALF, importance)
    packed = torch.empty(len(q), 22, dtype=torch.uint8)
    packed.view(torch.float16)[:, :1].copy_(d)
    packed[:, 2:6].copy_(fifth_bits(q))
    packed[:, 6:].copy_(join_nibbles(q))
    result: npt.NDArray[np.uint8] = packed.numpy()
    return result.reshape(len(weights), -1)


def dequantize(qblocks: torch.Tensor, out: torch.Tensor) -> None:
    """Decode uint8 `[n, 22]` into float32 `out [n, 32]`, both contiguous on one device."""
    d = qblocks[:, :2].contiguous().view(torch.float16).float()
    q = add_fifth_bits(split_nibbles(qblocks[:, 6:]), qblocks[:, 2:6])
    out.copy_(q.view(torch.int8).sub_(HALF)).mul_(d)
