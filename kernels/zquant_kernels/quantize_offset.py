"""Quantize to Q4_K and Q5_K: eight sub-blocks of 32 weights with 6-bit scales and minimums.

    w[e] = (d * sc[s]) * q[e] - (dmin * mn[s])        s = e // 32, q in 0..TOP

    byte 0 half d, 2 half dmin, 4 scales[12], then qh[32] for Q5_K, then qs[128]
    qs[32*c + l] = low nibbles of q[64*c + l] and q[64*c + 32 + l];  bit s of qh[l]: bit 4 of q

Per sub-block a short list of grids is tried and the one of least weighted squared error kept:
grid k spans TOP + FIRST + STEP*k steps from the best offset so far to the largest weight, and the
scale and offset of its levels follow by least squares.

Source: ggml `quantize_row_q4_K_ref`, `make_qkx2_quants`.
"""

from typing import Any

from zquant_kernels.quantize_k import COLUMN_POINTERS, OPTIONS, round_even, tile, to_levels
from zquant_kernels.runtime import CompileCase, tl, triton

__all__ = ["COMPILE_CASES", "CONSTANTS", "QBLOCK_BYTES", "TILE", "kernel"]

TILE = tile(16)  # qblocks per program, 128 sub-blocks
QBLOCK_BYTES = {"Q4_K": 144, "Q5_K": 176}
CONSTANTS: dict[str, dict[str, Any]] = {
    "Q4_K": {"TOP": 15.0, "FIRST": -1.0, "STEP": 0.1, "N_GRIDS": 21, "TILE": TILE},
    "Q5_K": {"TOP": 31.0, "FIRST": -0.5, "STEP": 0.1, "N_GRIDS": 16, "TILE": TILE},
}
COMPILE_CASES: list[CompileCase] = []


@triton.jit
def squared_error(  # type: ignore[no-untyped-def]
    columns, mask, STRIDE, rms, grid_offset, t, scale, offset, TOP: tl.constexpr
):
    """Weighted squared error of the grid's levels, decoded with `scale` and `offset`."""
    error = tl.zeros_like(rms)
    for _ in range(32):
        v = tl.load(columns, mask=mask, other=0.0)
        difference = (to_levels((v - grid_offset) * t, 0.0, TOP) * scale + offset) - v
        error += (difference * difference) * (rms + tl.abs(v))
        columns += STRIDE
    return error


@triton.jit
def least_squares(  # type: ignore[no-untyped-def]
    columns, mask, STRIDE, rms, sum_w, sum_wx, grid_offset, t, TOP: tl.constexpr
):
    """Best scale, best offset <= 0 and determinant for the levels; > 0 where there is a fit."""
    a, b, c = tl.zeros_like(rms), tl.zeros_like(rms), tl.zeros_like(rms)
    for _ in range(32):
        v = tl.load(columns, mask=mask, other=0.0)
        level = to_levels((v - grid_offset) * t, 0.0, TOP)
        wl = (rms + tl.abs(v)) * level
        a += wl
        b += wl * level
        c += wl * v
        columns += STRIDE
    determinant = sum_w * b - a * a
    scale = tl.div_rn(sum_w * c - sum_wx * a, determinant)
    offset = tl.div_rn(b * sum_wx - a * c, determinant)
    scale = tl.where(offset > 0, tl.div_rn(c, b), scale)
    return scale, tl.where(offset > 0, 0.0, offset), determinant


@triton.jit
def ranges(columns, mask, STRIDE):  # type: ignore[no-untyped-def]
    """Of each sub-block: smallest weight or 0, largest, root mean square, sums of w and w*x."""
    lo = tl.load(columns, mask=mask, other=0.0)
    hi, power, below = lo, tl.zeros_like(lo), columns
    for _ in range(32):
        v = tl.load(below, mask=mask, other=0.0)
        lo, hi, power = tl.minimum(lo, v), tl.maximum(hi, v), power + v * v
        below += STRIDE
    rms = tl.sqrt_rn(power * 0.03125)
    sum_w, sum_wx = tl.zeros_like(rms), tl.zeros_like(rms)
    for _ in range(32):
        v = tl.load(columns, mask=mask, other=0.0)
        w = rms + tl.abs(v)
        sum_w += w
        sum_wx += w * v
        columns += STRIDE
    return tl.minimum(lo, 0.0), hi, rms, sum_w, sum_wx


@triton.jit
def fit(  # type: ignore[no-untyped-def]
    columns, mask, STRIDE,
    TOP: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr, N_GRIDS: tl.constexpr,
):  # fmt: skip
    """Scale and minimum of each sub-block, and the grid (offset, t) that its levels lie on."""
    lo, hi, rms, sum_w, sum_wx = ranges(columns, mask, STRIDE)
    flat = hi == lo
    k = tl.zeros_like(rms)
    t = tl.div_rn(TOP, tl.where(flat, 1.0, hi - lo))
    scale, offset, grid_offset, grid_t = tl.div_rn(1.0, t), lo, lo, t
    error = squared_error(columns, mask, STRIDE, rms, lo, t, scale, lo, TOP)
    for _ in range(N_GRIDS):
        t = tl.div_rn((FIRST + STEP * k) + TOP, hi - offset)
        new_scale, new_offset, determinant = least_squares(
            columns, mask, STRIDE, rms, sum_w, sum_wx, offset, t, TOP
        )
        new_error = squared_error(columns, mask, STRIDE, rms, offset, t, new_scale, new_offset, TOP)
        better = (determinant > 0) & (new_error < error)
        grid_offset = tl.where(better, offset, grid_offset)
        grid_t = tl.where(better, t, grid_t)
        scale = tl.where(better, new_scale, scale)
        offset = tl.where(better, new_offset, offset)
        error = tl.where(better, new_error, error)
        k += 1.0
    return tl.where(flat, 0.0, scale), -offset, grid_offset, grid_t


