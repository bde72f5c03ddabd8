"""Quantize to Q6_K: sixteen sub-blocks of 16 weights with signed 8-bit scales.

    w[e] = (d * scales[e // 16]) * (q[e] - 32)        q in 0..63

    byte 0 ql[128], 128 qh[64], 192 int8 scales[16], 208 half d
    with n = e // 128, k = (e % 128) // 32, l = e % 32:
    ql[64*n + 32*(k % 2) + l] = low nibbles of q, those of k < 2 in bits 0-3
    qh[32*n + l] = bits 4, 5 of q as bits 2*k, 2*k + 1

Per sub-block nineteen grids are tried, 32 + 0.1*k steps to the weight of largest magnitude, and the
one kept whose least-squares scale leaves the least error, weighted with w**2.

Source: ggml `quantize_row_q6_K_ref`, `make_qx_quants`.
"""

from typing import Any

from zquant_kernels.quantize_k import COLUMN_POINTERS, OPTIONS, signed_max, tile, to_levels
from zquant_kernels.runtime import CompileCase, tl, triton

__all__ = ["COMPILE_CASES", "CONSTANTS", "QBLOCK_BYTES", "TILE", "kernel"]

TILE = tile(8)  # qblocks per program, 128 sub-blocks
QBLOCK_BYTES = 210
CONSTANTS: dict[str, Any] = {"TILE": TILE}
COMPILE_CASES: list[CompileCase] = []


@triton.jit
def fit(columns, mask, STRIDE):  # type: ignore[no-untyped-def]
    """Scale of each sub-block, 0 for zeros, and the `t` whose grid its levels lie on."""
    largest = tl.load(columns, mask=mask, other=0.0)
    below = columns
    for _ in range(15):
        below += STRIDE
        v = tl.load(below, mask=mask, other=0.0)
        largest = tl.where(tl.abs(v) > tl.abs(largest), v, largest)
    dead = tl.abs(largest) < 1e-15
    largest = tl.where(dead, 1.0, largest)
    scale, best, grid_t = tl.zeros_like(largest), tl.zeros_like(largest), tl.zeros_like(largest)
    k = tl.zeros_like(largest)
    for _ in range(19):
        t = tl.div_rn(-(32.0 + 0.1 * k), largest)
        p, q, below = tl.zeros_like(largest), tl.zeros_like(largest), columns
        for _ in range(16):
            v = tl.load(below, mask=mask, other=0.0)
            level = to_levels(v * t, -32.0, 31.0)
            p += ((v * v) * v) * level
            q += ((v * v) * level) * level
            below += STRIDE
        # k = 0 comes first and is what the others, -9..-1 and 1..9, have to beat
        better = (k == 0.0) | ((q > 0) & (p * p > best * q))
        new_scale = tl.where(q == 0, 0.0, tl.div_rn(p, q))
        scale = tl.where(better, new_scale, scale)
        best = tl.where(better, new_scale * p, best)
        grid_t = tl.where(better, t, grid_t)
        k = tl.where(k == 0.0, -9.0, tl.where(k == -1.0, 1.0, k + 1.0))
    return tl.where(dead, 0.0, scale), grid_t


@triton.jit
def eight_bit(scale):  # type: ignore[no-untyped-def]
    """Scales `[TILE, 16]` as a float16 unit, int32 multiples, and which qblocks are empty."""
    largest = signed_max(scale, 16)
    # maxima pass NaN by; the unit must not, so that weights too large are noticed
    unknown = tl.max((scale != scale).to(tl.int32), axis=1) > 0
    largest = tl.where(unknown, float("nan"), largest)
    empty = tl.abs(largest) < 1e-15
    t = tl.div_rn(-128.0, tl.where(empty, 1.0, largest))
    multiples = to_levels(t[:, None] * scale, -128.0, 127.0)
    multiples = tl.where(empty[:, None] | (multiples != multiples), 0.0, multiples)
    d = tl.where(empty, 0.0, tl.div_rn(1.0, t))
    return d.to(tl.float16), multiples.to(tl.int32), empty


