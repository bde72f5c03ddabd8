"""What the quantizing kernels share: ggml's rounding, and how weights reach a search.

A search gives each lane one sub-block, whose weights it adds up in index order as ggml does. Lanes
read `columns [SUBBLOCK, n]`, the transposed sub-blocks, so that neighbours read neighbours: weight
e of the next sub-block lies beside weight e of this one. `STRIDE` is how far e + 1 lies behind e.

Every operation is one IEEE rounding: kernels are launched with `OPTIONS`, which forbid fused
multiply-add, and use `tl.div_rn` and `tl.sqrt_rn`.

Source: ggml `nearest_int`, `make_qkx2_quants`, `make_qx_quants`.
"""

from zquant_kernels.runtime import INTERPRETED, tl, triton

__all__ = [
    "COLUMN_POINTERS",
    "OPTIONS",
    "POINTERS",
    "round_even",
    "signed_max",
    "tile",
    "to_levels",
]

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
# `half` is `out` seen as float16
POINTERS = {"x": "*fp32", "out": "*u8", "half": "*fp16"}
COLUMN_POINTERS = {"x": "*fp32", "columns": "*fp32", "out": "*u8", "half": "*fp16"}


def tile(n_qblocks: int) -> int:
    """Qblocks per program; the interpreter pays for operations, not for lanes, and gets more."""
    return 1024 if INTERPRETED else n_qblocks


@triton.jit
def round_even(v):  # type: ignore[no-untyped-def]
    """Nearest integer, ties to even, for |v| <= 2**22; what is larger stays large."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def to_levels(v, LOW: tl.constexpr, HIGH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Nearest integers in LOW..HIGH, float32. NaN stays NaN, as such a fit must not win."""
    v = (v + 12582912.0) - 12582912.0
    v = tl.maximum(v, LOW, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, HIGH, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def signed_max(x, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The number of largest magnitude per row of `x [ROWS, N]`, signed; first on ties."""
    k = tl.arange(0, N)[None, :]  # [1, N]
    magnitude = tl.abs(x)
    first = tl.min(tl.where(magnitude == tl.max(magnitude, axis=1)[:, None], k, N), axis=1)
    # zeros of either sign add up to +0, which is what ggml starts from
    return tl.sum(tl.where(k == first[:, None], x, 0.0), axis=1)
