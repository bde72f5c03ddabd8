"""RMSNorm, modulation and quantization in one pass over each token.

    y[m, k] = x[m, k] / sqrt(mean_k(x^2) + eps) * weight[k] * modulation[k] * factor

`modulation` is what the block multiplies by, 1 + scale, or absent. `factor` is a power of two that
keeps what follows inside float16. With `dtype` int8 the result is that of
`quantize_tokens(y, group=group)`.

Source: Z-Image block; the arithmetic is `zquant.layers.norm.rms_norm` and `quantize_tokens`.
"""

from typing import Any

import torch

from zquant_kernels import quantize_tokens
from zquant_kernels.quantize_tokens import MAX_K, check_group, launch_options, store_rows
from zquant_kernels.runtime import CompileCase, on_device, tl, triton, why_not

__all__ = [
    "COMPILE_CASES",
    "check_out",
    "check_vector",
    "fused_norm",
    "kernel",
    "reference",
    "rms_norm",
]

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int8)
COMPILE_CASES: list[CompileCase] = []


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    modulation: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
    *,
    factor: float = 1.0,
    group: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Same contract as `fused_norm`, in plain torch, on any device."""
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    y.mul_(factor if modulation is None else modulation * factor)
    return quantize_tokens.reference(y, group=group) if dtype == torch.int8 else (y.to(dtype), None)


@triton.jit
def rms_norm(row, weight, k, K, eps):  # type: ignore[no-untyped-def]
    """float32 `row [1, TILE]`, zero past `K`, over its root mean square, times `weight [K]`."""
    mean = tl.sum(row * row, axis=1) / K
    inverse = tl.rsqrt(mean + eps)  # [1]
    return row * inverse[:, None] * tl.load(weight + k, mask=k < K, other=0.0)


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    x, weight, modulation, out, scale, K, eps, factor,
    MODULATE: tl.constexpr, QUANTIZE: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program normalizes one row; `TILE` is a power of two that holds it."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, TILE)[None, :]  # [1, TILE]
    y = rms_norm(tl.load(x + m * K + k, mask=k < K, other=0.0), weight, k, K, eps)
    if MODULATE:
        y *= tl.load(modulation + k, mask=k < K, other=0.0)
    store_rows(y * factor, out, scale, m, k, K, QUANTIZE, GROUP, TILE)


COMPILE_CASES += [
    CompileCase(
        kernel=kernel,
        types={
            **dict.fromkeys(("x", "weight", "modulation", "scale"), "*fp32"), "out": out,
            "K": "i32", "eps": "fp32", "factor": "fp32",
        },
        constants={
            "MODULATE": modulate, "QUANTIZE": out == "*i8", "GROUP": group, "TILE": 4096,
        },
        options=launch_options(4096),
        aligned=("x", "weight", "modulation", "out", "scale", "K"),
    )
    for out, modulate, group in (  # blocks without modulation are never int8
        *((out, flag, 0) for out in ("*bf16", "*fp16", "*fp32") for flag in (False, True)),
        ("*i8", True, 0), ("*i8", True, 256),
    )
]  # fmt: skip


def fused_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    modulation: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
    *,
    factor: float = 1.0,
    group: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Normalize, modulate and cast or quantize every row.

    Args:
        x: float32 `[M, K]`, contiguous, K at most 16384.
        weight: float32 `[K]`, contiguous.
        modulation: float32 `[K]`, contiguous, or None.
        eps: added to the mean square.
        dtype: bfloat16, float16, float32 or int8.
        factor: a power of two on the result; see `zquant.layers.swiglu`.
        group: of the rotation before quantization, as in `quantize_tokens`; 0 unless int8.

    Returns:
        `(out, scale)`: `dtype` `[M, K]`, and float32 `[M]` if it is int8, otherwise None.

    Raises:
        ValueError: an argument is none of these.
    """
    if x.ndim != 2 or x.dtype != torch.float32 or x.shape[1] == 0 or not x.is_contiguous():
        raise ValueError(
            f"fused_norm needs contiguous float32 [M, K]; got {x.dtype} {list(x.shape)},"
            f" strides {x.stride()}"
        )
    m, k = x.shape
    check_out("fused_norm", k, dtype, group)
    check_vector("fused_norm", "weight", weight, x)
    check_vector("fused_norm", "modulation", modulation, x)
    if m == 0 or why_not(x.device):
        return reference(x, weight, modulation, eps, dtype, factor=factor, group=group)
    out = torch.empty(m, k, dtype=dtype, device=x.device)
    quantize = dtype == torch.int8
    scale = torch.empty(m, dtype=torch.float32, device=x.device) if quantize else None
    tile = triton.next_power_of_2(k)
    launch: Any = kernel[(m,)]
    with on_device(x):
        launch(  # a pointer that is never read stands for what is absent
            x, weight, weight if modulation is None else modulation, out,
            weight if scale is None else scale, k, eps, factor,
            MODULATE=modulation is not None, QUANTIZE=quantize, GROUP=group, TILE=tile,
            **launch_options(tile),
        )  # fmt: skip
    return out, scale


def check_out(who: str, k: int, dtype: torch.dtype, group: int) -> None:
    """Raise ValueError unless rows of `k` can be written in `dtype`, rotated by `group`."""
    if k > MAX_K:
        raise ValueError(f"{who} needs K of at most {MAX_K}; got {k}")
    if dtype not in OUT_DTYPES:
        raise ValueError(f"{who} gives bfloat16, float16, float32 or int8, not {dtype}")
    if group and dtype != torch.int8:
        raise ValueError(f"{who} rotates int8 only; got group {group} and {dtype}")
    check_group(who, k, group)


def check_vector(who: str, name: str, vector: torch.Tensor | None, x: torch.Tensor) -> None:
    """Raise ValueError unless `vector` is None or contiguous float32 `[K]` beside `x [M, K]`."""
    if vector is None:
        return
    k = x.shape[1]
    if vector.dtype != torch.float32 or tuple(vector.shape) != (k,):
        raise ValueError(
            f"{who} needs {name} float32 [{k}]; got {vector.dtype} {list(vector.shape)}"
        )
    if not vector.is_contiguous() or vector.device != x.device:
        raise ValueError(
            f"{who} needs {name} contiguous and on {x.device};"
            f" got strides {vector.stride()} on {vector.device}"
        )
