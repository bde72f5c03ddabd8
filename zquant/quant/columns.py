"""Weights in columns, where sums run in ggml's order and long passes stay long.

    x [G, m, n]      x[g, e, i] is weight e of group g of qblock i; G groups of m weights

Everything that is done to each weight is one pass over contiguous memory, a number per group is
broadcast along it, and sums over e add one row of n numbers after another: strictly in index order,
as ggml does. NumPy adds rows in that order, and `einsum` multiplies and adds without writing the
products to memory, rounding each product as ggml does. Torch's sum has another order.
"""

import numpy as np
import numpy.typing as npt
import torch

__all__ = [
    "MIN_COLUMNS",
    "QBLOCK",
    "Vector",
    "column_products",
    "column_sums",
    "from_columns",
    "scale_and_shift",
    "to_columns",
]

Vector = npt.NDArray[np.float32]  # one number per group

QBLOCK = 256  # weights per qblock of every K type and IQ4_XS
MIN_COLUMNS = 2  # of one column NumPy makes a contiguous vector and adds it pairwise


def to_columns(weights: npt.NDArray[np.float32], group: int, qblock: int = QBLOCK) -> torch.Tensor:
    """Float32 `[N, K]`, K a multiple of `qblock`, as `[qblock/group, group, n]`, a copy.

    n is the number of qblocks, but at least 2: a lone qblock is doubled, which `from_columns`
    undoes.
    """
    qblocks = torch.from_numpy(weights).reshape(-1, qblock)
    if len(qblocks) < MIN_COLUMNS:
        qblocks = qblocks.repeat(MIN_COLUMNS, 1)
    return qblocks.t().contiguous().view(-1, group, len(qblocks))


def from_columns(
    fields: list[torch.Tensor], weights: npt.NDArray[np.float32], qblock: int = QBLOCK
) -> npt.NDArray[np.uint8]:
    """Byte rows of qblocks, uint8 `[.., n]` each, as what is stored for `weights`."""
    qblocks = torch.cat([field.reshape(-1, field.shape[-1]) for field in fields]).t().contiguous()
    packed: npt.NDArray[np.uint8] = qblocks[: weights.size // qblock].numpy()
    return packed.reshape(len(weights), -1)


def column_sums(a: torch.Tensor) -> Vector:
    """Sums over the rows of float32 `a [..., m, n]`, CPU, contiguous, in row order; n > 1."""
    assert a.shape[-1] >= MIN_COLUMNS
    sums: Vector = np.add.reduce(a.numpy(), axis=-2)
    return sums


def _rounded_products() -> tuple[bool, bool]:
    """Whether NumPy's einsum and torch's addcmul multiply, round and then add.

    They do in x86-64 builds; one for a processor with fused multiply-add may skip the rounding.
    """
    a = np.full((2, 67), 1 + 2.0**-12, np.float32)  # 67: vector loop and remainder
    b = a.copy()
    a[0], b[0] = -(1 + 2.0**-11), 1  # the rounded square of 1 + 2**-12, negative
    ones = np.ones_like(a)
    einsum = np.einsum("ij,ij->j", a, b).any() or np.einsum("ij,ij,ij->j", a, b, ones).any()
    addcmul = torch.addcmul(*map(torch.from_numpy, (a[0], a[1], b[1]))).any()
    return not einsum, not addcmul


EINSUM_IS_EXACT, ADDCMUL_IS_EXACT = _rounded_products()


def scale_and_shift(c: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """`c * scale + offset` in place, both operations rounded; scale, offset `[..., 1, n]`."""
    if ADDCMUL_IS_EXACT:
        return torch.addcmul(offset, c, scale, out=c)
    return c.mul_(scale).add_(offset)


def column_products(*factors: torch.Tensor) -> Vector:
    """Sums over the rows of the product of `[..., m, n]` factors, left to right; n > 1."""
    arrays = [factor.numpy() for factor in factors]
    assert arrays[0].shape[-1] >= MIN_COLUMNS
    if EINSUM_IS_EXACT:
        sums: Vector = np.einsum(",".join(["...ij"] * len(arrays)) + "->...j", *arrays)
        return sums
    product = factors[0] * factors[1]
    for factor in factors[2:]:
        product.mul_(factor)
    return column_sums(product)
