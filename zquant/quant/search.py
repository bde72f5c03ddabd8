"""The two searches behind ggml's K types: which scale (and offset) fits a group of weights best.

Both try a short list of candidate grids per group and keep the one of least weighted error:

    search_offset   x ~ s*L + o   L in 0..N, o <= 0    Q4_K, Q5_K
    search_signed   x ~ s*l       l in -N..N-1         Q6_K

The result must equal ggml's byte for byte, so every operation is one fp32 rounding in ggml's order
and sums run strictly in index order. Groups lie in columns: element i of all groups is row i of
`x [n, S]`, so elementwise work is one long pass and NumPy's reduction over the outer axis adds the
rows one after another. Sums of products are `einsum`'s, which writes no products to memory, where
it rounds each product as ggml does. Torch does the long elementwise passes because its vector loops
are faster than NumPy's; its sum (another order), square root (not correctly rounded) and
`scalar / tensor` (a reciprocal and a product) would change bytes, so sums and numbers per group are
NumPy's.

The error weights are an argument: importance-weighted types need another `w`, not another search.

Source: ggml `make_qkx2_quants` and `make_qx_quants`.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

__all__ = [
    "MIN_GROUPS",
    "TINY",
    "OffsetGrid",
    "column_sums",
    "search_offset",
    "search_signed",
]

Vector = npt.NDArray[np.float32]  # one number per group
Mask = npt.NDArray[np.bool_]

MIN_GROUPS = 2  # of one column NumPy makes a contiguous vector and adds it pairwise
TINY = 1e-15  # ggml's GROUP_MAX_EPS: a group below it is stored as zeros
SIGNED_STEPS = [k for k in range(-9, 10) if k != 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class OffsetGrid:
    """Candidates of `search_offset`: levels 0..top, grid k spans top + first + step*k steps."""

    top: int
    first: float
    step: float
    last_k: int

    def steps(self) -> list[np.float32]:
        """Steps that each candidate grid spans, rounded as ggml rounds them."""
        first, step, top = np.float32(self.first), np.float32(self.step), np.float32(self.top)
        return [first + step * np.float32(k) + top for k in range(self.last_k + 1)]


def column_sums(a: torch.Tensor) -> Vector:
    """Sums over the rows of float32 `a [n, S]`, CPU, contiguous, added in row order; S > 1."""
    assert a.shape[1] >= MIN_GROUPS
    sums: Vector = np.add.reduce(a.numpy(), axis=0)
    return sums


def _einsum_rounds_products() -> bool:
    """Whether NumPy's einsum multiplies, rounds and then adds, as an x86-64 build does.

    A build for a processor with fused multiply-add may skip the rounding, which changes bytes.
    """
    a = np.full((2, 67), 1 + 2.0**-12, np.float32)  # 67: vector loop and remainder
    b = a.copy()
    a[0], b[0] = -(1 + 2.0**-11), 1  # the rounded square of 1 + 2**-12, negative
    ones = np.ones_like(a)
    return not (np.einsum("ij,ij->j", a, b).any() or np.einsum("ij,ij,ij->j", a, b, ones).any())


EINSUM_IS_EXACT = _einsum_rounds_products()


def column_products(*factors: torch.Tensor) -> Vector:
    """Sums over the rows of the product of float32 `[n, S]` factors, left to right; S > 1."""
    arrays = [factor.numpy() for factor in factors]
    assert arrays[0].shape[1] >= MIN_GROUPS
    if EINSUM_IS_EXACT:
        sums: Vector = np.einsum(",".join(["ij"] * len(arrays)) + "->j", *arrays)
        return sums
    product = factors[0] * factors[1]
    for factor in factors[2:]:
        product.mul_(factor)
    return column_sums(product)


def search_offset(
    x: torch.Tensor, w: torch.Tensor, grid: OffsetGrid, *, keep_levels: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Fit `x ~ s*L - mu` per column, minimizing sum w*(s*L - mu - x)**2.

    Args:
        x: float32 `[n, S]`, CPU, contiguous, S > 1: one group per column.
        w: error weights, as `x`.
        grid: the candidates.
        keep_levels: also return the levels L of the best fit.

    Returns:
        s `[S]`, mu `[S]` (>= 0) and L `[n, S]` or None.
    """
    with np.errstate(all="ignore"):  # groups without a fit give NaN, which never wins
        lo, hi = np.minimum(x.amin(dim=0).numpy(), 0), x.amax(dim=0).numpy()
        flat = hi == lo
        span = np.where(flat, np.float32(1), hi - lo)  # a flat group gets level 0 everywhere
        fit = _OffsetFit(x, w)
        t = np.float32(grid.top) / span
        scale, offset = 1 / t, lo
        c = fit.round_levels(offset, t, grid.top)
        levels = c.clone() if keep_levels else None
        error = fit.error(scale, offset)
        for steps in grid.steps():
            c = fit.round_levels(offset, steps / (hi - offset), grid.top)
            kept = c.clone() if levels is not None else None
            new_scale, new_offset, valid = fit.least_squares()
            new_error = fit.error(new_scale, new_offset)
            better = valid & (new_error < error)
            np.copyto(scale, new_scale, where=better)
            np.copyto(offset, new_offset, where=better)
            np.copyto(error, new_error, where=better)
            if levels is not None and kept is not None:
                levels = torch.where(torch.from_numpy(better), kept, levels)
    scale[flat] = 0
    return torch.from_numpy(scale), torch.from_numpy(-offset), levels


