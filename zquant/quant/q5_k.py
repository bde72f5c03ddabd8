"""Q5_K: 256 weights in 176 bytes; 5-bit levels, eight 6-bit scales and minimums.

    byte 0 half d, 2 half dmin, 4 scales[12], 16 qh[32], 48 qs[128]
    q[e] = nibble as in Q4_K, plus 16 if bit e//32 of qh[e%32] is set

Scales and their formula are in `kscales.py`.

Source: ggml `block_q5_K`, `quantize_row_q5_K_ref`, `quantize_row_q5_K_impl`,
`dequantize_row_q5_K`.
"""

import numpy as np
import numpy.typing as npt
import torch

from zquant.quant.columns import from_columns
from zquant.quant.kscales import header, k_form, read_scales
from zquant.quant.offset_fit import fit_offset_qblocks
from zquant.quant.search import OffsetGrid

__all__ = ["dequantize", "quantize"]

FORM = k_form(OffsetGrid(top=31, first=-0.5, step=0.1, last_k=15))


def quantize(
    weights: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.uint8]:
    """Quantize float32 `[N, K]`, contiguous, K a multiple of 256, to uint8 `[N, 176*K/256]`."""
    fields = fit_offset_qblocks(weights, FORM, importance)
    nibbles = (fields.q[1::2] << 4).bitwise_or_(fields.q[0::2] & 15)  # [4, 32, n]
    fifth = fields.q >> 4  # [8, 32, n]
    high = fifth[0].clone()
    for s in range(1, 8):
        high |= fifth[s] << s
    return from_columns([header(fields), high, nibbles], weights)


def dequantize(qblocks: torch.Tensor, out: torch.Tensor) -> None:
    """Decode uint8 `[n, 176]` into float32 `out [n, 256]`, both contiguous on one device."""
    scale, minimum = read_scales(qblocks)
    high, qs = qblocks[:, 16:48].contiguous(), qblocks[:, 48:].view(-1, 4, 32)
    q = torch.empty(len(qblocks), 8, 32, dtype=torch.uint8, device=qblocks.device)
    torch.bitwise_and(qs, 15, out=q[:, 0::2])
    torch.bitwise_right_shift(qs, 4, out=q[:, 1::2])
    for s in range(8):
        fifth = high << (4 - s) if s < 4 else high >> (s - 4)
        q[:, s].bitwise_or_(fifth.bitwise_and_(16))
    groups = out.view(-1, 8, 32).copy_(q)
    groups.mul_(scale).sub_(minimum)
