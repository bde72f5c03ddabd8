"""Q3_K: 256 weights in 110 bytes; 3-bit signed levels, sixteen 6-bit signed scales.

    byte 0 hmask[32], 32 qs[64], 96 scales[12], 108 half d
    w[e] = (d * (sc[s] - 32)) * (q[e] - 4)            s = e // 16
    q[e] = two bits as in Q2_K, plus 4 if bit e//32 of hmask[e%32] is set
    sc[s] = nibble of scales[s%8] (low for s < 8, high otherwise)
            + 16 * (bits 2*(s//4) and the next of scales[8 + s%4])

Source: ggml `block_q3_K`, `quantize_row_q3_K_ref`, `quantize_row_q3_K_impl`,
`dequantize_row_q3_K`.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from zquant.quant.columns import QBLOCK, column_sums, from_columns, to_columns
from zquant.quant.importance import qblock_costs
from zquant.quant.search import lost_levels, search_signed, signed_max
from zquant.quant.sweeps import search_swept

__all__ = ["dequantize", "quantize"]

SUBBLOCK = 16  # weights that share one 6-bit scale
HALF = 4  # levels are -4..3
SCALE_HALF = 32  # scales are -32..31

# float16 unit [n], multiples 0..63 with 32 meaning 0, float32 [16, n], and the levels that the
# search gave to some groups: bool [16, n] -> uint8 [16, number of groups]
Fit = tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]


def quantize(
    weights: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.uint8]:
    """Quantize float32 `[N, K]`, contiguous, K a multiple of 256, to uint8 `[N, 110*K/256]`."""
    x = to_columns(weights, SUBBLOCK)
    d, scales, levels_where = _plain_fit(x) if importance is None else _cost_fit(x, importance)
    delta = d.float() * (scales - SCALE_HALF)
    lost = delta == 0
    kept = levels_where(lost)
    x.div_(delta.masked_fill_(lost, 1)[:, None]).round_().clamp_(-HALF, HALF - 1)
    q = x.add_(HALF).to(torch.int8).view(torch.uint8)
    q.transpose(0, 1)[:, lost] = kept
    units = d[:, None].view(torch.uint8).t()
    return from_columns([*_pack(q), _pack_scales(scales.to(torch.uint8)), units], weights)


def _plain_fit(x: torch.Tensor) -> Fit:
    """Scales of columns `[16, 16, n]`; the largest of a qblock becomes multiple 0."""
    scale, levels = search_swept(x, HALF)
    largest = torch.from_numpy(signed_max(scale))
    empty = largest == 0
    t = torch.div(torch.tensor(-float(SCALE_HALF)), largest.masked_fill(empty, 1))
    multiples = (t * scale).round_().clamp_(-SCALE_HALF, SCALE_HALF - 1).add_(SCALE_HALF)
    d = torch.div(torch.tensor(1.0), t).masked_fill_(empty, 0)
    multiples.masked_fill_(empty, 0)
    return d.half(), multiples, lambda lost: levels.transpose(0, 1)[:, lost]


def _cost_fit(x: torch.Tensor, importance: npt.NDArray[np.float32]) -> Fit:
    """The same by two searches; a sub-block counts as much as its weights do together."""
    w = qblock_costs(x, importance, QBLOCK, factor=2)
    scale, _ = search_signed(x, w, HALF)
    costs = torch.from_numpy(column_sums(w))
    d, multiples = search_signed(scale, costs, SCALE_HALF, keep_levels=True)
    assert multiples is not None
    return d.half(), multiples, lambda lost: lost_levels(x, w, lost, _levels)


def _levels(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor | None:
    return search_signed(x, w, HALF, keep_levels=True)[1]


def _pack(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels 0..7, uint8 `[16, 16, n]`, as hmask `[32, n]` and qs `[64, n]`, uint8."""
    third = (q >> 2).view(8, 32, -1)
    mask = third[0].clone()
    for s in range(1, 8):
        mask |= third[s] << s
    low = (q & 3).view(2, 4, 32, -1)
    qs = low[:, 0] | (low[:, 1] << 2) | (low[:, 2] << 4) | (low[:, 3] << 6)
    return mask, qs.view(64, -1)


def _pack_scales(scales: torch.Tensor) -> torch.Tensor:
    """Multiples 0..63, uint8 `[16, n]`, as scales `[12, n]`."""
    low = (scales[:8] & 15) | ((scales[8:] & 15) << 4)
    high = (scales >> 4).view(4, 4, -1)
    return torch.cat([low, high[0] | (high[1] << 2) | (high[2] << 4) | (high[3] << 6)])


def dequantize(qblocks: torch.Tensor, out: torch.Tensor) -> None:
    """Decode uint8 `[n, 110]` into float32 `out [n, 256]`, both contiguous on one device."""
    mask, qs = qblocks[:, :32].contiguous(), qblocks[:, 32:96].view(-1, 2, 32)
    q = torch.empty(len(qblocks), 2, 4, 32, dtype=torch.uint8, device=qblocks.device)
    for j in range(4):
        torch.bitwise_and(qs >> (2 * j), 3, out=q[:, :, j])
    groups = q.view(-1, 8, 32)
    for s in range(8):
        third = mask << (2 - s) if s < 2 else mask >> (s - 2)
        groups[:, s].bitwise_or_(third.bitwise_and_(4))
    d = qblocks[:, 108:].contiguous().view(torch.float16).float()
    scale = d * _read_scales(qblocks[:, 96:108]).float()
    levels = q.view(torch.int8).sub_(HALF).view(-1, 16, 16)
    out.view(-1, 16, 16).copy_(levels).mul_(scale[:, :, None])


def _read_scales(stored: torch.Tensor) -> torch.Tensor:
    """The sixteen signed scales of uint8 `[n, 12]`, int8 `[n, 16]`."""
    low = torch.cat([stored[:, :8] & 15, stored[:, :8] >> 4], dim=1)
    high = torch.cat([stored[:, 8:] >> shift for shift in (0, 2, 4, 6)], dim=1)
    scales = low.bitwise_or_(high.bitwise_and_(3).bitwise_left_shift_(4))
    return scales.view(torch.int8).sub_(SCALE_HALF)
