"""GroupNorm and SiLU over `[B, C, H, W]`, in one pass for the statistics and one for the result.

    y[b, c]   = (x[b, c] - mean[b, g]) / sqrt(variance[b, g] + eps) * weight[c] + bias[c]
    out[b, c] = y[b, c] / (1 + exp(-y[b, c]))                         g = c // (C / groups)

Statistics are float32. A group is cut into parts; a program finds mean and M2, the sum of squared
differences from it, of one part, and parts are joined by Chan's formula,

    n = n1 + n2        mean = mean1 + (mean2 - mean1) * n2 / n
    M2 = M2_1 + M2_2 + (mean2 - mean1)^2 * n1 * n2 / n

which subtracts no large numbers. Everything is computed less the group's first element, the pivot:
a mean far from zero has no float32 as exact as the small differences around it need.

Source: Group Normalization (arXiv 1803.08494); Chan, Golub, LeVeque 1979.
"""

from typing import Any

import torch
import torch.nn.functional as F

from zquant_kernels.runtime import CompileCase, on_device, tl, triton, why_not

__all__ = ["COMPILE_CASES", "groupnorm_silu", "reference"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILE = 4096  # elements that a program holds at a time
MAX_PARTS = 64  # of a group, a power of two: every program that applies reads the numbers of all
WARPS = 8
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}
COMPILE_CASES: list[CompileCase] = []


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    *,
    silu: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same contract as `groupnorm_silu`, in plain torch, on any device."""
    weight, bias = weight.float(), bias.float()
    if x.dtype == torch.float32:
        y = torch.group_norm(x, groups, weight, bias, eps)
        y = F.silu(y, inplace=True) if silu else y
        return y if out is None else out.copy_(y)
    out = torch.empty_like(x) if out is None else out
    width = x.shape[1] // groups
    # group by group: the float32 copies of a whole picture would be the largest tensors of all
    for at in range(0, x.shape[1], width):
        c = slice(at, at + width)
        y = torch.group_norm(x[:, c].float(), 1, weight[c], bias[c], eps)
        out[:, c] = F.silu(y, inplace=True) if silu else y
    return out


@triton.jit
def parts_kernel(x, pivots, means, m2s, n, part, parts, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program reduces one part, `part` of the `n` elements of a group."""
    pid = tl.program_id(0)
    x += (pid // parts).to(tl.int64) * n
    pivot = tl.load(x).to(tl.float32)
    start = (pid % parts).to(tl.int64) * part
    x += start
    size = tl.minimum(n - start, part).to(tl.int32)
    i = tl.arange(0, TILE)
    count, mean, m2 = 0.0, 0.0, 0.0
    for at in range(0, size, TILE):
        inside = i < size - at
        value = tl.load(x + i, mask=inside, other=0.0).to(tl.float32) - pivot
        x += TILE
        tile_count = tl.minimum(size - at, TILE).to(tl.float32)
        tile_mean = tl.sum(tl.where(inside, value, 0.0)) / tile_count
        apart = tl.where(inside, value - tile_mean, 0.0)
        both = count + tile_count
        step = tile_mean - mean
        mean += step * (tile_count / both)
        m2 += tl.sum(apart * apart) + step * step * (count * tile_count / both)
        count = both
    tl.store(pivots + pid, pivot)
    tl.store(means + pid, mean)
    tl.store(m2s + pid, m2)


@triton.jit
def apply_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, out, pivots, means, m2s, C, channels, HW, n, part, parts, eps,
    SILU: tl.constexpr, TILE: tl.constexpr, MAX_PARTS: tl.constexpr,
):  # fmt: skip
    """One program finishes `TILE` elements of one channel; a group has `channels`."""
    tiles = tl.cdiv(HW, TILE)
    pid = tl.program_id(0)
    channel = pid // tiles  # b * C + c
    p = tl.arange(0, MAX_PARTS)
    part_at = channel // channels * parts + p
    mean = tl.load(means + part_at, mask=p < parts, other=0.0)
    m2 = tl.load(m2s + part_at, mask=p < parts, other=0.0)
    count = tl.maximum(tl.minimum(n - p.to(tl.int64) * part, part), 0).to(tl.float32)
    total = tl.sum(count)
    center = tl.sum(mean * count) / total
    m2 = tl.sum(m2 + (mean - center) * (mean - center) * count)
    scale = tl.load(weight + channel % C).to(tl.float32) / tl.sqrt(m2 / total + eps)
    shift = tl.load(bias + channel % C).to(tl.float32)
    pivot = tl.load(pivots + channel // channels * parts)
    i = pid % tiles * TILE + tl.arange(0, TILE)
    inside = i < HW
    x += channel.to(tl.int64) * HW
    out += channel.to(tl.int64) * HW
    value = tl.load(x + i, mask=inside, other=pivot).to(tl.float32)
    y = (value - pivot - center) * scale + shift
    if SILU:
        y *= tl.sigmoid(y)
    tl.store(out + i, y.to(out.dtype.element_ty), mask=inside)


_FOUND = {"pivots": "*fp32", "means": "*fp32", "m2s": "*fp32"}
_SIZES = {"n": "i32", "part": "i32", "parts": "i32"}
COMPILE_CASES += [
    CompileCase(
        kernel=parts_kernel,
        types={"x": x, **_FOUND, **_SIZES},
        constants={"TILE": TILE},
        options=OPTIONS,
        aligned=("x", *_FOUND, "n", "part"),
    )
    for x in ("*bf16", "*fp16", "*fp32")
]
COMPILE_CASES += [
    CompileCase(
        kernel=apply_kernel,
        types={
            "x": x, "weight": x, "bias": x, "out": x, **_FOUND,
            "C": "i32", "channels": "i32", "HW": "i32", **_SIZES, "eps": "fp32",
        },
        constants={"SILU": True, "TILE": TILE, "MAX_PARTS": MAX_PARTS},
        options=OPTIONS,
        aligned=("x", "weight", "bias", "out", *_FOUND, "C", "HW", "n", "part"),
    )
    for x in ("*bf16", "*fp16", "*fp32")
]  # fmt: skip


def groupnorm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    *,
    silu: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalize every group of channels of every image, scale and shift its channels, apply SiLU.

    Args:
        x: bfloat16, float16 or float32 `[B, C, H, W]`, contiguous.
        weight: `[C]` of such a dtype, contiguous.
        bias: as `weight`.
        groups: a divisor of C.
        eps: added to the variance.
        silu: False leaves SiLU out.
        out: where to write, like `x`, or `x` itself; new by default.

    Returns:
        `out`. Where kernels cannot run (see `runtime.why_not`) it is the reference's.

    Raises:
        ValueError: a shape, dtype, stride or device is none of these.
    """
    _check(x, weight, bias, groups, out)
    if x.numel() == 0 or why_not(x.device):
        return reference(x, weight, bias, groups, eps, silu=silu, out=out)
    out = torch.empty_like(x) if out is None else out
    b, c, hw = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    channels = c // groups
    n = channels * hw
    part = TILE * -(-n // (TILE * MAX_PARTS))
    parts = -(-n // part)
    found = torch.empty(3, b * groups * parts, dtype=torch.float32, device=x.device)
    first: Any = parts_kernel[(b * groups * parts,)]
    second: Any = apply_kernel[(b * c * -(-hw // TILE),)]
    with on_device(x):
        first(x, *found, n, part, parts, TILE=TILE, **OPTIONS)
        second(
            x, weight, bias, out, *found, c, channels, hw, n, part, parts, eps,
            SILU=silu, TILE=TILE, MAX_PARTS=MAX_PARTS, **OPTIONS,
        )  # fmt: skip
    return out


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    out: torch.Tensor | None,
) -> None:
    """Raise ValueError for what the kernels do not expect."""
    if x.ndim != 4 or x.dtype not in DTYPES or not x.is_contiguous():
        raise ValueError(
            "groupnorm_silu needs x [B, C, H, W], contiguous, in bfloat16, float16 or float32;"
            f" got {x.dtype} {list(x.shape)}, strides {x.stride()}"
        )
    c = x.shape[1]
    if groups < 1 or c % groups:
        raise ValueError(f"groupnorm_silu needs groups that divide {c} channels; got {groups}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.shape != (c,) or vector.dtype not in DTYPES or not vector.is_contiguous():
            raise ValueError(
                f"groupnorm_silu needs {name} [{c}], contiguous, in bfloat16, float16 or float32;"
                f" got {vector.dtype} {list(vector.shape)}, strides {vector.stride()}"
            )
        if vector.device != x.device:
            raise ValueError(f"groupnorm_silu needs {name} on {x.device}; got {vector.device}")
    if out is None:
        return
    if (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"groupnorm_silu needs out like x, {x.dtype} {list(x.shape)} on {x.device};"
            f" got {out.dtype} {list(out.shape)} on {out.device}"
        )
    if not out.is_contiguous():
        raise ValueError(f"groupnorm_silu needs out contiguous; got strides {out.stride()}")
