"""Close one half of a block and open the next, in one pass over each token.

    r[m, k] = x[m, k] + gate[k] * h[m, k] / sqrt(mean_k(h^2) + h_eps) * h_weight[k]
    y[m, k] = r[m, k] / sqrt(mean_k(r^2) + eps) * weight[k] * modulation[k] * factor

`r` is the residual stream, float32. `gate` (already through tanh) and `modulation` (1 + scale) may
be absent. `h` may be any multiple of the true branch, with `h_eps` multiplied by its square. With
`dtype` int8 `y` is quantized as by `quantize_tokens(y, group=group)`. `residual` is the first line
alone, which ends a block.

Source: Z-Image block; the arithmetic is `zquant.layers.norm.rms_norm` and `quantize_tokens`.
"""

from dataclasses import dataclass
from typing import Any

import torch

from zquant_kernels import fused_norm
from zquant_kernels.fused_norm import check_out, check_vector, rms_norm
from zquant_kernels.quantize_tokens import MAX_K, launch_options, store_rows
from zquant_kernels.runtime import CompileCase, on_device, tl, triton, why_not

__all__ = [
    "COMPILE_CASES",
    "Norms",
    "fused_residual",
    "kernel",
    "reference",
    "residual",
    "residual_kernel",
    "residual_reference",
]

H_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COMPILE_CASES: list[CompileCase] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """The vectors and numbers of both norms; vectors are float32 `[K]`, contiguous.

    `h_eps` and `eps` are added to the mean squares. `factor` is a power of two on the result.
    """

    h_weight: torch.Tensor
    gate: torch.Tensor | None
    weight: torch.Tensor
    modulation: torch.Tensor | None
    h_eps: float
    eps: float
    factor: float = 1.0


