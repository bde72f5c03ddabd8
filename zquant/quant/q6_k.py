"""Q6_K: 256 weights in 210 bytes; 6-bit signed levels, sixteen 8-bit scales.

    byte 0 ql[128], 128 qh[64], 192 int8 scales[16], 208 half d
    w[e] = (d * scales[e//16]) * (q[e] - 32)
    with n = e//128, k = (e%128)//32, l = e%32:
    q[e] = nibble of ql[64*n + 32*(k%2) + l] (low for k < 2, high otherwise)
           + 16 * (bits 2k and 2k+1 of qh[32*n + l])

Source: ggml `block_q6_K`, `quantize_row_q6_K_ref`, `quantize_row_q6_K_impl`,
`dequantize_row_q6_K`.
"""

import numpy as np
import numpy.typing as npt
import torch

from zquant.quant.columns import QBLOCK, from_columns, to_columns
from zquant.quant.importance import importance_along
from zquant.quant.search import TINY, lost_levels, search_signed, signed_max

__all__ = ["dequantize", "quantize"]

SUBBLOCK = 16  # weights that share one 8-bit scale
HALF = 32  # levels are -32..31
HIGH_SHIFTS = (4, 2, 0, -2)  # left shifts that bring bits 2k, 2k+1 to bits 4, 5


def quantize(
    weights: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.uint8]:
    """Quantize float32 `[N, K]`, contiguous, K a multiple of 256, to uint8 `[N, 210*K/256]`."""
    x = to_columns(weights, SUBBLOCK)
    w = x * x if importance is None else importance_along(x, importance, QBLOCK)
    scale, _ = search_signed(x, w, HALF)
    d, scales, empty = _eight_bit(scale)
    delta = d.float() * scales
    lost = delta == 0
    kept = lost_levels(x, w, lost, lambda x, w: search_signed(x, w, HALF, keep_levels=True)[1])
    delta.masked_fill_(lost, 1)
    x.div_(delta[:, None]).round_().clamp_(-HALF, HALF - 1)
    q = x.add_(HALF).to(torch.int8).view(torch.uint8)
    q.transpose(0, 1)[:, lost] = kept
    fields = [*_pack(q), scales.view(torch.uint8), d[:, None].view(torch.uint8).t()]
    if empty.any():
        for field in fields:
            field.masked_fill_(empty, 0)
    return from_columns(fields, weights)


def _eight_bit(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales `[16, n]` as a float16 unit `[n]`, int8 multiples, and which qblocks are empty."""
    largest = torch.from_numpy(signed_max(scale))
    empty = largest.abs() < TINY
    t = torch.div(torch.tensor(-128.0), largest.masked_fill_(empty, 1))
    multiples = (t * scale).round_().clamp_(max=127).to(torch.int8)
    return torch.div(torch.tensor(1.0), t).half(), multiples, empty


def _pack(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels 0..63, uint8 `[16, 16, n]`, as ql `[128, n]` and qh `[64, n]`, uint8."""
    halves = q.view(2, 2, 64, -1)
    low = (halves[:, 0] & 15).bitwise_or_(halves[:, 1] << 4)
    high = (q >> 4).view(2, 4, 32, -1)
    qh = high[:, 0] | (high[:, 1] << 2) | (high[:, 2] << 4) | (high[:, 3] << 6)
    return low.view(128, -1), qh.view(64, -1)


def dequantize(qblocks: torch.Tensor, out: torch.Tensor) -> None:
    """Decode uint8 `[n, 210]` into float32 `out [n, 256]`, both contiguous on one device."""
    ql = qblocks[:, :128].view(-1, 2, 2, 32)
    qh = qblocks[:, 128:192].contiguous().view(-1, 2, 32)
    q = torch.empty(len(qblocks), 2, 4, 32, dtype=torch.uint8, device=qblocks.device)
    torch.bitwise_and(ql, 15, out=q[:, :, :2])
    torch.bitwise_right_shift(ql, 4, out=q[:, :, 2:])
    for k, shift in enumerate(HIGH_SHIFTS):
        high = qh << shift if shift >= 0 else qh >> -shift
        q[:, :, k].bitwise_or_(high.bitwise_and_(48))
    d = qblocks[:, 208:].contiguous().view(torch.float16).float()
    scale = d * qblocks[:, 192:208].contiguous().view(torch.int8).float()
    levels = q.view(torch.int8).sub_(HALF).view(-1, 16, SUBBLOCK)
    out.view(-1, 16, SUBBLOCK).copy_(levels).mul_(scale[:, :, None])