@triton.jit
def halves(values, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A number per sub-block as two `[TILE, 8, 1]`: of k < 2, of the others."""
    low, high = tl.split(tl.permute(tl.reshape(values, (TILE, 2, 2, 4)), (0, 1, 3, 2)))
    return tl.reshape(low, (TILE, 8, 1)), tl.reshape(high, (TILE, 8, 1))


@triton.jit
def stored_levels(x, delta, scale, t):  # type: ignore[no-untyped-def]
    """Levels of `x [TILE, 8, 16]`, int32: those of the search where the stored scale is 0."""
    v = tl.where(delta == 0, x * t, tl.div_rn(x, delta))
    q = to_levels(v, -32.0, 31.0) + 32.0
    # a sub-block of zeros has no scale and, in ggml, no middle level
    q = tl.where((delta == 0) & (scale == 0), 0.0, q)
    return tl.where(q == q, q, 0.0).to(tl.int32)


@triton.jit
def kernel(x, columns, out, half, n_qblocks, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program stores `TILE` qblocks, one lane searching each sub-block."""
    first = tl.program_id(0).to(tl.int64) * TILE
    i = first + tl.arange(0, TILE)  # [TILE]
    mask = i < n_qblocks
    group = first * 16 + tl.arange(0, TILE * 16)
    STRIDE = n_qblocks * 16
    scale, t = fit(columns + group, group < STRIDE, STRIDE)
    scale = tl.reshape(scale, (TILE, 16))
    d, multiples, empty = eight_bit(scale)
    at = i * 210
    tl.store(half + at // 2 + 104, d, mask=mask)
    scales = out + at[:, None] + 192 + tl.arange(0, 16)[None, :]
    tl.store(scales, multiples.to(tl.uint8), mask=mask[:, None])

    delta0, delta1 = halves(d.to(tl.float32)[:, None] * multiples, TILE)
    scale0, scale1 = halves(scale, TILE)
    t0, t1 = halves(t, TILE)
    # sub-blocks 8n + 2k + h of k < 2 as c = 4n + 2k + h; those of k >= 2 lie 64 weights further on
    c, e = tl.arange(0, 8)[None, :, None], tl.arange(0, 16)[None, None, :]
    inner = c * 16 + e  # place in ql, [1, 8, 16]
    mask3 = mask[:, None, None]
    here = x + i[:, None, None] * 256 + (c // 4) * 64 + inner  # [TILE, 8, 16]
    q0 = stored_levels(tl.load(here, mask=mask3, other=0.0), delta0, scale0, t0)
    q1 = stored_levels(tl.load(here + 64, mask=mask3, other=0.0), delta1, scale1, t1)
    q0, q1 = tl.where(empty[:, None, None], 0, q0), tl.where(empty[:, None, None], 0, q1)
    nibbles = (q0 & 15) | ((q1 & 15) << 4)
    tl.store(out + at[:, None, None] + inner, nibbles.to(tl.uint8), mask=mask3)
    k2 = (c // 2) % 2 * 2
    high = ((q0 >> 4) << k2) | ((q1 >> 4) << (k2 + 4))
    high = tl.sum(tl.reshape(high, (TILE, 2, 2, 32)), axis=2)  # [TILE, 2, 32]
    n, k = tl.arange(0, 2)[None, :, None], tl.arange(0, 32)[None, None, :]
    tl.store(out + at[:, None, None] + 128 + n * 32 + k, high.to(tl.uint8), mask=mask3)


COMPILE_CASES.append(
    CompileCase(
        kernel=kernel,
        types={**COLUMN_POINTERS, "n_qblocks": "i32"},
        constants=CONSTANTS,
        options=OPTIONS,
        aligned=tuple(COLUMN_POINTERS),
    )
)
