"""The two searches behind most of ggml's types: which scale (and offset) fits a group best.

Both try a short list of candidate grids per group and keep the one of least weighted error:

    search_offset   x ~ s*L + o   L in 0..N, o <= 0    Q2_K, Q4_K, Q5_K; Q4_1, Q5_1 by importance
    search_signed   x ~ s*l       l in -N..N-1         Q6_K; Q3_K, Q4_0, Q5_0 by importance

The result must equal ggml's byte for byte, so every operation is one fp32 rounding in ggml's order
and sums run strictly in index order, along the columns of `columns.py`. Torch does the passes over
all weights because its vector loops are faster than NumPy's; numbers per group are NumPy's, as
torch's square root (not correctly rounded) and `scalar / tensor` (a reciprocal and a product) would
change bytes. A pass costs what it moves through the cache, so torch's fused ones are used where
they round as ggml does: squared differences, and see `scaled_differences`. Where numba is
installed, `compiled.py` does all of it in a fraction of the time.

The error weights are an argument: importance-weighted types need another `w`, not another search.

Source: ggml `make_qkx2_quants`, `make_qkx3_quants` and `make_qx_quants`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch

from zquant.quant.columns import (
    MIN_COLUMNS,
    Vector,
    column_products,
    column_sums,
    scale_and_shift,
)

__all__ = [
    "TINY",
    "OffsetGrid",
    "compiled_loops",
    "importance_grid",
    "lost_levels",
    "scaled_differences",
    "search_offset",
    "search_signed",
    "signed_max",
]

Mask = npt.NDArray[np.bool_]

TINY = 1e-15  # ggml's GROUP_MAX_EPS: a group below it is stored as zeros
SIGNED_STEPS = [k for k in range(-9, 10) if k != 0]
NO_REDUCTION = 0  # torch's code for a loss per element


@dataclass(frozen=True, slots=True, kw_only=True)
class OffsetGrid:
    """Candidates of `search_offset`: levels 0..top, grid k spans top + first + step*k steps.

    The error is the square of the difference, or its magnitude where `absolute`.
    """

    top: int
    first: float
    step: float
    last_k: int
    absolute: bool = False

    def steps(self) -> list[np.float32]:
        """Steps that each candidate grid spans, rounded as ggml rounds them."""
        first, step, top = np.float32(self.first), np.float32(self.step), np.float32(self.top)
        return [first + step * np.float32(k) + top for k in range(self.last_k + 1)]


def importance_grid(top: int) -> OffsetGrid:
    """The candidates that ggml tries when it is given importance."""
    return OffsetGrid(top=top, first=-0.9, step=0.05, last_k=36)


def scaled_differences(x: torch.Tensor, offset: Vector, t: Vector, out: torch.Tensor) -> None:
    """`(x - offset) * t` per column in one pass, each operation rounded.

    It is the gradient of a squared error, which torch computes as 2 * (x - offset) * t/2. Doubling
    and halving are exact unless 2 * (x - offset) overflows; then squares of x have overflowed too,
    every candidate's error is infinite or NaN, and no level counts.
    """
    half = _along_columns(t * np.float32(0.5))
    torch.ops.aten.mse_loss_backward.grad_input(
        half, x, _along_columns(offset), NO_REDUCTION, grad_input=out
    )


def search_offset(
    x: torch.Tensor, w: torch.Tensor, grid: OffsetGrid, *, keep_levels: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Fit `x ~ s*L - mu` per column, minimizing sum w*(s*L - mu - x)**2.

    Args:
        x: float32 `[..., m, n]`, CPU, contiguous, n > 1: one group per column.
        w: error weights, as `x`.
        grid: the candidates.
        keep_levels: also return the levels L of the best fit.

    Returns:
        s `[..., n]`, mu `[..., n]` (>= 0) and L `[..., m, n]` or None.
    """
    if loops := compiled_loops():
        fit = loops.offset_fit(
            *_grouped(x, w),
            np.array(grid.steps(), np.float32),
            grid.top,
            absolute=grid.absolute,
            keep_levels=keep_levels,
        )
        s, mu = (torch.from_numpy(a).view(*x.shape[:-2], -1) for a in fit[:2])
        return s, mu, None if fit[2] is None else torch.from_numpy(fit[2]).view_as(x)
    with np.errstate(all="ignore"):  # groups without a fit give NaN, which never wins
        lo, hi = _smallest(x), x.amax(dim=-2).numpy()
        lo[lo > 0] = 0
        flat = hi == lo
        span = np.where(flat, np.float32(1), hi - lo)  # a flat group gets level 0 everywhere
        fit = _OffsetFit(x, w, absolute=grid.absolute)
        t = np.float32(grid.top) / span
        scale, offset = 1 / t, lo
        start, kept_t = lo.copy(), t.copy()
        fit.round_levels(offset, t, grid.top)
        error = fit.error(scale, offset)
        for steps in grid.steps():
            t = steps / (hi - offset)
            fit.round_levels(offset, t, grid.top)
            new_scale, new_offset, valid = fit.least_squares()
            new_error = fit.error(new_scale, new_offset)
            better = valid & (new_error < error)
            _take((start, kept_t), (offset, t), better)
            _take((scale, offset, error), (new_scale, new_offset, new_error), better)
        levels = fit.round_levels(start, kept_t, grid.top) if keep_levels else None
    scale[flat] = 0
    return torch.from_numpy(scale), torch.from_numpy(-offset), levels


