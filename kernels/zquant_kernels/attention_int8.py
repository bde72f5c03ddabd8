"""Attention with int8 scores: full, without mask, over `[B, L, heads, head_dim]`.

    k'[n]   = k[n] - mean_n(k)                                 per batch and head
    S[m, n] = q_scale[m] * k_scale[n // 64] * sum_d q8[m, d] * k8[n, d]
    P[m, n] = 2^(S[m, n] - max_n S[m, n])
    out[m]  = sum_n P[m, n] * v[n] / sum_n P[m, n]

q8 and k8 are q and k' in 127 steps of the largest magnitude of a row of q and of 64 rows of k',
ties to even; `q_scale` contains log2(e) / sqrt(head_dim). The integer sums are exact. The softmax
is online and float32; P is rounded to v's dtype for the sums with v, which are float32.

Taking the mean off k changes no softmax. A channel that is large for every key, which k has in
practice, would leave few of the 127 steps to the others. One scale per row of q costs no
instruction in the loop; one per key would cost a product per score. A program quantizes its rows of
q itself; all programs read all of k', so k' goes through int8 scratch. The mean is torch's.

Source: SageAttention (arXiv 2410.02367), from the paper. It too smooths k and quantizes it in
blocks of 64 keys, but q in blocks of 128 rows, and sums P v in float16, which is twice as fast on
GeForce cards and can overflow: not here.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F

from zquant_kernels import runtime
from zquant_kernels.runtime import CompileCase, capability, on_device, tl, triton

__all__ = ["COMPILE_CASES", "HEAD_DIMS", "attention_int8", "k_reference", "quantize_k", "reference"]

HEAD_DIMS = (64, 128)
K_BLOCK = 64  # keys that share a scale
TINY = 1e-30  # instead of the maximum of zeros: its reciprocal is finite
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIN_CAPABILITY = (8, 0)  # Triton has no integer matrix instruction for older ones
REFERENCE_SCORES = 2**24  # float32 scores of the reference that exist at a time
# head_dim -> BM, BN, warps, stages, for every capability: no GPU has timed them. Chosen for 16 rows
# per warp, the most that compile without a spill, and two tiles of keys in flight in the 99 KiB of
# shared memory of sm_86, 89, 120. Triton 3.6 to 3.9: 64 -> 113 to 206 registers, 29 KiB (41 KiB on
# sm_90, 100); 128 -> 206 to 254 registers, 65 KiB (89 KiB), so one program per multiprocessor.
TILES = {64: (64, 64, 4, 3), 128: (128, 64, 8, 3)}
INTERPRETER_TILES = (32, 32, 4, 1)
COMPILE_CASES: list[CompileCase] = []


def k_reference(k: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Same contract as `quantize_k`, in plain torch, on any device."""
    b, length, heads, head_dim = k.shape
    x = (k.float() - mean[:, None]).transpose(1, 2)  # [B, heads, L, head_dim]
    x = F.pad(x, (0, 0, 0, -length % K_BLOCK))
    blocks = x.view(b, heads, -(-length // K_BLOCK), K_BLOCK, head_dim)
    top = blocks.abs().amax((3, 4)).clamp_min(TINY)  # [B, heads, blocks]
    q8 = _to_int8(blocks, top[..., None, None]).flatten(2, 3)[:, :, :length]
    return q8.contiguous(), top * (1 / 127)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Same contract as `attention_int8`, in plain torch, on any device; P stays float32."""
    b, length, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=v.dtype, device=v.device)
    k8, k_scale = k_reference(k, _mean(k))
    k_float, v_float = k8.float().transpose(2, 3), v.float().transpose(1, 2)
    k_scale = k_scale.repeat_interleave(K_BLOCK, dim=2)[:, :, None, :length]
    rows = max(1, REFERENCE_SCORES // max(1, b * heads * length))
    for start in range(0, length, rows):
        here = slice(start, start + rows)
        x = q[:, here].float().transpose(1, 2)  # [B, heads, rows, head_dim]
        top = x.abs().amax(-1, keepdim=True).clamp_min(TINY)
        # float32 holds every sum exactly: it is at most 127**2 * 128
        scores = _to_int8(x, top).float() @ k_float
        scores.mul_(top * (1 / 127) * _factor(head_dim)).mul_(k_scale)
        p = scores.sub_(scores.amax(-1, keepdim=True)).exp2_()
        out[:, here] = (p @ v_float / p.sum(-1, keepdim=True)).transpose(1, 2).to(v.dtype)
    return out


def _to_int8(x: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    # a tensor above the line: torch multiplies a number by the reciprocal, which is not IEEE
    y = (x * (torch.full_like(top, 127.0) / top)).clamp(-127.0, 127.0)
    return torch.round(y).to(torch.int8)


def _mean(k: torch.Tensor) -> torch.Tensor:
    return k.mean(1, dtype=torch.float32).contiguous()


def _factor(head_dim: int) -> float:
    return math.log2(math.e) / math.sqrt(head_dim)


@triton.jit
def to_int8(x, top):  # type: ignore[no-untyped-def]
    """float32 `x`, no larger than `top`, in steps of `top` / 127."""
    # the bounds change nothing, but keep the product out of a fused addition, which rounds once
    y = tl.minimum(tl.maximum(x * tl.div_rn(127.0, top), -127.0), 127.0)
    # 1.5 * 2**23: the sum has no fraction bits left, so the addition rounds half to even
    return ((y + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def k_kernel(  # type: ignore[no-untyped-def]
    k, mean, k8, k_scale, L, heads, k_b, k_l, k_h,
    D: tl.constexpr, K_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program quantizes `K_BLOCK` keys of one head."""
    block, head = tl.program_id(0), tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    head = head.to(tl.int64)
    n = block * K_BLOCK + tl.arange(0, K_BLOCK)[:, None]  # [K_BLOCK, 1]
    d = tl.arange(0, D)[None, :]  # [1, D]
    at = k + b * k_b + h * k_h + n.to(tl.int64) * k_l + d
    x = tl.load(at, mask=n < L, other=0.0).to(tl.float32) - tl.load(mean + head * D + d)
    x = tl.where(n < L, x, 0.0)
    top = tl.maximum(tl.max(tl.abs(x)), 1e-30)
    tl.store(k8 + (head * L + n) * D + d, to_int8(x, top), mask=n < L)
    tl.store(k_scale + head * tl.num_programs(0) + block, top * (1 / 127))


@triton.jit
def step(  # type: ignore[no-untyped-def]
    q8, q_scale, k8, k_scale, v, v_l, n, d, total, weight, top, left, LAST: tl.constexpr
):  # fmt: skip
    """Add keys `n [BN]` to `total [BM, D]` = P v, `weight [BM]` = sum of P, `top [BM]` = max S.

    Of the `LAST` ones only `left` exist; the others read the last key, and their P is 0.
    """
    at = (tl.minimum(n, left - 1) if LAST else n)[:, None]
    k_tile = tl.load(k8 + at * d.shape[1] + d)
    # loaded [BN, D] and turned: as [D, BN] the registers double in Triton 3.8 and 3.9
    sums = tl.dot(q8, tl.trans(k_tile), out_dtype=tl.int32).to(tl.float32)
    unit = tl.load(k_scale)
    # this order keeps a change of q_scale's layout out of the loop
    higher = tl.maximum(top, tl.max(sums, axis=1) * q_scale * unit)
    p = tl.exp2(sums * (q_scale * unit)[:, None] - higher[:, None])
    if LAST:
        p = tl.where((n < left)[None, :], p, 0.0)
    shrink = tl.exp2(top - higher)
    # loaded only now: its registers are taken during the softmax otherwise, and some spill
    v_tile = tl.load(v + at.to(tl.int64) * v_l + d)
    total = tl.dot(p.to(v_tile.dtype), v_tile, total * shrink[:, None])
    return total, weight * shrink + tl.sum(p, axis=1), higher


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    q, k8, k_scale, v, out, L, heads, q_factor, q_b, q_l, q_h, v_b, v_l, v_h,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, K_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program computes `BM` rows of one head."""
    head = tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    m = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    n = tl.arange(0, BN)  # [BN]
    d = tl.arange(0, D)[None, :]  # [1, D]
    # rows past the end read the last row: in bounds, and never stored
    row = tl.minimum(m, L - 1).to(tl.int64)[:, None]
    x = tl.load(q + b * q_b + h * q_h + row * q_l + d).to(tl.float32)
    x_top = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-30)
    q8, q_scale = to_int8(x, x_top[:, None]), x_top * (1 / 127) * q_factor
    k8 += head.to(tl.int64) * L * D
    k_scale += head * tl.cdiv(L, K_BLOCK)
    v += b * v_b + h * v_h
    total = tl.zeros((BM, D), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    whole = L // BN * BN
    for start in range(0, whole, BN):
        unit = k_scale + start // K_BLOCK
        total, weight, top = step(
            q8, q_scale, k8, unit, v, v_l, n, d, total, weight, top, BN, False
        )
        k8 += BN * D
        v += tl.cast(v_l, tl.int64) * BN
    if whole < L:
        unit = k_scale + whole // K_BLOCK
        total, weight, top = step(
            q8, q_scale, k8, unit, v, v_l, n, d, total, weight, top, L - whole, True
        )
    at = out + ((b * L + m[:, None]) * heads + h) * D + d
    y = total / weight[:, None]
    tl.store(at, y.to(out.dtype.element_ty), mask=(m < L)[:, None])


COMPILE_CASES += [
    CompileCase(
        kernel=k_kernel,
        types={
            "k": k, "mean": "*fp32", "k8": "*i8", "k_scale": "*fp32", "L": "i32", "heads": "i32",
            "k_b": "i32", "k_l": "i32", "k_h": "i32",
        },
        constants={"D": head_dim, "K_BLOCK": K_BLOCK},
        options={"num_warps": 4, "enable_fp_fusion": True},
        aligned=("k", "mean", "k8", "k_scale", "k_b", "k_l", "k_h"),
        min_arch=80,
    )
    for k in ("*bf16", "*fp16")
    for head_dim in HEAD_DIMS
]  # fmt: skip
COMPILE_CASES += [
    CompileCase(
        kernel=kernel,
        types={
            "q": x, "k8": "*i8", "k_scale": "*fp32", "v": x, "out": x, "L": "i32", "heads": "i32",
            "q_factor": "fp32", "q_b": "i32", "q_l": "i32", "q_h": "i32",
            "v_b": "i32", "v_l": "i32", "v_h": "i32",
        },
        constants={"D": head_dim, "BM": bm, "BN": bn, "K_BLOCK": K_BLOCK},
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
        aligned=("q", "k8", "k_scale", "v", "out", "q_b", "q_l", "q_h", "v_b", "v_l", "v_h"),
        min_arch=80,
        matmul=True,
    )
    for x in ("*bf16", "*fp16")
    for head_dim, (bm, bn, warps, stages) in TILES.items()
]  # fmt: skip


def quantize_k(k: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize keys less their mean.

    Args:
        k: as `attention_int8` has checked it, and not empty.
        mean: float32 `[B, heads, head_dim]`, contiguous.

    Returns:
        `(k8, k_scale)`: int8 `[B, heads, L, head_dim]`, float32 `[B, heads, cdiv(L, 64)]`.
    """
    b, length, heads, head_dim = k.shape
    k8 = torch.empty(b, heads, length, head_dim, dtype=torch.int8, device=k.device)
    blocks = -(-length // K_BLOCK)
    k_scale = torch.empty(b, heads, blocks, dtype=torch.float32, device=k.device)
    launch: Any = k_kernel[(blocks, b * heads)]
    with on_device(k):
        launch(
            k, mean, k8, k_scale, length, heads, *k.stride()[:3],
            D=head_dim, K_BLOCK=K_BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return k8, k_scale


def attention_int8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, the scores from int8 products.

    Args:
        q: bfloat16, float16 or float32 `[B, L, heads, head_dim]`, finite; head_dim is 64 or 128.
            Heads are contiguous, other strides are free: q, k, v may be views of one buffer.
        k: as `q`.
        v: as `q`.

    Returns:
        `[B, L, heads, head_dim]` of the same dtype, contiguous. It is the reference's for float32,
        below compute capability 8.0 and where no kernel can run (see `runtime.why_not`).

    Raises:
        ValueError: a shape, dtype, stride or device is none of these.
    """
    _check(q, k, v)
    old = q.is_cuda and capability(q.device) < MIN_CAPABILITY
    if q.numel() == 0 or q.dtype == torch.float32 or old or runtime.why_not(q.device):
        return reference(q, k, v)
    b, length, heads, head_dim = q.shape
    k8, k_scale = quantize_k(k, _mean(k))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    bm, bn, warps, stages = TILES[head_dim] if q.is_cuda else INTERPRETER_TILES
    launch: Any = kernel[(-(-length // bm), b * heads)]
    with on_device(q):
        launch(
            q, k8, k_scale, v, out, length, heads, _factor(head_dim),
            *q.stride()[:3], *v.stride()[:3], D=head_dim, BM=bm, BN=bn, K_BLOCK=K_BLOCK,
            num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise ValueError for what the kernels do not expect."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.dtype not in DTYPES:
            raise ValueError(
                f"attention_int8 needs {name} [B, L, heads, head_dim] in bfloat16, float16 or"
                f" float32; got {x.dtype} {list(x.shape)}"
            )
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"attention_int8 needs {name} like q, {q.dtype} {list(q.shape)} on {q.device};"
                f" got {x.dtype} {list(x.shape)} on {x.device}"
            )
        if x.stride(3) != 1:
            raise ValueError(
                f"attention_int8 needs {name} with contiguous heads; got strides {x.stride()}"
            )
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(f"attention_int8 needs a head_dim of 64 or 128; got {q.shape[3]}")
