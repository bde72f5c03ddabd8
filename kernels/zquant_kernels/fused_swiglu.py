"""The gated product of the feed-forward, cast or quantized.

    y[m, k] = silu(gate[m, k] * gate_factor) * up[m, k] * factor

`gate_factor` undoes the power of two on a float16 gate, `factor` keeps the product inside float16;
both are 1 for other dtypes (see `zquant.layers.swiglu`). With `dtype` int8 the result is that of
`quantize_tokens(y, group=group)`.

Rows are too long for registers, so quantization computes each twice, a chunk at a time: first for
the largest magnitude, then to store. The second reading comes from the cache.

Source: Z-Image feed-forward, SwiGLU (arXiv 2002.05202).
"""

from typing import Any

import torch
import torch.nn.functional as F

from zquant_kernels import quantize_tokens
from zquant_kernels.hadamard import rotate
from zquant_kernels.quantize_tokens import check_group, launch_options, to_int8
from zquant_kernels.runtime import CompileCase, on_device, tl, triton, why_not

__all__ = ["COMPILE_CASES", "fused_swiglu", "kernel", "quantize_kernel", "reference"]

TILE = 2048  # columns that exist at a time; a multiple of every group
REFERENCE_ROWS = 128  # float32 rows of the reference that exist at a time
IN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COMPILE_CASES: list[CompileCase] = []


