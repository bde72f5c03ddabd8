"""Linear layers whose weight stays as it is stored until the moment it is multiplied.

    out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]

`QuantLinear` keeps the packed bytes of any qtype. On the CPU it expands a slab of rows that fits
the cache, multiplies, and reuses the buffer; elsewhere it expands the whole weight, in halves when
that is float32. Tokens that come quantized are multiplied by the weight in int8. Where the bytes
lie changes no bit of a product: a weight that is stored expanded is multiplied in the same slabs.
"""

import torch
from torch import Tensor, nn
from zquant_kernels.dequant_float import CHUNK
from zquant_kernels.dequant_int8 import dequant_int8, row_scales
from zquant_kernels.dequantize import QTYPES as INT8_SOURCES
from zquant_kernels.matmul_int8 import matmul_int8

from zquant.layers.compute import QuantTokens, Tokens
from zquant.quant.floats import FLOAT_DTYPES
from zquant.quant.qtypes import QTYPES, QType
from zquant.quant.scaled import Scaling, dequantize_scaled

__all__ = ["QuantEmbedding", "QuantLinear", "quant_matmul", "slab_rows"]

SLAB_WEIGHTS = 2**22  # weights expanded at a time on a CPU: 16 MiB of float32, half of a small L3


def quant_matmul(
    x: Tensor,
    packed: Tensor,
    qtype: QType,
    out: Tensor | None = None,
    scaling: Scaling | None = None,
) -> Tensor:
    """`x @ weight.T` with `weight` expanded from `packed` to the dtype of `x`.

    Args:
        x: floating `[M, K]`.
        packed: uint8 `[N, row_bytes]` of `qtype`, on the device of `x`.
        qtype: how the rows are stored.
        out: `[M, N]` in the dtype of `x`, columns contiguous, written and returned.
        scaling: of the rows, on the device of `x`.

    Returns:
        `[M, N]` in the dtype of `x`.
    """
    n_rows, n_columns = len(packed), x.shape[1]
    out = x.new_empty(len(x), n_rows) if out is None else out
    ready = scaling is None and FLOAT_DTYPES.get(qtype.name) == x.dtype
    slab = slab_rows(n_rows, n_columns, x.dtype, x.device)
    scratch = None if ready else x.new_empty(slab, n_columns)
    for start in range(0, n_rows, slab):
        rows = packed[start : start + slab]
        if scratch is None:
            weight = rows.view(x.dtype)
        else:
            part = scaling and scaling.of(slice(start, start + slab))
            weight = dequantize_scaled(rows, qtype, x.dtype, part, out=scratch[: len(rows)])
        torch.mm(x, weight.t(), out=out[:, start : start + slab])
    return out


def slab_rows(n_rows: int, n_columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a weight that are expanded at a time; never depends on the memory that is free."""
    if device.type == "cpu":
        return min(n_rows, max(16, SLAB_WEIGHTS // n_columns))
    return -(-n_rows // 2) if dtype == torch.float32 else n_rows


class QuantLinear(nn.Module):
    """A linear layer over packed weights.

    Attributes:
        weight: uint8 `[out_features, row_bytes]`; on the meta device until it is loaded.
        bias: float32 `[out_features]` or None.
        qtype: how `weight` is stored.
        scaling: what its decoded rows still need, on the device of the products; None for most.
        row_scale: float32 `[out_features]`, the int8 scale of every row; None before the first
            int8 product.
        group: of the rotation that `row_scale` is made with.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.qtype = QTYPES["F32"]
        packed = torch.empty(out_features, 4 * in_features, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.scaling: Scaling | None = None
        self.row_scale: Tensor | None = None
        self.group = 0

    def load(self, packed: Tensor, qtype: QType, scaling: Scaling | None = None) -> None:
        """Take `packed` (uint8 `[out_features, row_bytes]`) as the weight, without copying."""
        assert packed.shape == (self.out_features, qtype.row_bytes(self.in_features))
        self.qtype, self.scaling = qtype, scaling
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.row_scale = None

    def place(self, packed: Tensor) -> None:
        """Use `packed`, which holds the bytes of the present weight at another place."""
        self.weight = nn.Parameter(packed, requires_grad=False)

    @property
    def fits_int8(self) -> bool:
        """Whether int8 weights can be made of this storage."""
        source = INT8_SOURCES.get(self.qtype.name)
        if self.scaling is not None:
            return False
        return source is not None and self.in_features % max(source.qblock, CHUNK) == 0

    def use_int8(self, group: int) -> None:
        """Prepare for quantized tokens that are rotated by `group`."""
        self.group = group
        self.row_scale = None

    def forward(self, x: Tokens, out: Tensor | None = None) -> Tensor:
        """Multiply and add the bias.

        Args:
            x: `[..., in_features]`, or quantized tokens `[M, in_features]`.
            out: `[M, out_features]`, columns contiguous, written and returned; for `x [M, ...]`.

        Returns:
            `[..., out_features]` in the dtype of `x`.
        """
        if isinstance(x, QuantTokens):
            return self._int8(x, out)
        flat = x.reshape(-1, self.in_features)
        out = quant_matmul(flat, self.weight, self.qtype, out, self.scaling)
        if self.bias is not None:
            out += self.bias.to(out.dtype)
        return out.view(*x.shape[:-1], self.out_features)

    def _int8(self, x: QuantTokens, out: Tensor | None) -> Tensor:
        assert self.group == x.group
        if self.row_scale is None:  # reads the whole weight once
            self.row_scale = row_scales(self.weight, self.qtype.name, self.group)
        weight = dequant_int8(self.weight, self.qtype.name, self.row_scale, self.group)
        return matmul_int8(x.q, x.scale, weight, self.row_scale, x.dtype, bias=self.bias, out=out)

    def extra_repr(self) -> str:
        """Shape and qtype, shown by `print(model)`."""
        return f"{self.in_features} -> {self.out_features}, {self.qtype}"


class QuantEmbedding(nn.Module):
    """A table of packed rows; a lookup expands the rows it needs and reads nothing else.

    Attributes:
        weight: uint8 `[n_rows, row_bytes]`; stays in host memory (a mapped file) at all times.
        qtype: how `weight` is stored.
        scaling: what its decoded rows still need, in host memory; None for most.
    """

    def __init__(self, n_rows: int, dim: int) -> None:
        super().__init__()
        self.in_features, self.out_features = dim, n_rows
        self.qtype = QTYPES["F32"]
        packed = torch.empty(n_rows, 4 * dim, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.scaling: Scaling | None = None

    def load(self, packed: Tensor, qtype: QType, scaling: Scaling | None = None) -> None:
        """Take `packed` (uint8 `[n_rows, row_bytes]`, host memory) as the table, not copied."""
        assert packed.shape == (self.out_features, qtype.row_bytes(self.in_features))
        self.qtype, self.scaling = qtype, scaling
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """float32 `[T, dim]` rows of int64 `ids [T]`, on the device of `ids`."""
        ids_here = ids.to(self.weight.device)
        part = self.scaling and self.scaling.of(ids_here)
        rows = dequantize_scaled(self.weight[ids_here], self.qtype, torch.float32, part)
        return rows.to(ids.device)
