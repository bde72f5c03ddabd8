"""What IQ4_NL and IQ4_XS share: sixteen values, denser near zero, and the search for a scale.

    x ~ s * VALUES[i]

minimizing sum w*(s*VALUES[i] - x)**2 over fifteen scales that put the largest weight near the
lowest value, and one that puts it beyond the highest.

The nearest value is looked up: all boundaries between values are multiples of 1/2, so twice a
number, rounded down, says on which side of each it is. Rounding and order are those of ggml, see
`search.py`.

Source: ggml `kvalues_iq4nl`, `best_index_int8` and `quantize_row_iq4_nl_impl`.
"""

import numpy as np
import numpy.typing as npt
import torch

from zquant.quant.columns import Vector, column_products, to_columns
from zquant.quant.importance import qblock_costs
from zquant.quant.search import TINY, signed_max

__all__ = ["look_up", "nearest", "search_values"]

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
STEPS = range(-7, 8)
SUBBLOCK = 32  # weights that share a scale
ORIGIN = 256  # where 0 is in the tables, which go from -128 to 127.5 in steps of 1/2


def _tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Index and value of the nearest, the upper one halfway, for every multiple of 1/2."""
    values = torch.tensor(VALUES)
    boundaries = values[1:] + values[:-1]  # doubled
    index = torch.searchsorted(boundaries, torch.arange(-ORIGIN, ORIGIN), right=True)
    return index.to(torch.uint8), values.float()[index]


NEAREST_INDEX, NEAREST_VALUE = _tables()


def look_up(q: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write the values of indices q, uint8 0..15, to float32 `out` of the same size."""
    values = torch.tensor(VALUES, dtype=torch.float32, device=q.device)
    torch.index_select(values, 0, q.view(-1).int(), out=out.view(-1))
    return out


def nearest(x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Indices of the values nearest to `x * inverse`, uint8; x `[G, m, n]`, inverse `[G, n]`."""
    places = _places(x, inverse, torch.empty_like(x))
    return torch.index_select(NEAREST_INDEX, 0, places).view(x.shape)


def _places(x: torch.Tensor, inverse: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Where `x * inverse` is in the tables, int32, flat."""
    torch.mul(x, (2 * inverse).unsqueeze(-2), out=scratch).floor_().add_(ORIGIN)
    # limited before the conversion, and after it for NaN, which may become any integer
    places = scratch.clamp_(0, 2 * ORIGIN - 1).to(torch.int32).clamp_(0, 2 * ORIGIN - 1)
    return places.view(-1)


def search_values(
    weights: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None, qblock: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of float32 `[N, K]`, contiguous, n qblocks.

    Args:
        weights: what is stored.
        importance: float32 `[K]`, or None: the square of each weight is its error weight.
        qblock: 32 or 256 weights, whose mean square the costs of importance use.

    Returns:
        the weights in columns `[qblock/32, 32, n]`, and s `[qblock/32, n]` (0 for zeros).
    """
    x = to_columns(weights, SUBBLOCK, qblock)
    w = x * x if importance is None else qblock_costs(x, importance, qblock, factor=2)
    largest = signed_max(x)
    dead = np.abs(largest) < TINY
    largest[dead] = 1
    scale = _best_scale(x, w, largest)
    scale[dead] = 0
    return x, torch.from_numpy(scale)


def _best_scale(x: torch.Tensor, w: torch.Tensor, largest: Vector) -> Vector:
    """Scale of every group of `x [G, 32, n]`, whose number of largest magnitude is not 0."""
    fitted, scratch = torch.empty_like(x), torch.empty_like(x)

    def trial(inverse: Vector) -> tuple[Vector, Vector]:
        """Sums of w*v*x and w*v*v for the values v nearest to x * inverse."""
        places = _places(x, torch.from_numpy(inverse), scratch)
        torch.index_select(NEAREST_VALUE, 0, places, out=fitted.view(-1))
        wv = torch.mul(w, fitted, out=scratch)
        return column_products(wv, x), column_products(wv, fitted)

    lowest = np.float32(VALUES[0])
    with np.errstate(all="ignore"):
        scale = -largest / lowest
        p, q = trial(1 / scale)
        # without any cost ggml divides 0 by 0; the first scale is a good one
        scale = np.where(q > 0, p / q, scale)
        best = scale * p
        for k in STEPS:
            p, q = trial((np.float32(k) + lowest) / largest)
            better = (q > 0) & (p * p > best * q)
            new = p / q
            scale, best = np.where(better, new, scale), np.where(better, new * p, best)
    return scale