class _OffsetFit:
    """Scratch and constant sums of one `search_offset`; `c` holds the levels under trial."""

    def __init__(self, x: torch.Tensor, w: torch.Tensor, *, absolute: bool) -> None:
        self.x, self.w, self.absolute = x, w, absolute
        self.c = torch.empty_like(x)
        self.sum_w, self.sum_wx = column_sums(w), column_products(w, x)

    def round_levels(self, offset: Vector, t: Vector, top: int) -> torch.Tensor:
        """Nearest levels of every weight on the grid that starts at `offset`."""
        scaled_differences(self.x, offset, t, self.c)
        return self.c.round_().clamp_(0, top)

    def least_squares(self) -> tuple[Vector, Vector, Mask]:
        """Best scale and offset for the levels in `c`, and where the problem has a solution."""
        a = column_products(self.w, self.c)
        b = column_products(self.w, self.c, self.c)
        x = column_products(self.w, self.c, self.x)
        d = self.sum_w * b - a * a
        scale = np.divide(self.sum_w * x - self.sum_wx * a, d)
        offset = np.divide(b * self.sum_wx - a * x, d)
        above = offset > 0
        if above.any():
            _take((scale, offset), (np.divide(x, b), np.zeros_like(offset)), above)
        return scale, offset, d > 0

    def error(self, scale: Vector, offset: Vector) -> Vector:
        """Weighted error of the levels in `c`, which it overwrites."""
        fitted = scale_and_shift(self.c, _along_columns(scale), _along_columns(offset))
        if self.absolute:
            return column_products(fitted.sub_(self.x).abs_(), self.w)
        squares = torch.ops.aten.mse_loss.out(fitted, self.x, NO_REDUCTION, out=fitted)
        return column_products(squares, self.w)


