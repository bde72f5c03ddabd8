"""Q4_K: 256 weights in 144 bytes; 4-bit levels, eight 6-bit scales and minimums.

    byte 0 half d, 2 half dmin, 4 scales[12], 16 qs[128]
    q[e] = nibble of qs[32*(e//64) + e%32], low nibble for even e//32, high for odd

Scales and their formula are in `kscales.py`.

Source: ggml `block_q4_K`, `quantize_row_q4_K_ref`, `quantize_row_q4_K_impl`,
`dequantize_row_q4_K`.
"""

import numpy as np
import numpy.typing as npt
import torch

from zquant.quant.columns import from_columns
from zquant.quant.kscales import header, k_form, read_scales
from zquant.quant.offset_fit import fit_offset_qblocks
from zquant.quant.search import OffsetGrid

__all__ = ["dequantize", "quantize"]

FORM = k_form(OffsetGrid(top=15, first=-1, step=0.1, last_k=20))


def quantize(
    weights: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.uint8]:
    """Quantize float32 `[N, K]`, contiguous, K a multiple of 256, to uint8 `[N, 144*K/256]`."""
    fields = fit_offset_qblocks(weights, FORM, importance)
    nibbles = (fields.q[1::2] << 4).bitwise_or_(fields.q[0::2])  # [4, 32, n]
    return from_columns([header(fields), nibbles], weights)


def dequantize(qblocks: torch.Tensor, out: torch.Tensor) -> None:
    """Decode uint8 `[n, 144]` into float32 `out [n, 256]`, both contiguous on one device."""
    scale, minimum = read_scales(qblocks)
    qs = qblocks[:, 16:].view(-1, 4, 32)
    q = torch.empty(len(qblocks), 4, 2, 32, dtype=torch.uint8, device=qblocks.device)
    torch.bitwise_and(qs, 15, out=q[:, :, 0])
    torch.bitwise_right_shift(qs, 4, out=q[:, :, 1])
    groups = out.view(-1, 8, 32).copy_(q.view(-1, 8, 32))
    groups.mul_(scale).sub_(minimum)
