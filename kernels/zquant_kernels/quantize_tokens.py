"""Quantize activations to int8 with one float32 scale per token.

    y[m] = x[m], rotated in groups (see `hadamard`) or as it is
    scale[m] = max(max_k |y[m, k]|, TINY) * (1 / 127)
    q[m, k] = round(y[m, k] * (127 / max(max_k |y[m, k]|, TINY)))

Ties round to even. A row of zeros gives zeros and a tiny scale. `x` must be finite.
`store_rows` is the device function that the fused kernels end with.

Source: symmetric per-token quantization as in SmoothQuant (arXiv 2211.10438), rotation as in QuaRot
(arXiv 2404.00456).
"""

from typing import Any

import torch

from zquant_kernels import hadamard
from zquant_kernels.hadamard import rotate
from zquant_kernels.runtime import CompileCase, on_device, tl, triton, why_not

__all__ = [
    "COMPILE_CASES",
    "MAX_K",
    "TINY",
    "check_group",
    "kernel",
    "launch_options",
    "quantize_tokens",
    "reference",
    "store_rows",
    "to_int8",
]

TINY = 1e-30  # instead of the maximum of a row of zeros: its reciprocal is finite
MAX_K = 16384  # a program keeps a row of this length in registers
MIN_GROUP, MAX_GROUP = 16, 256  # what `hadamard.rotate` can do
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COMPILE_CASES: list[CompileCase] = []


def reference(x: torch.Tensor, *, group: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Same contract as `quantize_tokens`, in plain torch, on any device."""
    x = hadamard.reference(x.float(), group) if group else x.float()
    top = x.abs().amax(-1).clamp_min(TINY)
    # a tensor above the line: torch multiplies a number by the reciprocal, which is not IEEE
    steps = torch.full_like(top, 127.0) / top
    return torch.round(x * steps[:, None]).to(torch.int8), top * (1 / 127)


@triton.jit
def to_int8(x, top):  # type: ignore[no-untyped-def]
    """float32 `x [ROWS, K]` in steps of `top [ROWS]` / 127; no `x` is larger than its `top`."""
    y = x * tl.div_rn(127.0, top)[:, None]
    # 1.5 * 2**23: the sum has no fraction bits left, so the addition rounds half to even
    return ((y + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def store_rows(  # type: ignore[no-untyped-def]
    y, out, scale, m, k, K, QUANTIZE: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr
):
    """Store row `m` of `out [M, K]`, float32 `y [1, TILE]`: cast, or with `QUANTIZE` as int8.

    `y` is zero where `k [1, TILE]` is not below `K`.
    """
    if QUANTIZE:
        if GROUP > 0:
            y = rotate(y, 1, TILE, GROUP)
        top = tl.maximum(tl.max(tl.abs(y), axis=1), 1e-30)
        tl.store(out + m * K + k, to_int8(y, top), mask=k < K)
        tl.store(scale + m + tl.arange(0, 1), top * (1 / 127))
    else:
        tl.store(out + m * K + k, y.to(out.dtype.element_ty), mask=k < K)


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    x, out, scale, K, stride, GROUP: tl.constexpr, TILE: tl.constexpr
):
    """One program quantizes one row; `TILE` is a power of two that holds it."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, TILE)[None, :]  # [1, TILE]
    row = tl.load(x + m * stride + k, mask=k < K, other=0.0).to(tl.float32)
    store_rows(row, out, scale, m, k, K, True, GROUP, TILE)


def launch_options(tile: int) -> dict[str, Any]:
    """Warps that keep a row of `tile` elements in registers; products and sums round as written."""
    return {"num_warps": min(16, max(1, tile // 256)), "enable_fp_fusion": False}


COMPILE_CASES += [
    CompileCase(
        kernel=kernel,
        types={"x": x, "out": "*i8", "scale": "*fp32", "K": "i32", "stride": "i32"},
        constants={"GROUP": group, "TILE": tile},
        options=launch_options(tile),
        aligned=("x", "out", "scale", "K", "stride"),
    )
    for x, tile, group in (  # rows of 3840, and the other groups of short rows
        *((x, 4096, 256) for x in ("*bf16", "*fp16", "*fp32")),
        ("*bf16", 4096, 0),
        ("*fp32", 1024, 128),
        ("*fp32", 256, 64),
    )
]


def quantize_tokens(x: torch.Tensor, *, group: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize every row by its largest magnitude.

    Args:
        x: bfloat16, float16 or float32 `[M, K]`, rows contiguous, finite, K at most 16384.
        group: rotate every group of so many columns first; a power of two from 16 to 256 that
            divides K, or 0 for none.

    Returns:
        `(q, scale)`: int8 `[M, K]` and float32 `[M]`; `q * scale` is about `x`, rotated. Where
        kernels cannot run (see `runtime.why_not`) it is the reference's, which has the same bits.

    Raises:
        ValueError: `x` or `group` is none of these.
    """
    if x.dtype not in DTYPES or x.ndim != 2 or x.shape[1] == 0 or x.stride(1) != 1:
        raise ValueError(
            "quantize_tokens needs bfloat16, float16 or float32 [M, K] with contiguous rows;"
            f" got {x.dtype} {list(x.shape)}, strides {x.stride()}"
        )
    m, k = x.shape
    check_group("quantize_tokens", k, group)
    if k > MAX_K:
        raise ValueError(f"quantize_tokens needs K of at most {MAX_K}; got {k}")
    if m == 0 or why_not(x.device):
        return reference(x, group=group)
    out = torch.empty(m, k, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    tile = triton.next_power_of_2(k)
    launch: Any = kernel[(m,)]
    with on_device(x):
        launch(x, out, scale, k, x.stride(0), GROUP=group, TILE=tile, **launch_options(tile))
    return out, scale


def check_group(who: str, k: int, group: int) -> None:
    """Raise ValueError unless rows of `k` can be rotated by `group`."""
    if group and (not MIN_GROUP <= group <= MAX_GROUP or group & (group - 1) or k % group):
        raise ValueError(
            f"{who} needs group 0 or a power of two from {MIN_GROUP} to {MAX_GROUP} that divides"
            f" K = {k}; got {group}"
        )
