"""Expand stored weights to rows of int8, which the integer product multiplies.

    v[n] = w[n], rotated in groups (see `hadamard`) or as it is
    scale[n] = max(max_k |v[n, k]|, TINY) * (1 / 127)
    out[n, k] = round(v[n, k] * (1 / scale[n])), limited to -127..127

Ties round to even. `row_scales` finds the scales once per load, by `quantize_tokens`, so that
expanding is one pass over the bytes. One scale per row costs 0.1 points on Q4_K's 7.1 % error. The
weights must be finite.

Bytes are read where they lie: qblocks of Q8_0, Q6_K, Q3_K, Q5_0, Q4_0 and IQ4_NL are 2-byte aligned
only, which costs a load per two to eight weights instead of one per sixteen or more. The kernel is
meant to wait for memory all the same, so nothing is repacked; no GPU has timed it yet.

Source: symmetric per-row quantization as in SmoothQuant (arXiv 2211.10438), rotation as in QuaRot
(arXiv 2404.00456).
"""

from collections.abc import Iterator
from typing import Any

import torch

from zquant_kernels import hadamard
from zquant_kernels.dequant_float import CHUNK
from zquant_kernels.dequantize import QTYPES, Source, check_out, check_packed, dequantize
from zquant_kernels.hadamard import rotate
from zquant_kernels.quantize_tokens import quantize_tokens
from zquant_kernels.runtime import CompileCase, on_device, tl, triton, why_not

__all__ = ["COMPILE_CASES", "dequant_int8", "kernel", "reference", "row_scales"]

ROWS = 16  # rows per program
SPAN = 256  # columns per program
PART = 4096  # columns of a row whose scale is found at a time; no larger tile is compiled
SLAB_WEIGHTS = 1 << 22  # as float32 at a time, where a whole weight would take too much memory
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
COMPILE_CASES: list[CompileCase] = []


def reference(packed: torch.Tensor, qtype: str, scales: torch.Tensor, group: int) -> torch.Tensor:
    """Same contract as `dequant_int8`, in plain torch, on any device."""
    source, shape = check_packed("dequant_int8", packed, qtype)
    out = torch.empty(shape, dtype=torch.int8, device=packed.device)
    inverse = torch.ones_like(scales) / scales
    for rows in _slabs(shape):
        v = source.reference(packed[rows])
        v = hadamard.reference(v, group) if group else v
        out[rows] = (v * inverse[rows, None]).round_().clamp_(-127, 127)
    return out