def search_signed(
    x: torch.Tensor, w: torch.Tensor, half: int, *, keep_levels: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fit `x ~ s*l` per column with l in -half..half-1, minimizing sum w*(s*l - x)**2.

    Args:
        x: float32 `[..., m, n]`, CPU, contiguous, n > 1: one group per column.
        w: error weights, as `x`.
        half: half of the number of levels.
        keep_levels: also return l + half.

    Returns:
        s `[..., n]` (0 for a group of zeros) and l + half `[..., m, n]` or None.
    """
    largest = signed_max(x)
    dead = np.abs(largest) < TINY
    largest[dead] = 1
    if loops := compiled_loops():
        steps = -(np.float32(half) + np.float32(0.1) * np.array([0, *SIGNED_STEPS], np.float32))
        lines = largest.reshape(-1, largest.shape[-1])
        fit = loops.signed_fit(*_grouped(x, w), lines, steps, half, keep_levels=keep_levels)
        scale = fit[0].reshape(largest.shape)
        levels = None if fit[1] is None else torch.from_numpy(fit[1]).view_as(x)
    else:
        scale, levels = _signed_fit(x, w, largest, half, keep_levels=keep_levels)
    scale[dead] = 0
    if levels is not None:
        levels = levels.add_(half).masked_fill_(_along_columns(dead), 0)
    return torch.from_numpy(scale), levels


def _signed_fit(
    x: torch.Tensor, w: torch.Tensor, largest: Vector, half: int, *, keep_levels: bool
) -> tuple[Vector, torch.Tensor | None]:
    """`search_signed` with 1 for the largest number of a group of zeros."""
    wx = w * x
    c = torch.empty_like(x)

    def round_levels(t: Vector) -> torch.Tensor:
        torch.mul(x, _along_columns(t), out=c)
        return c.round_().clamp_(-half, half - 1)

    def trial(t: Vector) -> tuple[Vector, Vector]:
        """Sums of w*x*l and w*l*l for the levels of the grid with t levels per unit."""
        round_levels(t)
        return column_products(wx, c), column_products(w, c, c)

    with np.errstate(all="ignore"):
        kept_t = np.float32(-half) / largest
        p, q = trial(kept_t)
        scale = np.where(q == 0, np.float32(0), p / q)
        best = scale * p
        for k in SIGNED_STEPS:
            t = -(np.float32(half) + np.float32(0.1) * np.float32(k)) / largest
            p, q = trial(t)
            better = (p * p > best * q) & (q > 0)
            new_scale = p / q
            _take((scale, best, kept_t), (new_scale, new_scale * p, t), better)
        levels = round_levels(kept_t) if keep_levels else None
    return scale, levels


@cache
def compiled_loops() -> ModuleType | None:
    """The module `compiled`, or None where numba is not installed."""
    try:
        from zquant.quant import compiled
    except ImportError:
        return None
    return compiled


def _grouped(*columns: torch.Tensor) -> list[npt.NDArray[np.float32]]:
    """`[..., m, n]` as `[G, m, n]`."""
    return [a.numpy().reshape(-1, *a.shape[-2:]) for a in columns]


def lost_levels(
    x: torch.Tensor,
    w: torch.Tensor,
    lost: torch.Tensor,
    search: Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None],
) -> torch.Tensor:
    """Levels of groups whose stored scale is 0: ggml keeps those of the search.

    Args:
        x: float32 `[G, m, n]` as it was searched.
        w: error weights, as `x`.
        lost: which groups, bool `[G, n]`.
        search: levels of columns and their error weights, both `[m, n']`.

    Returns:
        uint8 `[m, number of lost groups]`.
    """
    columns = [a.transpose(0, 1)[:, lost] for a in (x, w)]
    count = columns[0].shape[1]
    if count == 0:
        return torch.empty(x.shape[1], 0, dtype=torch.uint8)
    if count < MIN_COLUMNS:
        columns = [a.repeat(1, MIN_COLUMNS) for a in columns]
    levels = search(*(a.contiguous() for a in columns))
    assert levels is not None
    return levels[:, :count].to(torch.uint8)


def _take(old: tuple[Vector, ...], new: tuple[Vector, ...], where: Mask) -> None:
    """Replace what `where` is true for, by index: a mask mispredicts a branch per number."""
    at = np.flatnonzero(where)
    for mine, other in zip(old, new, strict=True):
        mine.reshape(-1)[at] = other.reshape(-1)[at]


def _along_columns(numbers: npt.NDArray[np.generic]) -> torch.Tensor:
    """Numbers per group `[..., n]` as `[..., 1, n]`, to be broadcast along columns."""
    return torch.from_numpy(numbers).unsqueeze(-2)


def _smallest(x: torch.Tensor) -> Vector:
    """The smallest number per column of `x [..., m, n]`; the first on ties of +0 and -0."""
    smallest: Vector = x.amin(dim=-2).numpy()
    zero = smallest == 0
    if zero.any():
        columns = np.moveaxis(x.numpy(), -2, 0)[:, zero]
        first = (columns == 0).argmax(axis=0)
        smallest[zero] = columns[first, np.arange(len(first))]
    return smallest


def signed_max(x: torch.Tensor) -> Vector:
    """The number of largest magnitude per column of `x [..., m, n]`, signed; first on ties."""
    lo, hi = x.amin(dim=-2).numpy(), x.amax(dim=-2).numpy()
    largest = np.where(hi > -lo, hi, lo)
    tied = hi == -lo
    if tied.any():
        columns = np.moveaxis(x.numpy(), -2, 0)[:, tied]
        first = np.abs(columns).argmax(axis=0)
        largest[tied] = columns[first, np.arange(len(first))]
    return largest
