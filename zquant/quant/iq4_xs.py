"""IQ4_XS: 256 weights in 136 bytes; 4-bit indices into sixteen values, eight 6-bit signed scales.

    byte 0 half d, 2 u16 scales_h, 4 scales_l[4], 8 qs[128]
    w[e] = (d * (sc[s] - 32)) * VALUES[q[e]]          s = e // 32
    sc[s] = nibble of scales_l[s//2] (low for even s, high for odd)
            + 16 * (bits 2s and 2s+1 of scales_h)
    q[e] = nibble as in Q4_0 of qs[16*s .. 16*s+15]

The values and the search are in `iq4.py`.

Source: ggml `block_iq4_xs`, `quantize_row_iq4_nl_impl`, `dequantize_row_iq4_xs`.
"""

import numpy as np
import numpy.typing as npt
import torch

from zquant.quant.columns import from_columns
from zquant.quant.iq4 import look_up, nearest, search_values
from zquant.quant.search import signed_max
from zquant.quant.simple import inverse, split_nibbles

__all__ = ["dequantize", "quantize"]

SCALE_HALF = 32  # scales are -32..31


def quantize(
    weights: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.uint8]:
    """Quantize float32 `[N, K]`, contiguous, K a multiple of 256, to uint8 `[N, 136*K/256]`."""
    x, scale = search_values(weights, importance, 256)
    d = torch.div(torch.from_numpy(signed_max(scale)), torch.tensor(-float(SCALE_HALF)))
    multiples = (inverse(d) * scale).round_().clamp_(-SCALE_HALF, SCALE_HALF - 1)
    q = nearest(x, inverse(d * multiples))  # on the grid of the unrounded d, as ggml does
    nibbles = q[:, :16] | (q[:, 16:] << 4)
    scales = _pack_scales(multiples.add_(SCALE_HALF).to(torch.uint8))
    return from_columns([d.half()[:, None].view(torch.uint8).t(), scales, nibbles], weights)


def dequantize(qblocks: torch.Tensor, out: torch.Tensor) -> None:
    """Decode uint8 `[n, 136]` into float32 `out [n, 256]`, both contiguous on one device."""
    d = qblocks[:, :2].contiguous().view(torch.float16).float()
    scale = d * _read_scales(qblocks[:, 2:8]).float()
    look_up(split_nibbles(qblocks[:, 8:].view(-1, 8, 16)), out)
    out.view(-1, 8, 32).mul_(scale[:, :, None])


def _pack_scales(scales: torch.Tensor) -> torch.Tensor:
    """Multiples 0..63, uint8 `[8, n]`, as scales_h and scales_l, `[6, n]`."""
    high = (scales >> 4).view(2, 4, -1)
    high = high[:, 0] | (high[:, 1] << 2) | (high[:, 2] << 4) | (high[:, 3] << 6)
    return torch.cat([high, (scales[0::2] & 15) | ((scales[1::2] & 15) << 4)])


def _read_scales(stored: torch.Tensor) -> torch.Tensor:
    """The eight signed scales of scales_h and scales_l, uint8 `[n, 6]`, as int8 `[n, 8]`."""
    odd = torch.arange(2, dtype=torch.uint8, device=stored.device)
    pairs = torch.arange(4, dtype=torch.uint8, device=stored.device)
    low = (stored[:, 2:, None] >> (4 * odd)).bitwise_and_(15)  # [n, 4, 2]
    high = (stored[:, :2, None] >> (2 * pairs)).bitwise_and_(3)  # [n, 2, 4]
    scales = low.view(-1, 8).bitwise_or_(high.view(-1, 8).bitwise_left_shift_(4))
    return scales.view(torch.int8).sub_(SCALE_HALF)
