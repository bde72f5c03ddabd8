"""Q2_K: 256 weights in 84 bytes; 2-bit levels, sixteen 4-bit scales and minimums.

    byte 0 scales[16], 16 qs[64], 80 half d, 82 half dmin
    w[e] = (d * sc[s]) * q[e] - (dmin * mn[s])        s = e // 16
    scales[s] = sc[s], and 16 * mn[s]
    q[e] = bits 2j and 2j+1 of qs[32*(e//128) + e%32], j = (e%128)//32

Source: ggml `block_q2_K`, `quantize_row_q2_K_ref`, `quantize_row_q2_K_impl`,
`dequantize_row_q2_K`.
"""

import numpy as np
import numpy.typing as npt
import torch

from zquant.quant.columns import from_columns
from zquant.quant.offset_fit import OffsetForm, fit_offset_qblocks
from zquant.quant.search import OffsetGrid

__all__ = ["dequantize", "quantize"]

FORM = OffsetForm(
    subblock=16,
    largest_scale=15,
    grid=OffsetGrid(top=3, first=-0.5, step=0.1, last_k=15, absolute=True),
    plain_costs=torch.abs,
    spread=1,
)


def quantize(
    weights: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.uint8]:
    """Quantize float32 `[N, K]`, contiguous, K a multiple of 256, to uint8 `[N, 84*K/256]`."""
    fields = fit_offset_qblocks(weights, FORM, importance)
    scales = (fields.mins << 4).bitwise_or_(fields.scales)
    q = fields.q.view(2, 4, 32, -1)
    qs = q[:, 0] | (q[:, 1] << 2) | (q[:, 2] << 4) | (q[:, 3] << 6)
    units = torch.stack([fields.d, fields.dmin])[:, :, None].view(torch.uint8)  # [2, n, 2]
    return from_columns([scales, qs, units.transpose(1, 2)], weights)


def dequantize(qblocks: torch.Tensor, out: torch.Tensor) -> None:
    """Decode uint8 `[n, 84]` into float32 `out [n, 256]`, both contiguous on one device."""
    d, dmin = qblocks[:, 80:].contiguous().view(torch.float16).float().chunk(2, dim=1)
    scale = d * (qblocks[:, :16] & 15).float()
    minimum = dmin * (qblocks[:, :16] >> 4).float()
    qs = qblocks[:, 16:80].view(-1, 2, 32)
    q = torch.empty(len(qblocks), 2, 4, 32, dtype=torch.uint8, device=qblocks.device)
    for j in range(4):
        torch.bitwise_and(qs >> (2 * j), 3, out=q[:, :, j])
    groups = out.view(-1, 16, 16).copy_(q.view(-1, 16, 16))
    groups.mul_(scale[:, :, None]).sub_(minimum[:, :, None])