@triton.jit
def six_bit(values):  # type: ignore[no-untyped-def]
    """`[TILE, 8]` as a float16 unit `[TILE]` and 6-bit multiples of it, int32 `[TILE, 8]`."""
    top = tl.max(values, axis=1)
    top = tl.where(top > 0, top, 0.0)
    inverse = tl.where(top > 0, tl.div_rn(63.0, top), 0.0)
    multiples = round_even(inverse[:, None] * values)
    # the unit is 0 where the inverse overflows, and so are multiples
    multiples = tl.where(tl.abs(multiples) < 4194304.0, multiples, 0.0).to(tl.int32)
    # ggml keeps them in a byte before limiting: a negative multiple becomes the largest
    multiples = tl.minimum(multiples & 255, 63)
    return tl.div_rn(top, 63.0).to(tl.float16), multiples


@triton.jit
def store_scales(out, at, mask, sc, mn, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pack 6-bit numbers `[TILE, 8]` into 12 bytes from `out + at` on."""
    sc0, sc4 = tl.split(tl.permute(tl.reshape(sc, (TILE, 2, 4)), (0, 2, 1)))  # [TILE, 4]
    mn0, mn4 = tl.split(tl.permute(tl.reshape(mn, (TILE, 2, 4)), (0, 2, 1)))
    to = out + at[:, None] + tl.arange(0, 4)[None, :]
    tl.store(to, (sc0 | ((sc4 >> 4) << 6)).to(tl.uint8), mask=mask[:, None])
    tl.store(to + 4, (mn0 | ((mn4 >> 4) << 6)).to(tl.uint8), mask=mask[:, None])
    tl.store(to + 8, ((sc4 & 15) | ((mn4 & 15) << 4)).to(tl.uint8), mask=mask[:, None])


@triton.jit
def halves(values, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A number per sub-block as two `[TILE, 4, 1]`: of even sub-blocks, of odd ones."""
    even, odd = tl.split(tl.reshape(values, (TILE, 4, 2)))
    return even[:, :, None], odd[:, :, None]


@triton.jit
def stored_levels(x, delta, theta, offset, t, TOP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Levels of `x [TILE, 4, 32]`, int32: those of the search where the stored scale is 0."""
    v = tl.where(delta == 0, (x - offset) * t, tl.div_rn(x + theta, delta))
    q = to_levels(v, 0.0, TOP)
    return tl.where(q == q, q, 0.0).to(tl.int32)


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    x, columns, out, half, n_qblocks,
    TOP: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr, N_GRIDS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """One program stores `TILE` qblocks, one lane searching each sub-block."""
    first = tl.program_id(0).to(tl.int64) * TILE
    i = first + tl.arange(0, TILE)  # [TILE]
    mask = i < n_qblocks
    group = first * 8 + tl.arange(0, TILE * 8)
    STRIDE = n_qblocks * 8
    scale, minimum, offset, t = fit(
        columns + group, group < STRIDE, STRIDE, TOP, FIRST, STEP, N_GRIDS
    )
    d, sc = six_bit(tl.reshape(scale, (TILE, 8)))
    dmin, mn = six_bit(tl.reshape(minimum, (TILE, 8)))
    qblock_bytes: tl.constexpr = 176 if TOP > 15 else 144
    at = i * qblock_bytes
    tl.store(half + at // 2, d, mask=mask)
    tl.store(half + at // 2 + 1, dmin, mask=mask)
    store_scales(out, at + 4, mask, sc, mn, TILE)

    delta0, delta1 = halves(d.to(tl.float32)[:, None] * sc, TILE)
    theta0, theta1 = halves(dmin.to(tl.float32)[:, None] * mn, TILE)
    offset0, offset1 = halves(offset, TILE)
    t0, t1 = halves(t, TILE)
    # sub-blocks 2c and 2c + 1 share bytes
    c, k = tl.arange(0, 4)[None, :, None], tl.arange(0, 32)[None, None, :]
    here = x + i[:, None, None] * 256 + c * 64 + k  # [TILE, 4, 32]
    x0 = tl.load(here, mask=mask[:, None, None], other=0.0)
    x1 = tl.load(here + 32, mask=mask[:, None, None], other=0.0)
    q0 = stored_levels(x0, delta0, theta0, offset0, t0, TOP)
    q1 = stored_levels(x1, delta1, theta1, offset1, t1, TOP)
    nibbles = (q0 & 15) | ((q1 & 15) << 4)
    qs = out + at[:, None, None] + (qblock_bytes - 128) + c * 32 + k
    tl.store(qs, nibbles.to(tl.uint8), mask=mask[:, None, None])
    if TOP > 15:
        fifth = ((q0 >> 4) << (2 * c)) | ((q1 >> 4) << (2 * c + 1))
        qh = out + at[:, None] + 16 + tl.arange(0, 32)[None, :]
        tl.store(qh, tl.sum(fifth, axis=1).to(tl.uint8), mask=mask[:, None])


COMPILE_CASES += [
    CompileCase(
        kernel=kernel,
        types={**COLUMN_POINTERS, "n_qblocks": "i32"},
        constants=constants,
        options=OPTIONS,
        aligned=tuple(COLUMN_POINTERS),
    )
    for constants in CONSTANTS.values()
]