def _slabs(shape: torch.Size) -> Iterator[slice]:
    """Rows that are expanded together; 16 rows of any type begin at an aligned byte."""
    step = max(1, SLAB_WEIGHTS // max(1, shape[1]) // 16) * 16
    return (slice(at, at + step) for at in range(0, shape[0], step))


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    packed, scales, out, N, K, DECODE: tl.constexpr, QBLOCK: tl.constexpr,
    QBLOCK_BYTES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One program expands `SPAN` columns of `ROWS` rows."""
    EACH: tl.constexpr = SPAN // QBLOCK  # qblocks of a row
    span, row_qblocks = tl.program_id(0), K // QBLOCK
    # the program's own addresses are int64, those of its weights relative to them
    first, n = tl.program_id(1) * ROWS, tl.arange(0, ROWS)
    packed += (first.to(tl.int64) * row_qblocks + span * EACH) * QBLOCK_BYTES
    j, inside = tl.arange(0, EACH), n < N - first
    start = (n[:, None] * row_qblocks + j[None, :]) * QBLOCK_BYTES  # [ROWS, EACH]
    mask = inside[:, None] & (j < row_qblocks - span * EACH)[None, :]
    start, mask = tl.reshape(start, (ROWS * EACH,)), tl.reshape(mask, (ROWS * EACH,))
    v = tl.reshape(DECODE(packed, start, mask), (ROWS, SPAN))
    if GROUP > 0:
        v = rotate(v, ROWS, SPAN, GROUP)
    scale = tl.load(scales + first + n, mask=inside, other=1.0)
    v *= tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale)[:, None]
    # 1.5 * 2**23: the sum has no fraction bits left, so the addition rounds half to even, and the
    # last byte of its bits is the int8
    bits = (tl.minimum(tl.maximum(v, -127.0), 127.0) + 12582912.0).to(tl.int32, bitcast=True)
    k = tl.arange(0, SPAN)[None, :]
    to = out + (first.to(tl.int64) * K + span * SPAN) + (n[:, None] * K + k)
    tl.store(to, bits.to(tl.int8), mask=inside[:, None] & (k < K - span * SPAN))


def _constants(source: Source, group: int) -> dict[str, Any]:
    """What the kernel is compiled for; plain values are decoded `CHUNK` at a time."""
    qblock = max(source.qblock, CHUNK)
    return {
        "DECODE": source.decode,
        "QBLOCK": qblock,
        "QBLOCK_BYTES": qblock * source.qblock_bytes // source.qblock,
        "GROUP": group,
        "ROWS": ROWS,
        "SPAN": SPAN,
    }


COMPILE_CASES += [
    CompileCase(
        kernel=kernel,
        types={"packed": "*u8", "scales": "*fp32", "out": "*i8", "N": "i32", "K": "i32"},
        constants=_constants(source, group),
        options=OPTIONS,
        aligned=("packed", "scales", "out", "K"),
    )
    for source in QTYPES.values()
    # `group_of` is 256 for rows of K types
    for group in ((256,) if source.qblock == 256 else (*hadamard.GROUPS, 0))
]


def dequant_int8(
    packed: torch.Tensor,
    qtype: str,
    scales: torch.Tensor,
    group: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Expand rows of stored weights to int8.

    Args:
        packed: uint8 `[N, row_bytes]`, contiguous, at an even address: bytes of a GGUF tensor, of
            finite weights.
        qtype: a key of `zquant_kernels.dequantize.QTYPES`; K of BF16 and F16 is a multiple of 16.
        scales: float32 `[N]`, contiguous, on the device of `packed`, from `row_scales` with the
            same group.
        group: 0 or one of `hadamard.GROUPS` that divides K.
        out: int8 `[N, K]`, contiguous, on the device of `packed`; written and returned.

    Returns:
        int8 `[N, K]`. Where kernels cannot run (see `runtime.why_not`) it is the reference's, which
        has the same bits.

    Raises:
        ValueError: an argument is none of these.
    """
    source, shape = _check("dequant_int8", packed, qtype, group)
    if scales.shape != shape[:1] or scales.dtype != torch.float32 or not scales.is_contiguous():
        raise ValueError(
            f"dequant_int8 needs scales float32 [{shape[0]}], contiguous;"
            f" got {scales.dtype} {list(scales.shape)}"
        )
    if scales.device != packed.device:
        raise ValueError(f"dequant_int8 needs scales on {packed.device}, not {scales.device}")
    if out is None:
        out = torch.empty(shape, dtype=torch.int8, device=packed.device)
    check_out("dequant_int8", out, shape, torch.int8, packed.device)
    if out.numel() == 0:
        return out
    if why_not(packed.device):
        return out.copy_(reference(packed, qtype, scales, group))
    n, k = shape
    launch: Any = kernel[(triton.cdiv(k, SPAN), triton.cdiv(n, ROWS))]
    with on_device(packed):
        launch(packed, scales, out, n, k, **_constants(source, group), **OPTIONS)
    return out


def row_scales(packed: torch.Tensor, qtype: str, group: int) -> torch.Tensor:
    """The int8 scale of every row; arguments and errors as `dequant_int8`.

    A row is looked at in parts of whole groups, the largest of whose scales is its own.

    Returns:
        float32 `[N]` on the device of `packed`, at least TINY / 127.
    """
    _, shape = _check("row_scales", packed, qtype, group)
    scales = torch.empty(shape[0], dtype=torch.float32, device=packed.device)
    n_parts = _parts(shape[1], group or CHUNK)
    for rows in _slabs(shape):
        weights = dequantize(packed[rows], qtype, torch.float32)
        _, found = quantize_tokens(weights.view(-1, shape[1] // n_parts), group=group)
        torch.amax(found.view(-1, n_parts), dim=1, out=scales[rows])
    return scales


def _parts(k: int, unit: int) -> int:
    """Into how many equal parts of whole units, of at most PART columns, a row of `k` divides."""
    n_units = k // unit
    return next(n for n in range(1, n_units + 1) if n_units % n == 0 and k <= n * PART)


def _check(who: str, packed: torch.Tensor, qtype: str, group: int) -> tuple[Source, torch.Size]:
    """The source of `qtype` and the shape of the weights; ValueError when they cannot be int8."""
    source, shape = check_packed(who, packed, qtype)
    if shape[1] == 0 or shape[1] % max(source.qblock, CHUNK):
        raise ValueError(f"{who} needs K a multiple of {CHUNK} for {qtype}; got {shape[1]}")
    if group and (group not in hadamard.GROUPS or shape[1] % group):
        known = ", ".join(map(str, hadamard.GROUPS))
        raise ValueError(f"{who} rotates groups of {known} that divide {shape[1]}; not {group}")
    return source, shape
