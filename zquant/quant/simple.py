"""What the 32-weight types Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL and Q8_0 share: levels and their bits.

    qs[16]   low nibble of qs[e] for e < 16, high nibble of qs[e-16] otherwise
    qh[4]    bit e is the fifth bit of level e

Source: ggml `quantize_row_q4_0_ref`, `quantize_row_q4_0_impl` and their siblings.
"""

import numpy as np
import numpy.typing as npt
import torch

from zquant.quant.columns import to_columns
from zquant.quant.importance import row_costs
from zquant.quant.search import importance_grid, search_offset, search_signed

__all__ = [
    "add_fifth_bits",
    "fifth_bits",
    "inverse",
    "join_nibbles",
    "offset_levels",
    "signed_levels",
    "split_nibbles",
]


QBLOCK = 32  # weights that share a scale


def inverse(d: torch.Tensor) -> torch.Tensor:
    """1/d, and 0 where d is 0; one rounding."""
    return torch.div(torch.tensor(1.0), d).masked_fill_(d == 0, 0)


def signed_levels(
    weights: npt.NDArray[np.float32], half: int, importance: npt.NDArray[np.float32] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and levels of a symmetric type with levels 0..2*half-1, `half` meaning 0.

    Without importance the weight of largest magnitude is stored exactly as level 0, so the scale
    carries its sign.

    Args:
        weights: float32 `[N, K]`, contiguous, n qblocks of 32.
        half: 8 for four bits, 16 for five.
        importance: float32 `[K]`, or None.

    Returns:
        d, float32 `[n, 1]`, and q, uint8 `[n, 32]`.
    """
    if importance is not None:
        x = to_columns(weights, QBLOCK, QBLOCK)
        costs = row_costs(x, importance, QBLOCK, weights)
        scale, levels = search_signed(x, costs, half, keep_levels=True)
        assert levels is not None
        return _by_qblock(scale, weights), _by_qblock(levels[0].to(torch.uint8), weights)
    qblocks = torch.from_numpy(weights).reshape(-1, QBLOCK)
    lo, hi = qblocks.amin(dim=1, keepdim=True), qblocks.amax(dim=1, keepdim=True)
    largest = torch.where(hi > -lo, hi, lo)
    tied = torch.nonzero((hi == -lo).flatten()).flatten()
    if tied.numel():  # the first of equal magnitudes decides the sign
        rows = qblocks[tied]
        largest[tied] = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    # ggml's largest starts as +0; the sum turns a -0 that came first into that
    d = torch.div(largest + 0.0, torch.tensor(-float(half)))
    q = (qblocks * inverse(d)).add_(half + 0.5)
    return d, q.to(torch.uint8).clamp_(max=2 * half - 1)


def offset_levels(
    weights: npt.NDArray[np.float32], top: int, importance: npt.NDArray[np.float32] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale, minimum and levels of a type with levels 0..top.

    Without importance the levels start at the smallest weight and end at the largest.

    Args:
        weights: float32 `[N, K]`, contiguous, n qblocks of 32.
        top: 15 for four bits, 31 for five.
        importance: float32 `[K]`, or None.

    Returns:
        d and m, float32 `[n, 1]`, and q, uint8 `[n, 32]`.
    """
    if importance is not None:
        x = to_columns(weights, QBLOCK, QBLOCK)
        costs = row_costs(x, importance, QBLOCK, weights)
        scale, minimum, levels = search_offset(x, costs, importance_grid(top), keep_levels=True)
        assert levels is not None
        d, m = _by_qblock(scale, weights), _by_qblock(-minimum, weights)
        return d, m, _by_qblock(levels[0].to(torch.uint8), weights)
    qblocks = torch.from_numpy(weights).reshape(-1, QBLOCK)
    lo, hi = qblocks.amin(dim=1, keepdim=True), qblocks.amax(dim=1, keepdim=True)
    zero = torch.nonzero((lo == 0).flatten()).flatten()
    if zero.numel():  # the first of several zeros decides the sign of the minimum
        rows = qblocks[zero]
        lo[zero] = rows.gather(1, (rows == 0).to(torch.uint8).argmax(dim=1, keepdim=True))
    d = torch.div(hi - lo, torch.tensor(float(top)))
    q = (qblocks - lo).mul_(inverse(d)).add_(0.5)
    return d, lo, q.to(torch.uint8).clamp_(max=top)


def _by_qblock(columns: torch.Tensor, weights: npt.NDArray[np.float32]) -> torch.Tensor:
    """Columns `[m, n']` as rows, `[n, m]`, without the double of a lone qblock."""
    return columns.t()[: weights.size // QBLOCK].contiguous()


def join_nibbles(q: torch.Tensor) -> torch.Tensor:
    """The low four bits of levels, uint8 `[..., 32]`, as qs `[..., 16]`."""
    return (q[..., 16:] << 4).bitwise_or_(q[..., :16] & 15)


def split_nibbles(qs: torch.Tensor) -> torch.Tensor:
    """The low four bits of levels, uint8 `[..., 32]`, from qs `[..., 16]`."""
    q = torch.empty(*qs.shape[:-1], 32, dtype=torch.uint8, device=qs.device)
    torch.bitwise_and(qs, 15, out=q[..., :16])
    torch.bitwise_right_shift(qs, 4, out=q[..., 16:])
    return q


def fifth_bits(q: torch.Tensor) -> torch.Tensor:
    """The fifth bits of levels, uint8 `[n, 32]` on the CPU, as qh `[n, 4]`."""
    return torch.from_numpy(np.packbits((q > 15).numpy(), axis=1, bitorder="little"))


def add_fifth_bits(q: torch.Tensor, qh: torch.Tensor) -> torch.Tensor:
    """Add the bits of qh, uint8 `[n, 4]`, to levels `[n, 32]`, in place."""
    bits = torch.arange(8, dtype=torch.uint8, device=q.device)
    fifth = (qh[:, :, None] >> bits).bitwise_and_(1).bitwise_left_shift_(4)  # [n, 4, 8]
    return q.bitwise_or_(fifth.view(-1, 32))
