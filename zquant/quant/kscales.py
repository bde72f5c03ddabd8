"""What Q4_K and Q5_K share: eight sub-blocks of 32 weights with 6-bit scales and minimums.

    w[e] = (d * sc[s]) * q[e] - (dmin * mn[s])        s = e // 32

Packing of the 12 bytes b, for j in 0..3 (bits from the least significant):

    b[j]      bits 0-5 sc[j]                bits 6-7 high bits of sc[j+4]
    b[j+4]    bits 0-5 mn[j]                bits 6-7 high bits of mn[j+4]
    b[j+8]    bits 0-3 low bits of sc[j+4]  bits 4-7 low bits of mn[j+4]

Source: ggml `block_q4_K`, `get_scale_min_k4`, `quantize_row_q4_K_ref`.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from zquant.quant.columns import MIN_COLUMNS, column_sums, to_columns
from zquant.quant.search import OffsetGrid, search_offset

__all__ = ["SUBBLOCK", "OffsetQBlocks", "fit_offset_qblocks", "header", "read_scales"]

SUBBLOCK = 32  # weights that share one 6-bit scale
TOP = 63  # largest 6-bit scale


@dataclass(frozen=True, slots=True, kw_only=True)
class OffsetQBlocks:
    """Fields of n qblocks before packing, qblocks last."""

    d: torch.Tensor  # float16 [n]
    dmin: torch.Tensor  # float16 [n]
    scales: torch.Tensor  # uint8 [8, n]
    mins: torch.Tensor  # uint8 [8, n]
    q: torch.Tensor  # uint8 [8, 32, n]


def fit_offset_qblocks(weights: npt.NDArray[np.float32], grid: OffsetGrid) -> OffsetQBlocks:
    """Quantize float32 `[N, K]`: search per sub-block, then 6-bit scales, then the levels."""
    x = to_columns(weights, SUBBLOCK)
    scale, minimum, _ = search_offset(x, _error_weights(x), grid)
    d, scales = _six_bit(scale)
    dmin, mins = _six_bit(minimum)
    delta, theta = d.float() * scales, dmin.float() * mins
    lost = delta == 0
    kept = _search_levels(x.transpose(0, 1)[:, lost], grid) if lost.any() else None
    delta.masked_fill_(lost, 1)
    x.add_(theta[:, None]).div_(delta[:, None]).round_().clamp_(0, grid.top)
    q = x.to(torch.int8).view(torch.uint8)  # torch converts to int8 six times as fast
    if kept is not None:
        q.transpose(0, 1)[:, lost] = kept
    return OffsetQBlocks(d=d, dmin=dmin, scales=scales, mins=mins, q=q)


def _error_weights(x: torch.Tensor) -> torch.Tensor:
    """Root mean square of the group plus the magnitude of the weight."""
    weights = x * x
    rms = np.sqrt(column_sums(weights) / np.float32(SUBBLOCK))
    return torch.abs(x, out=weights).add_(torch.from_numpy(rms).unsqueeze(-2))


def _six_bit(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight values per qblock `[8, n]` as a float16 unit `[n]` and 6-bit multiples."""
    largest = values.amax(dim=0).clamp_(min=0) + 0.0  # the sum turns -0 into +0
    top = torch.tensor(float(TOP))
    inverse = torch.div(top, largest).masked_fill_(largest == 0, 0)
    multiples = (inverse * values).round_().to(torch.int32)
    # ggml keeps them in a byte before limiting: a negative multiple becomes the largest
    return largest.div(top).half(), multiples.bitwise_and_(255).clamp_(max=TOP).to(torch.uint8)


def _search_levels(columns: torch.Tensor, grid: OffsetGrid) -> torch.Tensor:
    """Levels of groups whose stored scale is 0: ggml keeps those of the search, uint8 `[32, n]`."""
    count = columns.shape[1]
    if count < MIN_COLUMNS:
        columns = columns.repeat(1, MIN_COLUMNS)
    columns = columns.contiguous()
    _, _, levels = search_offset(columns, _error_weights(columns), grid, keep_levels=True)
    assert levels is not None
    return levels[:, :count].to(torch.uint8)


def header(fields: OffsetQBlocks) -> torch.Tensor:
    """The first 16 bytes of each qblock: d, dmin and the packed 6-bit numbers, uint8 `[16, n]`."""
    sc, mn = fields.scales, fields.mins
    units = torch.stack([fields.d, fields.dmin])[:, :, None].view(torch.uint8)  # [2, n, 2]
    low = torch.cat([sc[:4], mn[:4]]) | torch.cat([(sc[4:] >> 4) << 6, (mn[4:] >> 4) << 6])
    high = (sc[4:] & 15) | ((mn[4:] & 15) << 4)
    return torch.cat([units.transpose(1, 2).reshape(4, -1), low, high])


def read_scales(qblocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minimums of uint8 `[n, qblock_bytes]`, multiplied out, as float32 `[n, 8, 1]`."""
    units = qblocks[:, :4].contiguous().view(torch.float16).float()  # d, dmin
    # four 6-bit numbers at a time; the masks drop what shifts bring in from the neighbouring byte
    words = qblocks[:, 4:16].contiguous().view(torch.int32)
    first = words[:, :2] & 0x3F3F3F3F  # sc[0:4], mn[0:4]
    last = torch.stack([words[:, 2], words[:, 2] >> 4], dim=1).bitwise_and_(0x0F0F0F0F)
    last |= (words[:, :2] >> 2).bitwise_and_(0x30303030)  # sc[4:8], mn[4:8]
    multiples = torch.stack([first, last], dim=2).view(torch.uint8).view(-1, 2, 8)
    scaled = multiples.float().mul_(units[:, :, None])
    return scaled[:, 0, :, None], scaled[:, 1, :, None]