class _OffsetFit:
    """Scratch and constant sums of one `search_offset`; `c` holds the levels under trial."""

    def __init__(self, x: torch.Tensor, w: torch.Tensor) -> None:
        self.x, self.w = x, w
        self.c = torch.empty_like(x)
        self.sum_w, self.sum_wx = column_sums(w), column_products(w, x)

    def round_levels(self, offset: Vector, t: Vector, top: int) -> torch.Tensor:
        """Nearest levels of every weight on the grid that starts at `offset`."""
        torch.sub(self.x, torch.from_numpy(offset), out=self.c)
        return self.c.mul_(torch.from_numpy(t)).round_().clamp_(0, top)

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
            np.copyto(offset, 0, where=above)
            np.copyto(scale, x / b, where=above)
        return scale, offset, d > 0

    def error(self, scale: Vector, offset: Vector) -> Vector:
        """Weighted squared error of the levels in `c`, which it overwrites."""
        r = self.c.mul_(torch.from_numpy(scale)).add_(torch.from_numpy(offset)).sub_(self.x)
        return column_products(r, r, self.w)


def search_signed(
    x: torch.Tensor, w: torch.Tensor, half: int, *, keep_levels: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fit `x ~ s*l` per column with l in -half..half-1, minimizing sum w*(s*l - x)**2.

    Args:
        x: float32 `[n, S]`, CPU, contiguous, S > 1: one group per column.
        w: error weights, as `x`.
        half: half of the number of levels.
        keep_levels: also return l + half.

    Returns:
        s `[S]` (0 for a group of zeros) and l + half `[n, S]` or None.
    """
    largest = _signed_max(x)
    dead = np.abs(largest) < TINY
    largest[dead] = 1
    wx = w * x
    c = torch.empty_like(x)

    def trial(k: int) -> tuple[Vector, Vector]:
        """Leaves the levels of grid k in `c`; their sums of w*x*l and w*l*l."""
        steps = -(np.float32(half) + np.float32(0.1) * np.float32(k))
        torch.mul(x, torch.from_numpy(steps / largest), out=c).round_().clamp_(-half, half - 1)
        return column_products(wx, c), column_products(w, c, c)

    with np.errstate(all="ignore"):
        p, q = trial(0)
        scale = np.where(q == 0, np.float32(0), p / q)
        best = scale * p
        levels = c.clone() if keep_levels else None
        for k in SIGNED_STEPS:
            p, q = trial(k)
            better = (p * p > best * q) & (q > 0)
            new_scale = p / q
            np.copyto(scale, new_scale, where=better)
            np.copyto(best, new_scale * p, where=better)
            if levels is not None:
                levels = torch.where(torch.from_numpy(better), c, levels)
    scale[dead] = 0
    if levels is not None:
        levels = levels.add_(half).masked_fill_(torch.from_numpy(dead), 0)
    return torch.from_numpy(scale), levels


def _signed_max(x: torch.Tensor) -> Vector:
    """The element of largest magnitude per column of `x [n, S]`, with its sign; first on ties."""
    lo, hi = x.amin(dim=0).numpy(), x.amax(dim=0).numpy()
    largest = np.where(hi > -lo, hi, lo)
    (tied,) = np.nonzero(hi == -lo)
    if tied.size:
        columns = x.numpy()[:, tied]
        first = np.abs(columns).argmax(axis=0)
        largest[tied] = columns[first, np.arange(tied.size)]
    return largest