def residual_reference(
    x: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None,
    eps: float,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same contract as `residual`, in plain torch, on any device."""
    h = h.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight
    return torch.add(x, h if gate is None else h.mul_(gate), out=out)


def reference(
    x: torch.Tensor,
    h: torch.Tensor,
    norms: Norms,
    dtype: torch.dtype,
    *,
    group: int = 0,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Same contract as `fused_residual`, in plain torch, on any device."""
    n = norms
    r = residual_reference(x, h, n.h_weight, n.gate, n.h_eps, out=out)
    return r, *fused_norm.reference(
        r, n.weight, n.modulation, n.eps, dtype, factor=n.factor, group=group
    )


@triton.jit
def add_branch(x, h, weight, gate, m, k, K, eps, GATE: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 row `m [1, TILE]` of the sum, zero past `K`."""
    row = tl.load(h + m * K + k, mask=k < K, other=0.0).to(tl.float32)
    row = rms_norm(row, weight, k, K, eps)
    if GATE:
        row *= tl.load(gate + k, mask=k < K, other=0.0)
    return row + tl.load(x + m * K + k, mask=k < K, other=0.0)


@triton.jit
def residual_kernel(  # type: ignore[no-untyped-def]
    x, h, weight, gate, out, K, eps, GATE: tl.constexpr, TILE: tl.constexpr
):
    """One program computes one row; `TILE` is a power of two that holds it."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, TILE)[None, :]  # [1, TILE]
    r = add_branch(x, h, weight, gate, m, k, K, eps, GATE)
    tl.store(out + m * K + k, r, mask=k < K)


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    x, h, h_weight, gate, weight, modulation, r, y, scale, K, h_eps, eps, factor,
    GATE: tl.constexpr, MODULATE: tl.constexpr, QUANTIZE: tl.constexpr, GROUP: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """One program computes one row; `TILE` is a power of two that holds it."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, TILE)[None, :]  # [1, TILE]
    row = add_branch(x, h, h_weight, gate, m, k, K, h_eps, GATE)
    tl.store(r + m * K + k, row, mask=k < K)
    row = rms_norm(row, weight, k, K, eps)
    if MODULATE:
        row *= tl.load(modulation + k, mask=k < K, other=0.0)
    store_rows(row * factor, y, scale, m, k, K, QUANTIZE, GROUP, TILE)


def _compile_cases() -> list[CompileCase]:
    """A block is modulated and gated or neither, and the latter is never int8."""
    floats, cases = ("*bf16", "*fp16", "*fp32"), []
    names: tuple[str, ...] = ("x", "weight", "gate", "out")
    for h, gated in ((h, gated) for h in floats for gated in (False, True)):
        case = CompileCase(
            kernel=residual_kernel,
            types={**dict.fromkeys(names, "*fp32"), "h": h, "K": "i32", "eps": "fp32"},
            constants={"GATE": gated, "TILE": 4096},
            options=launch_options(4096),
            aligned=(*names, "h", "K"),
        )
        cases.append(case)
    names = ("x", "h_weight", "gate", "weight", "modulation", "r", "scale")
    numbers = {"K": "i32", "h_eps": "fp32", "eps": "fp32", "factor": "fp32"}
    for h, y, gated, group in (
        *((h, h, gated, 0) for h in floats for gated in (False, True)),
        *((h, "*i8", True, 256) for h in floats),
        ("*bf16", "*i8", True, 0),
    ):
        flags = {"GATE": gated, "MODULATE": gated, "QUANTIZE": y == "*i8", "GROUP": group}
        case = CompileCase(
            kernel=kernel,
            types={**dict.fromkeys(names, "*fp32"), "h": h, "y": y, **numbers},
            constants={**flags, "TILE": 4096},
            options=launch_options(4096),
            aligned=(*names, "h", "y", "K"),
        )
        cases.append(case)
    return cases


COMPILE_CASES += _compile_cases()


def residual(
    x: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None,
    eps: float,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add a gated, normalized branch to the residual stream.

    Args:
        x: float32 `[M, K]`, contiguous, K at most 16384; not modified unless it is `out`.
        h: bfloat16, float16 or float32 `[M, K]`, contiguous.
        weight: float32 `[K]`, contiguous, of the norm of `h`.
        gate: likewise, or None.
        eps: added to the mean square of `h`.
        out: float32 `[M, K]`, contiguous; `x` itself or memory apart from all arguments.

    Returns:
        `out`, or float32 `[M, K]`.

    Raises:
        ValueError: an argument is none of these.
    """
    _check("residual", x, h, out)
    check_vector("residual", "weight", weight, x)
    check_vector("residual", "gate", gate, x)
    if len(x) == 0 or why_not(x.device):
        return residual_reference(x, h, weight, gate, eps, out=out)
    out, (m, k) = torch.empty_like(x) if out is None else out, x.shape
    tile = triton.next_power_of_2(k)
    launch: Any = residual_kernel[(m,)]
    with on_device(x):
        launch(
            x, h, weight, weight if gate is None else gate, out, k, eps,
            GATE=gate is not None, TILE=tile, **launch_options(tile),
        )  # fmt: skip
    return out


def fused_residual(
    x: torch.Tensor,
    h: torch.Tensor,
    norms: Norms,
    dtype: torch.dtype,
    *,
    group: int = 0,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Add a gated, normalized branch to the residual stream and normalize the sum.

    Args:
        x: float32 `[M, K]`, contiguous, K at most 16384; not modified unless it is `out`.
        h: bfloat16, float16 or float32 `[M, K]`, contiguous.
        norms: on the device of `x`.
        dtype: of `y`: bfloat16, float16, float32 or int8.
        group: of the rotation before quantization, as in `quantize_tokens`; 0 unless int8.
        out: for `r`, as in `residual`.

    Returns:
        `(r, y, scale)`: float32 `[M, K]`, `dtype` `[M, K]`, and float32 `[M]` if `dtype` is int8,
        otherwise None.

    Raises:
        ValueError: an argument is none of these.
    """
    _check("fused_residual", x, h, out)
    n, (m, k) = norms, x.shape
    check_out("fused_residual", k, dtype, group)
    for name in ("h_weight", "gate", "weight", "modulation"):
        check_vector("fused_residual", name, getattr(n, name), x)
    if m == 0 or why_not(x.device):
        return reference(x, h, norms, dtype, group=group, out=out)
    r = torch.empty_like(x) if out is None else out
    y = torch.empty(m, k, dtype=dtype, device=x.device)
    quantize = dtype == torch.int8
    scale = torch.empty(m, dtype=torch.float32, device=x.device) if quantize else None
    tile = triton.next_power_of_2(k)
    launch: Any = kernel[(m,)]
    with on_device(x):
        launch(  # a pointer that is never read stands for what is absent
            x, h, n.h_weight, n.weight if n.gate is None else n.gate, n.weight,
            n.weight if n.modulation is None else n.modulation, r, y,
            n.weight if scale is None else scale, k, n.h_eps, n.eps, n.factor,
            GATE=n.gate is not None, MODULATE=n.modulation is not None, QUANTIZE=quantize,
            GROUP=group, TILE=tile, **launch_options(tile),
        )  # fmt: skip
    return r, y, scale


def _check(who: str, x: torch.Tensor, h: torch.Tensor, out: torch.Tensor | None) -> None:
    """Raise ValueError for tensors `[M, K]` that the kernels do not expect."""
    if x.ndim != 2 or x.dtype != torch.float32 or not 0 < x.shape[1] <= MAX_K:
        raise ValueError(
            f"{who} needs x float32 [M, K], K at most {MAX_K}; got {x.dtype} {list(x.shape)}"
        )
    for name, tensor, dtypes in (("h", h, H_DTYPES), ("out", out, (torch.float32,))):
        if tensor is not None and (tensor.shape != x.shape or tensor.dtype not in dtypes):
            raise ValueError(
                f"{who} needs {name} {list(x.shape)} in {' or '.join(map(str, dtypes))};"
                f" got {tensor.dtype} {list(tensor.shape)}"
            )
    for name, tensor in (("x", x), ("h", h), ("out", out)):
        if tensor is not None and not (tensor.is_contiguous() and tensor.device == x.device):
            raise ValueError(
                f"{who} needs {name} contiguous and on {x.device};"
                f" got strides {tensor.stride()} on {tensor.device}"
            )
