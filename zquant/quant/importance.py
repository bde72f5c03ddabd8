"""Error weights from importance: what an error of each weight costs.

    cost[e] = importance[c] * sqrt(v + x[e]**2)       c = input channel of weight e

v is the mean square of the weights around e, so that small weights count too: of the qblock for
K types and IQ4, of the row for the other 32-weight types, some of them times 2. Layout as in
`columns.py`; every operation is rounded as ggml rounds it.

Where the importance of all weights that share a scale is 0, errors there cost nothing, and every
type does what ggml does: Q4_1 and Q5_1 keep the plain grid from the smallest to the largest weight,
Q4_0, Q5_0 and K types store zeros. IQ4 types, for which ggml would store NaN, keep the scale that
puts the largest weight just beyond the last value.

Source: ggml `quantize_row_q4_K_impl`, `quantize_row_q4_0_impl` and their siblings.
"""

import numpy as np
import numpy.typing as npt
import torch

from zquant.quant.columns import Vector, column_products

__all__ = ["importance_along", "qblock_costs", "row_costs"]


def importance_along(x: torch.Tensor, importance: Vector, qblock: int) -> torch.Tensor:
    """Importance of every weight of `x [G, m, n]`, float32 of the same shape.

    Args:
        x: columns of whole rows, from `to_columns`.
        importance: float32 `[K]`, one number per input channel.
        qblock: weights per column.
    """
    channels = _per_qblock(importance, qblock)
    return channels.repeat(1, x.shape[-1] // channels.shape[1]).view_as(x)


def qblock_costs(
    x: torch.Tensor, importance: Vector, qblock: int, *, factor: float
) -> torch.Tensor:
    """Costs with v = `factor` times the mean square of each qblock; arguments as above."""
    flat = x.view(qblock, -1)
    v = column_products(flat, flat) * np.float32(factor / qblock)
    return _costs(x, importance, qblock, v)


def row_costs(
    x: torch.Tensor, importance: Vector, qblock: int, weights: npt.NDArray[np.float32]
) -> torch.Tensor:
    """Costs with v = the mean square of each row of `weights [N, K]`, which `x` shows."""
    n_rows, n_columns = weights.shape
    rows = torch.from_numpy(weights).t().contiguous()
    if n_rows == 1:  # a lone column would be summed pairwise
        rows = rows.repeat(1, 2)
    v = column_products(rows, rows)[:n_rows] / np.float32(n_columns)
    return _costs(x, importance, qblock, np.resize(v.repeat(n_columns // qblock), x.shape[-1]))


def _costs(x: torch.Tensor, importance: Vector, qblock: int, v: Vector) -> torch.Tensor:
    costs = (x * x).add_(torch.from_numpy(v))
    np.sqrt(costs.numpy(), out=costs.numpy())
    channels = _per_qblock(importance, qblock)
    costs.view(qblock, -1, channels.shape[1]).mul_(channels[:, None])
    return costs


def _per_qblock(importance: Vector, qblock: int) -> torch.Tensor:
    """Importance as columns of one row, float32 `[qblock, K/qblock]`."""
    return torch.from_numpy(importance).view(-1, qblock).t().contiguous()
