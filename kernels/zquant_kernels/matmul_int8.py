"""Multiply int8 activations by int8 weights (W8A8).

    out[m, n] = x_scale[m] * w_scale[n] * sum_k x[m, k] * weight[n, k] + bias[n] + residual[m, n]

The sum is int32 and exact; everything after it is float32, rounded as written, cast at the end.

The weight tile is loaded as `[BN, BK]` and transposed in registers: loaded as `[BK, BN]`, Triton
3.8 and 3.9 double the registers of this loop on sm_80 to sm_89. Triton has no integer matrix
instruction for sm_75; there `torch._int_mm` gives the sums and `epilogue` the rest.

Source: SmoothQuant (arXiv 2211.10438); the tile order is that of Triton's matmul tutorial.
"""

from collections.abc import Iterator
from typing import Any

import torch

from zquant_kernels.runtime import CompileCase, capability, on_device, tl, triton, why_not

__all__ = ["COMPILE_CASES", "epilogue", "kernel", "matmul_int8", "reference"]

GROUP_M = 8  # rows of tiles that run together and share weight tiles in L2
CHUNK_M = 1024  # rows of int32 sums that exist at a time on sm_75
EPILOGUE_TILE = 1024
MIN_CAPABILITY = (8, 0)  # Triton has no integer matrix instruction for older ones
MAX_K = 2**17 - 1  # 128 * 128 * K stays below 2**31
MAX_STRIDE = 2**23  # 256 rows of it stay below 2**31
REFERENCE_N = 1024  # columns of float32 weights and sums that exist at a time in the reference
EXACT_K = 1024  # float32 holds a sum of so many products of int8 exactly, in any order of adding
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# BM, BN, BK, warps, stages. Chosen by what the compiler says, timed on no GPU. Neither spills.
# To bfloat16, nothing added, NARROW has at most 128 registers and 32 KiB of shared memory on sm_80,
# 86, 89 and 120, so two programs fit a multiprocessor; WIDE has 216 and 72 KiB on sm_80 and 193 and
# 96 KiB on sm_90: one program, and fewer bytes per product for the matrix units of large chips.
NARROW, WIDE = (128, 128, 64, 8, 3), (128, 256, 64, 8, 4)
TILES = {(8, 0): WIDE, (8, 6): NARROW, (9, 0): WIDE, (12, 0): NARROW}  # by first capability
TILES[0, 0] = (32, 32, 32, 4, 1)  # under the interpreter
COMPILE_CASES: list[CompileCase] = []


