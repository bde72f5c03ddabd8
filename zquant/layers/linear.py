"""Linear layers whose weight stays as it is stored until the moment it is multiplied.

    out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]

`QuantLinear` keeps the packed bytes of any qtype. On the CPU it expands a slab of rows that fits
the cache, multiplies, and reuses the buffer; elsewhere it expands the whole weight. A fused or
integer matmul belongs in `quant_matmul` and nowhere else.
"""

import torch
from torch import Tensor, nn

from zquant.quant.codec import dequantize
from zquant.quant.floats import FLOAT_DTYPES
from zquant.quant.qtypes import QTYPES, QType

__all__ = ["QuantEmbedding", "QuantLinear", "quant_matmul"]

SLAB_WEIGHTS = 2**22  # weights expanded at a time on a CPU: 16 MiB of float32, half of a small L3


def quant_matmul(x: Tensor, packed: Tensor, qtype: QType) -> Tensor:
    """`x @ weight.T` with `weight` expanded from `packed` to the dtype of `x`.

    Args:
        x: floating `[M, K]`.
        packed: uint8 `[N, row_bytes]` of `qtype`, on the device of `x`.
        qtype: how the rows are stored.

    Returns:
        `[M, N]` in the dtype of `x`.
    """
    if FLOAT_DTYPES.get(qtype.name) == x.dtype:
        return x @ packed.view(x.dtype).t()
    if x.device.type != "cpu":
        return x @ dequantize(packed, qtype, x.dtype).t()
    n_rows, n_columns = len(packed), x.shape[1]
    slab = min(n_rows, max(16, SLAB_WEIGHTS // n_columns))
    scratch = x.new_empty(slab, n_columns)
    out = x.new_empty(len(x), n_rows)
    for start in range(0, n_rows, slab):
        stop = min(start + slab, n_rows)
        weight = dequantize(packed[start:stop], qtype, x.dtype, out=scratch[: stop - start])
        torch.mm(x, weight.t(), out=out[:, start:stop])
    return out


class QuantLinear(nn.Module):
    """A linear layer over packed weights.

    Attributes:
        weight: uint8 `[out_features, row_bytes]`; on the meta device until it is loaded.
        bias: float32 `[out_features]` or None.
        qtype: how `weight` is stored.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.qtype = QTYPES["F32"]
        packed = torch.empty(out_features, 4 * in_features, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def load(self, packed: Tensor, qtype: QType) -> None:
        """Take `packed` (uint8 `[out_features, row_bytes]`) as the weight, without copying."""
        assert packed.shape == (self.out_features, qtype.row_bytes(self.in_features))
        self.qtype = qtype
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`, in the dtype of `x`."""
        flat = x.reshape(-1, self.in_features)
        out = quant_matmul(flat, self.weight, self.qtype)
        if self.bias is not None:
            out += self.bias.to(out.dtype)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shape and qtype, shown by `print(model)`."""
        return f"{self.in_features} -> {self.out_features}, {self.qtype}"


class QuantEmbedding(nn.Module):
    """A table of packed rows; a lookup expands the rows it needs and reads nothing else.

    Attributes:
        weight: uint8 `[n_rows, row_bytes]`; stays in host memory (a mapped file) at all times.
        qtype: how `weight` is stored.
    """

    def __init__(self, n_rows: int, dim: int) -> None:
        super().__init__()
        self.in_features, self.out_features = dim, n_rows
        self.qtype = QTYPES["F32"]
        packed = torch.empty(n_rows, 4 * dim, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def load(self, packed: Tensor, qtype: QType) -> None:
        """Take `packed` (uint8 `[n_rows, row_bytes]`, host memory) as the table, not copied."""
        assert packed.shape == (self.out_features, qtype.row_bytes(self.in_features))
        self.qtype = qtype
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """float32 `[T, dim]` rows of int64 `ids [T]`, on the device of `ids`."""
        packed = self.weight[ids.to(self.weight.device)]
        return dequantize(packed, self.qtype, torch.float32).to(ids.device)