def reference(
    gate: torch.Tensor,
    up: torch.Tensor,
    dtype: torch.dtype,
    *,
    gate_factor: float = 1.0,
    factor: float = 1.0,
    group: int = 0,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Same contract as `fused_swiglu`, in plain torch, on any device."""
    out = torch.empty(gate.shape, dtype=dtype, device=gate.device) if out is None else out
    scale = torch.empty(len(gate), device=gate.device) if dtype == torch.int8 else None
    for at in range(0, len(gate), REFERENCE_ROWS):
        rows = slice(at, at + REFERENCE_ROWS)
        y = F.silu(gate[rows].float() * gate_factor, inplace=True).mul_(up[rows]).mul_(factor)
        if scale is None:
            out[rows] = y
        else:
            out[rows], scale[rows] = quantize_tokens.reference(y, group=group)
    return out, scale


@triton.jit
def product(gate, up, k, K, gate_factor, factor):  # type: ignore[no-untyped-def]
    """float32 columns `k [1, TILE]` of the row at `gate` and `up`, zero past `K`."""
    g = tl.load(gate + k, mask=k < K, other=0.0).to(tl.float32) * gate_factor
    u = tl.load(up + k, mask=k < K, other=0.0).to(tl.float32)
    return g / (1.0 + tl.exp(-g)) * u * factor


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    gate, up, out, K, gate_stride, up_stride, gate_factor, factor, TILE: tl.constexpr
):
    """One program computes `TILE` columns of one row of floats."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]  # [1, TILE]
    y = product(gate + m * gate_stride, up + m * up_stride, k, K, gate_factor, factor)
    tl.store(out + m * K + k, y.to(out.dtype.element_ty), mask=k < K)


@triton.jit
def quantize_kernel(  # type: ignore[no-untyped-def]
    gate, up, out, scale, K, gate_stride, up_stride, gate_factor, factor,
    GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program computes one row of int8, `TILE` columns at a time."""
    m = tl.program_id(0).to(tl.int64)
    gate += m * gate_stride
    up += m * up_stride
    top = tl.full((1,), 1e-30, tl.float32)
    for start in range(0, K, TILE):
        k = start + tl.arange(0, TILE)[None, :]  # [1, TILE]
        y = product(gate, up, k, K, gate_factor, factor)
        if GROUP > 0:
            y = rotate(y, 1, TILE, GROUP)
        top = tl.maximum(top, tl.max(tl.abs(y), axis=1))
    tl.store(scale + m + tl.arange(0, 1), top * (1 / 127))
    for start in range(0, K, TILE):
        k = start + tl.arange(0, TILE)[None, :]
        y = product(gate, up, k, K, gate_factor, factor)
        if GROUP > 0:
            y = rotate(y, 1, TILE, GROUP)
        tl.store(out + m * K + k, to_int8(y, top), mask=k < K)


def _compile_cases() -> list[CompileCase]:
    cases = []
    for x in ("*bf16", "*fp16", "*fp32"):
        for group in (None, 256, 0) if x == "*bf16" else (None, 256):  # None is float
            types = {
                "gate": x, "up": x, "out": x if group is None else "*i8", "K": "i32",
                "gate_stride": "i32", "up_stride": "i32", "gate_factor": "fp32", "factor": "fp32",
            }  # fmt: skip
            aligned = ("gate", "up", "out", "K", "gate_stride", "up_stride")
            case = CompileCase(
                kernel=kernel if group is None else quantize_kernel,
                types=types if group is None else {**types, "scale": "*fp32"},
                constants={"TILE": TILE} if group is None else {"TILE": TILE, "GROUP": group},
                options=launch_options(TILE),
                aligned=aligned if group is None else (*aligned, "scale"),
            )
            cases.append(case)
    return cases


COMPILE_CASES += _compile_cases()


def fused_swiglu(
    gate: torch.Tensor,
    up: torch.Tensor,
    dtype: torch.dtype,
    *,
    gate_factor: float = 1.0,
    factor: float = 1.0,
    group: int = 0,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gate, multiply and cast or quantize every row.

    Args:
        gate: bfloat16, float16 or float32 `[M, K]`, rows contiguous (a half of a joint product).
        up: like `gate`.
        dtype: that of `gate`, or int8.
        gate_factor: a power of two on `gate`.
        factor: a power of two on the result.
        group: of the rotation before quantization, as in `quantize_tokens`; 0 unless int8.
        out: `dtype` `[M, K]`, contiguous; `gate` or `up` itself or memory apart from both.

    Returns:
        `(out, scale)`: `dtype` `[M, K]`, and float32 `[M]` if it is int8, otherwise None.

    Raises:
        ValueError: an argument is none of these.
    """
    _check(gate, up, dtype, group, out)
    m, k = gate.shape
    if m == 0 or why_not(gate.device):
        return reference(
            gate, up, dtype, gate_factor=gate_factor, factor=factor, group=group, out=out
        )
    out = torch.empty(m, k, dtype=dtype, device=gate.device) if out is None else out
    strides = (gate.stride(0), up.stride(0))
    launch: Any
    with on_device(gate):
        if dtype != torch.int8:
            launch = kernel[(m, -(-k // TILE))]
            launch(
                gate, up, out, k, *strides, gate_factor, factor,
                TILE=TILE, **launch_options(TILE),
            )  # fmt: skip
            return out, None
        scale = torch.empty(m, dtype=torch.float32, device=gate.device)
        launch = quantize_kernel[(m,)]
        launch(
            gate, up, out, scale, k, *strides, gate_factor, factor,
            GROUP=group, TILE=TILE, **launch_options(TILE),
        )  # fmt: skip
    return out, scale


def _check(
    gate: torch.Tensor,
    up: torch.Tensor,
    dtype: torch.dtype,
    group: int,
    out: torch.Tensor | None,
) -> None:
    """Raise ValueError for what the kernels do not expect."""
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(
            f"fused_swiglu needs gate and up alike; got {gate.dtype} {list(gate.shape)} on"
            f" {gate.device} and {up.dtype} {list(up.shape)} on {up.device}"
        )
    if gate.ndim != 2 or gate.dtype not in IN_DTYPES or gate.shape[1] == 0:
        raise ValueError(f"fused_swiglu needs float [M, K]; got {gate.dtype} {list(gate.shape)}")
    if gate.stride(1) != 1 or up.stride(1) != 1:
        raise ValueError(
            f"fused_swiglu needs contiguous rows; got strides {gate.stride()} and {up.stride()}"
        )
    if dtype not in (gate.dtype, torch.int8):
        raise ValueError(f"fused_swiglu gives {gate.dtype} or int8, not {dtype}")
    if group and dtype != torch.int8:
        raise ValueError(f"fused_swiglu rotates int8 only; got group {group} and {dtype}")
    check_group("fused_swiglu", gate.shape[1], group)
    if out is None:
        return
    if out.dtype != dtype or out.shape != gate.shape or out.device != gate.device:
        raise ValueError(
            f"fused_swiglu needs out {dtype} {list(gate.shape)} on {gate.device};"
            f" got {out.dtype} {list(out.shape)} on {out.device}"
        )
    if not out.is_contiguous():
        raise ValueError(f"fused_swiglu needs out contiguous; got strides {out.stride()}")
