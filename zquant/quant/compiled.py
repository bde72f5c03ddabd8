"""The searches of `search.py` as compiled loops, for where numba is installed: same bytes, faster.

A tile of columns goes through all candidates while it lies in the first-level cache: one pass per
candidate for levels and sums, one for the error. Sums run down the columns in index order, and
nothing is contracted or reassociated: numba keeps IEEE arithmetic unless told otherwise. The loops
run without the interpreter lock, so threads do not wait for each other.

Two things decide whether the compiler makes vectors. All numbers per column are slices of one
array, at distances it knows: with an array each it would have to prove too many of them apart. And
indices are sums of products of counters: of others it does not see that none is negative.

Compiled code is kept beside this module, or in the user's cache where that cannot be written.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["offset_fit", "signed_fit"]

Floats = npt.NDArray[np.float32]

F = np.float32
TILE = 64  # columns: with 32 rows, weights, error weights and levels are 24 KiB
# where the numbers per column begin
OFFSET, TOP, SCALE, BEST, STEP, SUM_W, SUM_WX = (TILE * i for i in range(7))
A, B, P, NEW_SCALE, NEW_OFFSET, ERROR, SPAN = (TILE * i for i in range(7, 14))
N_NUMBERS = 14 * TILE

compiled = njit(nogil=True, cache=True, error_model="numpy")


def offset_fit(
    x: Floats, w: Floats, steps: Floats, top: int, *, absolute: bool, keep_levels: bool
) -> tuple[Floats, Floats, Floats | None]:
    """`zquant.quant.search.search_offset`.

    Args:
        x: `[G, m, n]`, contiguous.
        w: error weights, as `x`.
        steps: that each candidate grid spans.
        top: highest level.
        absolute: the error is the magnitude of the difference, not its square.
        keep_levels: also return the levels.

    Returns:
        s `[G, n]`, mu `[G, n]` and L `[G, m, n]` or None.
    """
    scale, minimum = np.empty((2, len(x), x.shape[2]), F)
    levels = np.empty_like(x if keep_levels else x[:0])
    _offset_loop(x, w, steps, F(top), absolute, scale, minimum, levels)
    return scale, minimum, levels if keep_levels else None


def signed_fit(
    x: Floats, w: Floats, largest: Floats, steps: Floats, half: int, *, keep_levels: bool
) -> tuple[Floats, Floats | None]:
    """`zquant.quant.search.search_signed`, except for groups of zeros.

    Args:
        x: `[G, m, n]`, contiguous.
        w: error weights, as `x`.
        largest: `[G, n]`, the number of largest magnitude, signed, not 0.
        steps: from 0 to `largest`, of each grid, negative; the first is the one to start from.
        half: half of the number of levels.
        keep_levels: also return the levels.

    Returns:
        s `[G, n]` and l `[G, m, n]` or None.
    """
    scale = np.empty((len(x), x.shape[2]), F)
    levels = np.empty_like(x if keep_levels else x[:0])
    _signed_loop(x, w, largest, steps, F(half), scale, levels)
    return scale, levels if keep_levels else None


@compiled
def _offset_loop(
    x: Floats,
    w: Floats,
    steps: Floats,
    top: np.float32,
    absolute: bool,
    scale: Floats,
    minimum: Floats,
    levels: Floats,
) -> None:
    n_groups, m, n = x.shape
    xs, ws, c = np.zeros(m * TILE, F), np.zeros(m * TILE, F), np.empty(m * TILE, F)
    v = np.empty(N_NUMBERS, F)
    for g in range(n_groups):
        for start in range(0, n, TILE):
            k = min(TILE, n - start)
            _fill(x[g], w[g], start, k, xs, ws)
            _first_grid(xs, ws, v, top)
            for trial in range(len(steps) + 1):
                if trial > 0:
                    for j in range(TILE):
                        v[STEP + j] = steps[trial - 1] / (v[TOP + j] - v[OFFSET + j])
                _offset_levels(xs, ws, c, v, top)
                if trial > 0:
                    _least_squares(v)
                _errors(xs, ws, c, v, absolute)
                for j in range(TILE):
                    if trial == 0 or v[ERROR + j] < v[BEST + j]:
                        v[BEST + j] = v[ERROR + j]
                        v[SCALE + j] = v[NEW_SCALE + j]
                        v[OFFSET + j] = v[NEW_OFFSET + j]
                        if j < k and len(levels):
                            _keep(c, j, levels[g, :, start + j])
            for j in range(k):
                scale[g, start + j] = F(0) if v[SPAN + j] == 0 else v[SCALE + j]
                minimum[g, start + j] = -v[OFFSET + j]


@compiled
def _signed_loop(
    x: Floats,
    w: Floats,
    largest: Floats,
    steps: Floats,
    half: np.float32,
    scale: Floats,
    levels: Floats,
) -> None:
    n_groups, m, n = x.shape
    xs, ws, c = np.zeros(m * TILE, F), np.zeros(m * TILE, F), np.empty(m * TILE, F)
    v = np.ones(N_NUMBERS, F)
    for g in range(n_groups):
        for start in range(0, n, TILE):
            k = min(TILE, n - start)
            _fill(x[g], w[g], start, k, xs, ws)
            for j in range(k):
                v[TOP + j] = largest[g, start + j]
            for trial in range(len(steps)):
                for j in range(TILE):
                    v[STEP + j] = steps[trial] / v[TOP + j]
                _signed_levels(xs, ws, c, v, half)
                for j in range(TILE):
                    p, b = v[P + j], v[B + j]
                    if trial == 0 or (p * p > v[BEST + j] * b and b > 0):
                        v[SCALE + j] = F(0) if b == 0 else p / b
                        v[BEST + j] = v[SCALE + j] * p
                        if j < k and len(levels):
                            _keep(c, j, levels[g, :, start + j])
            for j in range(k):
                scale[g, start + j] = v[SCALE + j]


@compiled
def _fill(x: Floats, w: Floats, start: int, k: int, xs: Floats, ws: Floats) -> None:
    """A tile of `k` columns; what lies beyond them is left over from another tile."""
    for i in range(len(x)):
        for j in range(k):
            xs[i * TILE + j] = x[i, start + j]
            ws[i * TILE + j] = w[i, start + j]


@compiled
def _keep(c: Floats, j: int, levels: Floats) -> None:
    for i in range(len(levels)):
        levels[i] = c[i * TILE + j]


@compiled
def _first_grid(xs: Floats, ws: Floats, v: Floats, top: np.float32) -> None:
    """Sums that stay, and the grid from the least weight, or 0, to the largest."""
    for j in range(TILE):
        v[SUM_W + j] = v[SUM_WX + j] = 0
        v[OFFSET + j] = v[TOP + j] = xs[j]
    for i in range(len(xs) // TILE):
        for j in range(TILE):
            xv, wv = xs[i * TILE + j], ws[i * TILE + j]
            v[OFFSET + j] = xv if xv < v[OFFSET + j] else v[OFFSET + j]
            v[TOP + j] = xv if xv > v[TOP + j] else v[TOP + j]
            v[SUM_W + j] += wv
            v[SUM_WX + j] += wv * xv
    for j in range(TILE):
        v[OFFSET + j] = F(0) if v[OFFSET + j] > 0 else v[OFFSET + j]
        v[NEW_OFFSET + j] = v[OFFSET + j]
        v[SPAN + j] = v[TOP + j] - v[OFFSET + j]
        v[STEP + j] = top / (F(1) if v[SPAN + j] == 0 else v[SPAN + j])
        v[NEW_SCALE + j] = F(1) / v[STEP + j]


@compiled
def _offset_levels(xs: Floats, ws: Floats, c: Floats, v: Floats, top: np.float32) -> None:
    """Nearest levels on the grid, and their sums."""
    zero = F(0)
    for j in range(TILE):
        v[A + j] = v[B + j] = v[P + j] = v[ERROR + j] = zero
    for i in range(len(xs) // TILE):
        for j in range(TILE):
            xv = xs[i * TILE + j]
            q = np.rint((xv - v[OFFSET + j]) * v[STEP + j])
            q = zero if q < zero else q  # NaN stays: it wins nowhere
            q = top if q > top else q
            c[i * TILE + j] = q
            wq = ws[i * TILE + j] * q
            v[A + j] += wq
            v[B + j] += wq * q
            v[P + j] += wq * xv


@compiled
def _least_squares(v: Floats) -> None:
    """Best scale and offset for the levels; an error of NaN where there is none."""
    zero = F(0)
    for j in range(TILE):
        a, b, p = v[A + j], v[B + j], v[P + j]
        sum_w, sum_wx = v[SUM_W + j], v[SUM_WX + j]
        d = sum_w * b - a * a
        offset = (b * sum_wx - a * p) / d
        v[NEW_SCALE + j] = p / b if offset > zero else (sum_w * p - sum_wx * a) / d
        v[NEW_OFFSET + j] = zero if offset > zero else offset
        v[ERROR + j] = zero if d > zero else F(np.nan)


@compiled
def _errors(xs: Floats, ws: Floats, c: Floats, v: Floats, absolute: bool) -> None:
    for i in range(len(xs) // TILE):
        for j in range(TILE):
            far = v[NEW_SCALE + j] * c[i * TILE + j] + v[NEW_OFFSET + j] - xs[i * TILE + j]
            v[ERROR + j] += (abs(far) if absolute else far * far) * ws[i * TILE + j]


@compiled
def _signed_levels(xs: Floats, ws: Floats, c: Floats, v: Floats, half: np.float32) -> None:
    """Nearest levels on the grid, and their sums."""
    zero, lowest, highest = F(0), -half, half - F(1)
    for j in range(TILE):
        v[P + j] = v[B + j] = zero
    for i in range(len(xs) // TILE):
        for j in range(TILE):
            xv, wv = xs[i * TILE + j], ws[i * TILE + j]
            q = np.rint(xv * v[STEP + j])
            q = lowest if q < lowest else q
            q = highest if q > highest else q
            c[i * TILE + j] = q
            v[P + j] += (wv * xv) * q
            v[B + j] += (wv * q) * q
