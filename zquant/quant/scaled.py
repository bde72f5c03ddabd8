"""Decode weights whose scale lies in another tensor, and which may be stored rotated.

    w[n, k] = scale[n] * sum_j q[n, j] * H[j, k]     the sum over the rotation group of k

H is the regular Hadamard matrix, orthonormal and symmetric: Kronecker powers of the 4 x 4 matrix
whose rows are 1, but for -1 on the other diagonal, divided by the root of the group. The sum is
taken of int8 numbers before the scale, where it is exact: one rounding is left, whatever the order.

Source: ConvRot as in comfy-kitchen's `int8_tensorwise` layout.
"""

import functools
import math
from dataclasses import dataclass

import torch

from zquant.quant.codec import dequantize
from zquant.quant.qtypes import QType

__all__ = ["Scaling", "dequantize_scaled"]

CHUNK = 1 << 20  # weights at a time: two float32 temporaries of this many


@dataclass(frozen=True, slots=True)
class Scaling:
    """What decoded rows still need.

    Attributes:
        factors: float32 `[1]`, or `[N]` for one per row.
        rotation: size of the groups of columns that are stored rotated, a power of 4; 0 is none.
    """

    factors: torch.Tensor
    rotation: int = 0

    def to(self, device: torch.device | str) -> "Scaling":
        """The same on `device`."""
        return Scaling(self.factors.to(device), self.rotation)

    def of(self, rows: slice | torch.Tensor) -> "Scaling":
        """That of some of the rows: a slice, or int64 indices on the same device."""
        return self if len(self.factors) == 1 else Scaling(self.factors[rows], self.rotation)


def dequantize_scaled(
    packed: torch.Tensor,
    qtype: QType,
    dtype: torch.dtype,
    scaling: Scaling | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`zquant.quant.codec.dequantize`, then rotated back and scaled in float32, rounded once.

    Args:
        packed: uint8 `[N, row_bytes]`.
        qtype: storage type.
        dtype: float32, float16 or bfloat16.
        scaling: of these rows, on the device of `packed`; None changes nothing.
        out: contiguous `[N, K]` of `dtype`, written and returned.

    Returns:
        `[N, K]` of `dtype` on the device of `packed`.

    Raises:
        ValueError: as `dequantize`.
    """
    if scaling is None:
        return dequantize(packed, qtype, dtype, out=out)
    n_columns = packed.shape[1] // qtype.qblock_bytes * qtype.qblock
    if out is None:
        out = torch.empty(len(packed), n_columns, dtype=dtype, device=packed.device)
    step = max(1, CHUNK // max(1, n_columns))
    for first in range(0, len(packed), step):
        rows = slice(first, first + step)
        weights = dequantize(packed[rows], qtype, torch.float32)
        factors = scaling.of(rows).factors
        if scaling.rotation:
            signs = _signs(scaling.rotation, packed.device)
            weights = (weights.view(-1, scaling.rotation) @ signs).view_as(weights)
            factors = factors / math.sqrt(scaling.rotation)
        out[rows] = weights.mul_(factors[:, None])
    return out


@functools.cache
def _signs(group: int, device: torch.device) -> torch.Tensor:
    """The Hadamard matrix times the root of `group`: float32 `[group, group]` of 1 and -1."""
    seed = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    matrix = torch.ones(1, 1)
    while len(matrix) < group:
        matrix = torch.kron(matrix, seed)
    return matrix.to(device)
