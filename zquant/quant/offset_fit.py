"""How Q2_K, Q4_K and Q5_K are fitted: scales and minimums per sub-block, then the levels.

    w[e] = (d * sc[s]) * q[e] - (dmin * mn[s])        s = e // subblock

Each sub-block's scale and minimum come from `search_offset`; a qblock's scales become multiples of
one float16 number (so do its minimums), and every weight is rounded again on the stored grid.

Source: ggml `quantize_row_q4_K_ref`, `quantize_row_q4_K_impl` and their siblings.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from zquant.quant.columns import QBLOCK, column_sums, to_columns
from zquant.quant.importance import qblock_costs
from zquant.quant.search import OffsetGrid, importance_grid, lost_levels, search_offset
from zquant.quant.sweeps import search_positive

__all__ = ["OffsetForm", "OffsetQBlocks", "fit_offset_qblocks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OffsetForm:
    """How a type is fitted.

    Attributes:
        subblock: weights that share a scale and a minimum.
        largest_scale: largest stored multiple.
        grid: candidates without importance.
        plain_costs: error weights of columns `[G, m, n]` without importance.
        spread: v of `importance.py` is this times the mean square of the qblock.
    """

    subblock: int
    largest_scale: int
    grid: OffsetGrid
    plain_costs: Callable[[torch.Tensor], torch.Tensor]
    spread: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OffsetQBlocks:
    """Fields of n qblocks before packing, qblocks last; S sub-blocks of m weights."""

    d: torch.Tensor  # float16 [n]
    dmin: torch.Tensor  # float16 [n]
    scales: torch.Tensor  # uint8 [S, n]
    mins: torch.Tensor  # uint8 [S, n]
    q: torch.Tensor  # uint8 [S, m, n]


def fit_offset_qblocks(
    weights: npt.NDArray[np.float32],
    form: OffsetForm,
    importance: npt.NDArray[np.float32] | None,
) -> OffsetQBlocks:
    """Quantize float32 `[N, K]`, contiguous, K a multiple of 256."""
    x = to_columns(weights, form.subblock)
    if importance is None:
        grid, w = form.grid, form.plain_costs(x)
    else:
        grid = importance_grid(form.grid.top)
        w = qblock_costs(x, importance, QBLOCK, factor=form.spread)
    scale, minimum, _ = search_offset(x, w, grid)
    if importance is None:
        d, scales = _multiples(scale, form.largest_scale)
        dmin, mins = _multiples(minimum, form.largest_scale)
    else:
        d, scales, dmin, mins = _fitted_multiples(scale, minimum, w, form.largest_scale)
    delta, theta = d.float() * scales, dmin.float() * mins
    lost = delta == 0
    kept = lost_levels(x, w, lost, lambda x, w: search_offset(x, w, grid, keep_levels=True)[2])
    delta.masked_fill_(lost, 1)
    x.add_(theta[:, None]).div_(delta[:, None]).round_().clamp_(0, grid.top)
    q = x.to(torch.int8).view(torch.uint8)  # torch converts to int8 six times as fast
    q.transpose(0, 1)[:, lost] = kept
    return OffsetQBlocks(d=d, dmin=dmin, scales=scales, mins=mins, q=q)


def _multiples(values: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers `[S, n]` as a float16 unit per qblock `[n]` and whole multiples up to `top`."""
    largest = values.amax(dim=0).clamp_(min=0) + 0.0  # the sum turns -0 into +0
    most = torch.tensor(float(top))
    inverse = torch.div(most, largest).masked_fill_(largest == 0, 0)
    multiples = (inverse * values).round_().to(torch.int32)
    # ggml keeps them in a byte before limiting: a negative multiple becomes the largest
    return largest.div(most).half(), multiples.bitwise_and_(255).clamp_(max=top).to(torch.uint8)


def _fitted_multiples(
    scale: torch.Tensor, minimum: torch.Tensor, w: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same by a search, where a sub-block counts as much as its weights do together."""
    costs = torch.from_numpy(column_sums(w))
    both = torch.cat([scale, minimum], dim=1)
    units, multiples = search_positive(both, costs.repeat(1, 2), top)
    (d, dmin), (scales, mins) = torch.from_numpy(units).half().chunk(2), multiples.chunk(2, dim=1)
    return d, scales, dmin, mins
