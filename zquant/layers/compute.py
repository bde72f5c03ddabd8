"""How blocks compute, and the two forms in which tokens enter a linear.

`exact` multiplies in a float dtype. `int8` multiplies int8 tokens by int8 weights (W8A8): tokens
get one scale each and weights one per row, both rotated by a Hadamard matrix first, so that a
product is that of the plain ones and an outlier is spread over its group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from zquant_kernels import hadamard
from zquant_kernels.quantize_tokens import quantize_tokens

__all__ = ["Compute", "QuantTokens", "Tokens", "as_tokens", "enter", "split"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """How the linears and the attention of blocks are computed.

    Attributes:
        dtype: of exact linears, of what any linear returns, and of attention.
        int8: linears are W8A8 where the network allows it.
        rotate: tokens and weights of int8 linears are rotated; off only to measure what it gives.
        int8_attention: the scores of attention are int8 products.
    """

    dtype: torch.dtype
    int8: bool = False
    rotate: bool = True
    int8_attention: bool = False

    @property
    def mode(self) -> str:
        """The word for people: exact or int8."""
        return "int8" if self.int8 else "exact"

    def group(self, n_columns: int) -> int:
        """Rotation group of int8 tokens of that width; 0 is none."""
        return hadamard.group_of(n_columns) if self.rotate else 0


@dataclass(frozen=True, slots=True)
class QuantTokens:
    """Tokens quantized to int8, one scale per token.

    Attributes:
        q: int8 `[M, K]`, rotated by `group`.
        scale: float32 `[M]`.
        group: of the rotation; 0 is none.
        dtype: of what a linear makes of them.
    """

    q: Tensor
    scale: Tensor
    group: int
    dtype: torch.dtype

    def plain(self) -> Tensor:
        """`[M, K]` in `dtype`, rotated back: what an adapter or an exact linear multiplies."""
        x = self.q.float() * self.scale[:, None]
        return (hadamard.reference(x, self.group) if self.group else x).to(self.dtype)


Tokens = Tensor | QuantTokens


def as_tokens(values: Tensor, scale: Tensor | None, group: int, dtype: torch.dtype) -> Tokens:
    """What a fused kernel returned, as tokens."""
    return values if scale is None else QuantTokens(values, scale, group, dtype)


def enter(x: Tensor, group: int | None) -> Tokens:
    """`x [M, K]` as it enters a linear: as it is, or with a rotation `group` quantized."""
    if group is None:
        return x
    return QuantTokens(*quantize_tokens(x, group=group), group, x.dtype)


def split(x: Tokens, most: int) -> list[Tokens]:
    """`x` in equal chunks of at most `most` tokens."""
    values = x.q if isinstance(x, QuantTokens) else x
    n = -(-len(values) // most)
    if n == 1:
        return [x]
    parts = values.tensor_split(n)
    if not isinstance(x, QuantTokens):
        return list(parts)
    scales = x.scale.tensor_split(n)
    return [QuantTokens(q, s, x.group, x.dtype) for q, s in zip(parts, scales, strict=True)]
