"""Scales found by sweeping over the levels, one at a time, as long as the fit improves.

    search_positive  x ~ s*l   x >= 0, l in 0..N    scales and minimums of K types, by importance
    search_swept     x ~ s*l   l in -N..N-1         Q3_K

For given levels the best scale is s = P/Q, P = sum w*x*l, Q = sum w*l*l, and the error falls as
P*P/Q grows. A sweep visits the weights in order; each takes the level that the others' scale asks
for if P*P/Q grows by it. Columns that a sweep left alone are done.

Rounding and order are those of ggml, see `search.py`.

Source: ggml `make_qp_quants` and `make_q3_quants`.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from zquant.quant.columns import Vector, column_products
from zquant.quant.search import TINY, signed_max

__all__ = ["search_positive", "search_swept"]

POSITIVE_STEPS = [k for k in range(-4, 5) if k != 0]
SWEEPS = 5


def search_positive(x: torch.Tensor, w: torch.Tensor, top: int) -> tuple[Vector, torch.Tensor]:
    """Fit `x ~ s*l` per column with l in 0..top, minimizing sum w*(s*l - x)**2.

    Args:
        x: float32 `[m, n]`, CPU, contiguous, n > 1, not negative.
        w: error weights, as `x`.
        top: largest level.

    Returns:
        s `[n]` (0 for a column of zeros) and l, uint8 `[m, n]`.
    """
    largest = x.amax(dim=0).numpy()
    dead = largest < TINY
    largest = np.where(dead, np.float32(1), largest)

    def error(t: Vector) -> Vector:
        """Weighted squared error of the grid with t levels per unit."""
        levels = torch.mul(x, torch.from_numpy(t)).round_().clamp_(max=top)
        rest = x - levels.mul_(torch.from_numpy(1 / t))
        return column_products(rest * w, rest)

    with np.errstate(all="ignore"):
        best = np.float32(top) / largest
        least = error(best)
        for k in POSITIVE_STEPS:
            t = (np.float32(0.1) * np.float32(k) + np.float32(top)) / largest
            new = error(t)
            better = new < least
            best, least = np.where(better, t, best), np.where(better, new, least)
        levels = torch.mul(x, torch.from_numpy(best)).round_().clamp_(0, top)
        fit = _Fit.of(x, w, levels)
        fit.sweep(0, top)
        scale = np.where(fit.q > 0, fit.p / fit.q, np.float32(0))
    scale[dead] = 0
    levels = torch.from_numpy(fit.levels).masked_fill_(torch.from_numpy(dead), 0)
    return scale, levels.to(torch.uint8)


def search_swept(x: torch.Tensor, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit `x ~ s*l` per column with l in -half..half-1, minimizing sum x**2 * (s*l - x)**2.

    Args:
        x: float32 `[G, m, n]`, CPU, contiguous, n > 1: one group per column.
        half: half of the number of levels.

    Returns:
        s `[G, n]` (0 for a group of zeros) and l + half, uint8 `[G, m, n]`.
    """
    n_groups, _, count = x.shape
    columns = x.transpose(0, 1).reshape(x.shape[1], -1)
    largest = signed_max(columns)
    dead = np.abs(largest) < TINY
    largest[dead] = 1
    with np.errstate(all="ignore"):
        t = torch.from_numpy(np.float32(-half) / largest)
        levels = torch.mul(columns, t).round_().clamp_(-half, half - 1)
        fit = _Fit.of(columns, columns * columns, levels)
        fit.sweep(-half, half - 1)
        scale = np.where(fit.q > 0, fit.p / fit.q, np.float32(0))
    scale[dead] = 0
    levels = torch.from_numpy(fit.levels).add_(half).masked_fill_(torch.from_numpy(dead), 0)
    by_group = levels.view(-1, n_groups, count).transpose(0, 1)
    scales = torch.from_numpy(scale.astype(np.float32)).view(n_groups, count)
    return scales, by_group.to(torch.uint8).contiguous()


@dataclass(slots=True, kw_only=True)
class _Fit:
    """Levels of n columns and their sums P and Q, which `sweep` improves."""

    x: Vector  # [m, n]
    w: Vector  # [m, n]
    wx: Vector  # [m, n]
    levels: Vector  # [m, n], whole numbers
    p: Vector  # [n]
    q: Vector  # [n]

    @classmethod
    def of(cls, x: torch.Tensor, w: torch.Tensor, levels: torch.Tensor) -> "_Fit":
        """The fit of given levels."""
        wx = w * x
        p, q = column_products(wx, levels), column_products(w, levels, levels)
        return cls(x=x.numpy(), w=w.numpy(), wx=wx.numpy(), levels=levels.numpy(), p=p, q=q)

    def sweep(self, lowest: int, highest: int) -> None:
        """Sweep until no level changes, at most five times."""
        active, part = np.arange(len(self.p)), self
        for _ in range(SWEEPS):
            changed = np.zeros(len(part.p), np.bool_)
            for i in range(len(part.x)):
                changed |= part._visit(i, lowest, highest)
            if part is not self:
                self.levels[:, active] = part.levels
                self.p[active], self.q[active] = part.p, part.q
            kept = np.flatnonzero(changed)
            if not kept.size:
                return
            active, part = active[kept], part._take(kept)

    def _take(self, kept: npt.NDArray[np.intp]) -> "_Fit":
        """A copy of some columns."""
        rows = {name: getattr(self, name)[:, kept] for name in ("x", "w", "wx", "levels")}
        return _Fit(p=self.p[kept], q=self.q[kept], **rows)

    def _visit(self, i: int, lowest: int, highest: int) -> npt.NDArray[np.bool_]:
        """Improve the levels of row i; where they changed."""
        x, w, wx, old = self.x[i], self.w[i], self.wx[i], self.levels[i]
        p, q = self.p - wx * old, self.q - w * old * old
        new = np.rint(x * q / p)
        np.clip(new, lowest, highest, out=new)
        better: npt.NDArray[np.bool_] = (p > 0) & (new != old)
        p += wx * new
        q += w * new * new
        better &= (q > 0) & (p * p * self.q > self.p * self.p * q)
        np.copyto(old, new, where=better)
        np.copyto(self.p, p, where=better)
        np.copyto(self.q, q, where=better)
        return better
