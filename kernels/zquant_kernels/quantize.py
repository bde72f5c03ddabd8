"""Quantize weights on the GPU; and the kernel of the types without a search.

Q8_0, Q5_0 and Q4_0: 32 weights share one float16 scale, that of their largest magnitude.

    Q8_0    d = max |w| / 127          q = round(w / d), halves away from 0      34 bytes
    Q5_0    d = signed max / -16       q = trunc(w / d + 16.5), at most 31       22 bytes
    Q4_0    d = signed max / -8        q = trunc(w / d + 8.5), at most 15        18 bytes

    byte 0 half d, then u32 qh for Q5_0 (bit e: bit 4 of q[e]), then Q8_0: int8 q[32],
    otherwise qs[16], q[e] in the low and q[e + 16] in the high nibble

Bytes are those of ggml's reference quantizers without importance weights. There is no torch
reference here: it is `zquant.quant`, which this package does not know, and the tests compare.

Source: ggml `quantize_row_q8_0_ref`, `quantize_row_q5_0_ref`, `quantize_row_q4_0_ref`.
"""

from dataclasses import dataclass
from typing import Any

import torch

from zquant_kernels import quantize_offset, quantize_q6_k
from zquant_kernels.quantize_k import OPTIONS, POINTERS, signed_max, tile
from zquant_kernels.runtime import CompileCase, on_device, tl, triton, why_not

__all__ = ["COMPILE_CASES", "QTYPES", "kernel", "quantize"]

QBLOCK = 32
TILE = tile(64)  # qblocks per program
COMPILE_CASES: list[CompileCase] = []


@triton.jit
def levels(x, inverse, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Levels of `x [TILE, 16]`, int32; where the inverse of a tiny scale overflows, 0."""
    v = x * inverse[:, None]
    if BITS == 8:
        # truncating v + this rounds halves away from 0 and nothing else up
        v = tl.where(v < 0, v - 0.49999997, v + 0.49999997)
    else:
        v = v + (2 ** (BITS - 1) + 0.5)
    q = tl.where(tl.abs(v) < 256.0, v, 0.0).to(tl.int32)
    if BITS != 8:
        q = tl.minimum(q, 2**BITS - 1)
    return q


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    x, out, half, n_qblocks, BITS: tl.constexpr, QBLOCK_BYTES: tl.constexpr, TILE: tl.constexpr
):
    """One program stores `TILE` qblocks."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)  # [TILE]
    mask, e = i < n_qblocks, tl.arange(0, 16)[None, :]
    here, to = x + i[:, None] * 32, out + i[:, None] * QBLOCK_BYTES
    both = tl.load(here + tl.arange(0, 32)[None, :], mask=mask[:, None], other=0.0)  # [TILE, 32]
    if BITS == 8:
        largest, divisor = tl.max(tl.abs(both), axis=1), 127.0
    else:
        largest, divisor = signed_max(both, 32), -(2.0 ** (BITS - 1))
    d = tl.div_rn(largest, divisor)
    tl.store(half + i * (QBLOCK_BYTES // 2), d.to(tl.float16), mask=mask)
    inverse = tl.where(d == 0, 0.0, tl.div_rn(1.0, d))
    q0 = levels(tl.load(here + e, mask=mask[:, None], other=0.0), inverse, BITS)
    q1 = levels(tl.load(here + 16 + e, mask=mask[:, None], other=0.0), inverse, BITS)
    if BITS == 8:
        tl.store(to + 2 + e, q0.to(tl.uint8), mask=mask[:, None])
        tl.store(to + 18 + e, q1.to(tl.uint8), mask=mask[:, None])
    else:
        nibbles = (q0 & 15) | ((q1 & 15) << 4)
        tl.store(to + (QBLOCK_BYTES - 16) + e, nibbles.to(tl.uint8), mask=mask[:, None])
    if BITS == 5:
        fifth = tl.sum(((q0 >> 4) << e) | ((q1 >> 4) << (e + 16)), axis=1)
        byte = tl.arange(0, 4)[None, :]
        qh = (fifth[:, None] >> (8 * byte)) & 255
        tl.store(to + 2 + byte, qh.to(tl.uint8), mask=mask[:, None])


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How one qtype is stored: its qblock, the kernel that does it, and what it searches."""

    qblock: int
    qblock_bytes: int
    subblock: int = 0
    kernel: Any
    constants: dict[str, Any]


def _simple(bits: int, qblock_bytes: int) -> Form:
    constants = {"BITS": bits, "QBLOCK_BYTES": qblock_bytes, "TILE": TILE}
    return Form(qblock=QBLOCK, qblock_bytes=qblock_bytes, kernel=kernel, constants=constants)


FORMS = {
    "Q8_0": _simple(8, 34),
    "Q5_0": _simple(5, 22),
    "Q4_0": _simple(4, 18),
    "Q6_K": Form(
        qblock=256,
        qblock_bytes=quantize_q6_k.QBLOCK_BYTES,
        subblock=16,
        kernel=quantize_q6_k.kernel,
        constants=quantize_q6_k.CONSTANTS,
    ),
    **{
        name: Form(
            qblock=256,
            qblock_bytes=quantize_offset.QBLOCK_BYTES[name],
            subblock=32,
            kernel=quantize_offset.kernel,
            constants=constants,
        )
        for name, constants in quantize_offset.CONSTANTS.items()
    },
}
QTYPES = tuple(FORMS)
COMPILE_CASES += [
    CompileCase(
        kernel=kernel,
        types={**POINTERS, "n_qblocks": "i32"},
        constants=form.constants,
        options=OPTIONS,
        aligned=tuple(POINTERS),
    )
    for form in FORMS.values()
    if form.kernel is kernel
]


def quantize(weights: torch.Tensor, qtype: str) -> torch.Tensor:
    """Store weights as `qtype`, byte for byte as ggml's reference does.

    Args:
        weights: float32 `[N, K]`, contiguous, finite, K a multiple of the qblock.
        qtype: one of `QTYPES`.

    Returns:
        uint8 `[N, row_bytes]`, contiguous, on the device of `weights`. A qblock with a weight too
        large for its float16 scale has an infinite or NaN scale; its other bytes mean nothing.

    Raises:
        RuntimeError: kernels cannot run on that device; ask `runtime.why_not` first.
        ValueError: an argument is none of these.
    """
    if qtype not in FORMS:
        raise ValueError(f"quantize stores {', '.join(QTYPES)}, not {qtype!r}")
    form = FORMS[qtype]
    if weights.dtype != torch.float32 or weights.ndim != 2 or weights.shape[1] % form.qblock:
        raise ValueError(
            f"quantize needs float32 [N, {form.qblock} * n] for {qtype};"
            f" got {weights.dtype} {list(weights.shape)}"
        )
    if not weights.is_contiguous():
        raise ValueError(f"quantize needs contiguous weights; their strides are {weights.stride()}")
    if why := why_not(weights.device):
        raise RuntimeError(f"quantize cannot run: {why}")
    n_qblocks = weights.numel() // form.qblock
    row_bytes = weights.shape[1] // form.qblock * form.qblock_bytes
    out = torch.empty(len(weights), row_bytes, dtype=torch.uint8, device=weights.device)
    if n_qblocks:
        launch: Any = form.kernel[(-(-n_qblocks // form.constants["TILE"]),)]
        inputs = [weights]
        if form.subblock:
            inputs.append(weights.view(-1, form.subblock).t().contiguous())
        half = out.view(-1).view(torch.float16)
        with on_device(weights):
            launch(*inputs, out, half, n_qblocks, **form.constants, **OPTIONS)
    return out
