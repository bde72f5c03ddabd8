"""What Q4_K and Q5_K share: eight sub-blocks of 32 weights with 6-bit scales and minimums.

    w[e] = (d * sc[s]) * q[e] - (dmin * mn[s])        s = e // 32

Packing of the 12 bytes b, for j in 0..3 (bits from the least significant):

    b[j]      bits 0-5 sc[j]                bits 6-7 high bits of sc[j+4]
    b[j+4]    bits 0-5 mn[j]                bits 6-7 high bits of mn[j+4]
    b[j+8]    bits 0-3 low bits of sc[j+4]  bits 4-7 low bits of mn[j+4]

Source: ggml `block_q4_K`, `get_scale_min_k4`, `quantize_row_q4_K_ref`.
"""

import numpy as np
import torch

from zquant.quant.columns import column_sums
from zquant.quant.offset_fit import OffsetForm, OffsetQBlocks
from zquant.quant.search import OffsetGrid

__all__ = ["header", "k_form", "read_scales"]

SUBBLOCK = 32  # weights that share one 6-bit scale
TOP = 63  # largest 6-bit scale


def k_form(grid: OffsetGrid) -> OffsetForm:
    """How Q4_K and Q5_K are fitted, given the candidates of the search without importance."""
    return OffsetForm(
        subblock=SUBBLOCK, largest_scale=TOP, grid=grid, plain_costs=_plain_costs, spread=2
    )


def _plain_costs(x: torch.Tensor) -> torch.Tensor:
    """Root mean square of the group plus the magnitude of the weight."""
    costs = x * x
    rms = np.sqrt(column_sums(costs) / np.float32(SUBBLOCK))
    return torch.abs(x, out=costs).add_(torch.from_numpy(rms).unsqueeze(-2))


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