def reference(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    dtype: torch.dtype,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same contract as `matmul_int8`, in plain torch, on any device."""
    out = x.new_empty(len(x), len(weight), dtype=dtype) if out is None else out
    a = x.float()
    for n in range(0, len(weight), REFERENCE_N):
        columns = slice(n, n + REFERENCE_N)
        b = weight[columns].float().t()
        sums = torch.zeros(len(a), b.shape[1], dtype=torch.float64, device=x.device)
        for k in range(0, len(b), EXACT_K):
            sums += a[:, k : k + EXACT_K] @ b[k : k + EXACT_K]
        y = sums.float() * x_scale[:, None] * w_scale[columns]
        if bias is not None:
            y += bias[columns]
        if residual is not None:
            y += residual[:, columns]
        out[:, columns] = y
    return out


@triton.jit
def finish(  # type: ignore[no-untyped-def]
    sums, first_m, first_n, M, N, x_scale, w_scale, bias, residual, out, stride,
    BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Scale int32 `sums [BM, BN]`, whose first row and column are given, and store them."""
    # the large part of an address is one int64 per program; int32 per element saves registers
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    in_m, in_n = m < M - first_m, n < N - first_n
    s = tl.load(x_scale + first_m + m, mask=in_m, other=0.0)
    t = tl.load(w_scale + first_n + n, mask=in_n, other=0.0)
    y = sums.to(tl.float32) * s[:, None] * t[None, :]
    if BIAS:
        y += tl.load(bias + first_n + n, mask=in_n, other=0.0)[None, :]
    mask = in_m[:, None] & in_n[None, :]
    if RESIDUAL:
        at = residual + first_m.to(tl.int64) * N + first_n + (m[:, None] * N + n[None, :])
        y += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    at = out + first_m.to(tl.int64) * stride + first_n + (m[:, None] * stride + n[None, :])
    tl.store(at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    x, weight, x_scale, w_scale, bias, residual, out, M, N, K, stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """One program computes one `[BM, BN]` tile of `out`."""
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GROUP_M * tiles_n) * GROUP_M
    group = tl.minimum(tiles_m - first, GROUP_M)
    inside = pid % (GROUP_M * tiles_n)
    first_m, first_n = (first + inside % group) * BM, inside // group * BN
    k = tl.arange(0, BK)[None, :]
    # rows past the end read the last row: in bounds, never stored, and no mask in the loop
    m = tl.minimum(tl.arange(0, BM), M - 1 - first_m)[:, None]
    n = tl.minimum(tl.arange(0, BN), N - 1 - first_n)[:, None]
    x_at = x + first_m.to(tl.int64) * K + (m * K + k)  # [BM, BK]
    w_at = weight + first_n.to(tl.int64) * K + (n * K + k)  # [BN, BK]
    sums = tl.zeros((BM, BN), dtype=tl.int32)
    for start in range(0, K, BK):
        if EVEN_K:
            a = tl.load(x_at)
            b = tl.load(w_at)
        else:
            a = tl.load(x_at, mask=k < K - start, other=0)
            b = tl.load(w_at, mask=k < K - start, other=0)
        sums = tl.dot(a, tl.trans(b), sums, out_dtype=tl.int32)
        x_at += BK
        w_at += BK
    finish(
        sums, first_m, first_n, M, N, x_scale, w_scale, bias, residual, out, stride,
        BM, BN, BIAS, RESIDUAL,
    )  # fmt: skip


@triton.jit
def epilogue(  # type: ignore[no-untyped-def]
    sums, x_scale, w_scale, bias, residual, out, M, N, stride,
    TILE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """One program finishes `TILE` columns of one row of int32 `sums [M, N]`."""
    m, first_n = tl.program_id(0), tl.program_id(1) * TILE
    n = tl.arange(0, TILE)[None, :]
    total = tl.load(sums + m.to(tl.int64) * N + first_n + n, mask=n < N - first_n, other=0)
    finish(
        total, m, first_n, M, N, x_scale, w_scale, bias, residual, out, stride,
        1, TILE, BIAS, RESIDUAL,
    )  # fmt: skip


def _launch(tiles: tuple[int, ...], *, even: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of `kernel`; `even` is K a multiple of BK."""
    bm, bn, bk, warps, stages = tiles
    constants = {"BM": bm, "BN": bn, "BK": bk, "GROUP_M": GROUP_M, "EVEN_K": even}
    return constants, {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}


def _compile_cases() -> Iterator[CompileCase]:
    """Both tiles, and what is added: that follows the loop, and so is not mixed with its forms."""
    fp32 = ("x_scale", "w_scale", "bias")
    for out in ("*bf16", "*fp16", "*fp32"):
        numbers = dict.fromkeys(("M", "N", "stride"), "i32")
        tail = {**dict.fromkeys(fp32, "*fp32"), "residual": out, "out": out, **numbers}
        aligned = (*fp32, "residual", "out", "N", "stride")
        for added in (False, True):
            yield CompileCase(
                kernel=epilogue,
                types={"sums": "*i32", **tail},
                constants={"TILE": EPILOGUE_TILE, "BIAS": added, "RESIDUAL": added},
                options={"enable_fp_fusion": False},
                aligned=("sums", *aligned),
            )
        for tiles, added in ((NARROW, False), (NARROW, True), (WIDE, False)):
            constants, options = _launch(tiles, even=True)  # K is 3840 or 10240
            yield CompileCase(
                kernel=kernel,
                types={"x": "*i8", "weight": "*i8", "K": "i32", **tail},
                constants={**constants, "BIAS": added, "RESIDUAL": added},
                options=options,
                aligned=("x", "weight", "K", *aligned),
                min_arch=80,
                matmul=True,
            )


COMPILE_CASES += _compile_cases()


def matmul_int8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    dtype: torch.dtype,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply quantized tokens by a quantized weight.

    Args:
        x: int8 `[M, K]`, contiguous, K at most 131071; slow unless it is a multiple of 16.
        x_scale: float32 `[M]`, contiguous.
        weight: int8 `[N, K]`, contiguous.
        w_scale: float32 `[N]`, contiguous.
        dtype: bfloat16, float16 or float32.
        bias: float32 `[N]`, contiguous.
        residual: `dtype` `[M, N]`, contiguous.
        out: `dtype` `[M, N]`, columns contiguous, rows at any distance from N to 2**23: a slice of
            a packed buffer. Apart from all other arguments.

    Returns:
        `out`, or `dtype` `[M, N]`. Where kernels cannot run (see `runtime.why_not`; on sm_75 also
        where K or N is no multiple of 8) it is the reference's, which has the same bits.

    Raises:
        ValueError: a shape, dtype, stride or device is none of these.
    """
    _check(x, x_scale, weight, w_scale, dtype, bias, residual, out)
    (m, k), n = x.shape, len(weight)
    by_torch = (0, 0) < capability(x.device) < MIN_CAPABILITY
    if m == 0 or n == 0 or why_not(x.device) or (by_torch and (n % 8 or k % 8)):
        return reference(x, x_scale, weight, w_scale, dtype, bias=bias, residual=residual, out=out)
    out = torch.empty(m, n, dtype=dtype, device=x.device) if out is None else out
    with on_device(x):
        if by_torch:
            _by_torch(x, x_scale, weight, w_scale, bias, residual, out)
            return out
        tiles = _tiles(x.device, residual is not None)
        constants, options = _launch(tiles, even=k % tiles[2] == 0)
        launch: Any = kernel[(-(-m // tiles[0]) * -(-n // tiles[1]),)]
        launch(  # a pointer that is never read stands for what is absent
            x, weight, x_scale, w_scale, w_scale if bias is None else bias,
            out if residual is None else residual, out, m, n, k, out.stride(0),
            **constants, BIAS=bias is not None, RESIDUAL=residual is not None, **options,
        )  # fmt: skip
    return out


def _by_torch(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, w_scale: torch.Tensor,
    bias: torch.Tensor | None, residual: torch.Tensor | None, out: torch.Tensor,
) -> None:  # fmt: skip
    """Sums by `torch._int_mm`, a chunk of rows at a time; it needs more than 16."""
    for at in range(0, len(x), CHUNK_M):
        part = x[at : at + CHUNK_M]
        size = len(part)
        if size <= 16:
            part = torch.cat((part, part.new_zeros(17 - size, part.shape[1])))
        launch: Any = epilogue[(size, -(-len(weight) // EPILOGUE_TILE))]
        launch(
            torch._int_mm(part, weight.t()), x_scale[at:], w_scale,
            w_scale if bias is None else bias, (out if residual is None else residual)[at:],
            out[at:], size, len(weight), out.stride(0), TILE=EPILOGUE_TILE,
            BIAS=bias is not None, RESIDUAL=residual is not None, enable_fp_fusion=False,
        )  # fmt: skip


def _tiles(device: torch.device, residual: bool) -> tuple[int, ...]:
    """BM, BN, BK, warps and stages; WIDE has no registers left for a residual on sm_90."""
    tiles = TILES[max(first for first in TILES if first <= capability(device))]
    return NARROW if residual and tiles == WIDE else tiles


def _check(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, w_scale: torch.Tensor,
    dtype: torch.dtype, bias: torch.Tensor | None, residual: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:  # fmt: skip
    """Raise ValueError for what the kernels do not expect."""
    if x.ndim != 2 or weight.ndim != 2 or not 0 < x.shape[1] == weight.shape[1] <= MAX_K:
        raise ValueError(
            f"matmul_int8 needs x [M, K] and weight [N, K], K at most {MAX_K};"
            f" got x {list(x.shape)} and weight {list(weight.shape)}"
        )
    if dtype not in DTYPES:
        raise ValueError(f"matmul_int8 gives bfloat16, float16 or float32, not {dtype}")
    m, n = len(x), len(weight)
    for name, tensor, shape, wanted in (
        ("x", x, x.shape, torch.int8),
        ("weight", weight, weight.shape, torch.int8),
        ("x_scale", x_scale, (m,), torch.float32),
        ("w_scale", w_scale, (n,), torch.float32),
        ("bias", bias, (n,), torch.float32),
        ("residual", residual, (m, n), dtype),
        ("out", out, (m, n), dtype),
    ):
        if tensor is None:
            continue
        fits = tensor.shape == torch.Size(shape) and (name == "out" or tensor.is_contiguous())
        if not fits or tensor.dtype != wanted or tensor.device != x.device:
            raise ValueError(
                f"matmul_int8 needs {name} contiguous {wanted} {list(shape)} on {x.device}; got"
                f" {tensor.dtype} {list(tensor.shape)}, strides {tensor.stride()}, {tensor.device}"
            )
    strides = (n, 1) if out is None else out.stride()
    if strides[1] != 1 or not n <= strides[0] <= MAX_STRIDE:
        raise ValueError(
            f"matmul_int8 needs out with contiguous columns and a row stride from {n} to"
            f" {MAX_STRIDE}; got strides {strides}"
        )
