"""Expand quantized weights to a float dtype, the same bits as the reference of their type.

    out[n, k] = round(w[n, k])

`w` is decoded in float32 in ggml's order of operations, with no product and sum contracted into one
rounding, and rounded once to the dtype. The types are in `dequant_<type>.py`; one kernel serves all
of them, told by its constants which `decode` to inline. BF16 and F16 are a cast, by torch.

Bytes are read where they lie: qblocks of half the types are 2-byte aligned only, so a load brings
two bytes, or one where the tensor does not begin at a multiple of 16. Repacking them into aligned
fields would cost a copy of every streamed block and save instructions of a kernel that is meant to
wait for memory; no GPU has timed either.

Source: ggml's `dequantize_row_*`; the oracle in the tests is gguf-py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from zquant_kernels import (
    dequant_float,
    dequant_iq4_nl,
    dequant_iq4_xs,
    dequant_q2_k,
    dequant_q3_k,
    dequant_q4_0,
    dequant_q4_1,
    dequant_q4_k,
    dequant_q5_0,
    dequant_q5_1,
    dequant_q5_k,
    dequant_q6_k,
    dequant_q8_0,
)
from zquant_kernels.runtime import CompileCase, on_device, tl, triton, why_not

__all__ = [
    "COMPILE_CASES",
    "QTYPES",
    "Source",
    "check_out",
    "check_packed",
    "dequantize",
    "kernel",
    "reference",
]

WEIGHTS = 4096  # per program
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Source:
    """How a type is stored: weights and bytes of a qblock, its reference and device function."""

    qblock: int
    qblock_bytes: int
    reference: Callable[[torch.Tensor], torch.Tensor]
    decode: Any


def _source(module: Any) -> Source:
    return Source(module.QBLOCK, module.QBLOCK_BYTES, module.reference, module.decode)


_FLOAT = (dequant_float.QBLOCK, dequant_float.QBLOCK_BYTES)
QTYPES = {
    "Q8_0": _source(dequant_q8_0),
    "Q6_K": _source(dequant_q6_k),
    "Q5_K": _source(dequant_q5_k),
    "Q4_K": _source(dequant_q4_k),
    "Q3_K": _source(dequant_q3_k),
    "Q2_K": _source(dequant_q2_k),
    "IQ4_XS": _source(dequant_iq4_xs),
    "IQ4_NL": _source(dequant_iq4_nl),
    "Q5_1": _source(dequant_q5_1),
    "Q5_0": _source(dequant_q5_0),
    "Q4_1": _source(dequant_q4_1),
    "Q4_0": _source(dequant_q4_0),
    "BF16": Source(*_FLOAT, dequant_float.reference_bf16, dequant_float.decode_bf16),
    "F16": Source(*_FLOAT, dequant_float.reference_f16, dequant_float.decode_f16),
}
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
COMPILE_CASES: list[CompileCase] = []


def reference(packed: torch.Tensor, qtype: str, dtype: torch.dtype) -> torch.Tensor:
    """Same contract as `dequantize`, in plain torch, on any device."""
    return QTYPES[qtype].reference(packed).to(dtype)


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    packed, out, n_qblocks,
    DECODE: tl.constexpr, QBLOCK: tl.constexpr, QBLOCK_BYTES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program decodes `TILE` qblocks."""
    # the program's own addresses are int64, those of its qblocks relative to them
    first = tl.program_id(0).to(tl.int64) * TILE
    i = tl.arange(0, TILE)
    mask = i < n_qblocks - first
    w = DECODE(packed + first * QBLOCK_BYTES, i * QBLOCK_BYTES, mask)  # [TILE, QBLOCK]
    to = out + first * QBLOCK + (i[:, None] * QBLOCK + tl.arange(0, QBLOCK)[None, :])
    tl.store(to, w.to(out.dtype.element_ty), mask=mask[:, None])


def _constants(source: Source) -> dict[str, Any]:
    return {
        "DECODE": source.decode,
        "QBLOCK": source.qblock,
        "QBLOCK_BYTES": source.qblock_bytes,
        "TILE": WEIGHTS // source.qblock,
    }


COMPILE_CASES += [
    CompileCase(
        kernel=kernel,
        types={"packed": "*u8", "out": out, "n_qblocks": "i32"},
        constants=_constants(source),
        options=OPTIONS,
        aligned=("packed", "out", "n_qblocks"),
    )
    for name, source in QTYPES.items()
    for out in ("*bf16", "*fp16", "*fp32")
    if name not in ("BF16", "F16")  # torch casts them as well as we could
]


def dequantize(
    packed: torch.Tensor, qtype: str, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Decode rows of quantized weights.

    Args:
        packed: uint8 `[N, row_bytes]`, contiguous, at an even address: bytes of a GGUF tensor.
        qtype: a key of `QTYPES`.
        dtype: bfloat16, float16 or float32.
        out: `dtype` `[N, K]`, contiguous, on the device of `packed`; written and returned.

    Returns:
        `dtype` `[N, K]`. Where kernels cannot run (see `runtime.why_not`) it is the reference's,
        which has the same bits.

    Raises:
        ValueError: an argument is none of these.
    """
    source, shape = check_packed("dequantize", packed, qtype)
    if dtype not in DTYPES:
        raise ValueError(f"dequantize gives bfloat16, float16 or float32, not {dtype}")
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=packed.device)
    check_out("dequantize", out, shape, dtype, packed.device)
    if qtype in ("BF16", "F16"):
        return out.copy_(packed.view(torch.bfloat16 if qtype == "BF16" else torch.float16))
    if out.numel() == 0:
        return out
    if why_not(packed.device):
        return out.copy_(source.reference(packed))
    constants, n_qblocks = _constants(source), out.numel() // source.qblock
    launch: Any = kernel[(triton.cdiv(n_qblocks, constants["TILE"]),)]
    with on_device(packed):
        launch(packed, out, n_qblocks, **constants, **OPTIONS)
    return out


def check_packed(who: str, packed: torch.Tensor, qtype: str) -> tuple[Source, torch.Size]:
    """The source of `qtype` and the shape of the weights; ValueError when `packed` is not such."""
    if qtype not in QTYPES:
        raise ValueError(f"{who} reads {', '.join(QTYPES)}; not {qtype!r}")
    source = QTYPES[qtype]
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] % source.qblock_bytes:
        raise ValueError(
            f"{who} needs {qtype} as uint8 [N, {source.qblock_bytes} * n];"
            f" got {packed.dtype} {list(packed.shape)}"
        )
    if not packed.is_contiguous() or packed.data_ptr() % 2:
        raise ValueError(f"{who} needs contiguous bytes at an even address")
    n_columns = packed.shape[1] // source.qblock_bytes * source.qblock
    return source, torch.Size((packed.shape[0], n_columns))


def check_out(
    who: str, out: torch.Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> None:
    """ValueError unless `out` is contiguous `dtype` `shape` on `device`."""
    if out.shape != shape or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(
            f"{who} needs out contiguous {dtype} {list(shape)};"
            f" got {out.dtype} {list(out.shape)}, strides {out.stride()}"
        )
    if out.device != device:
        raise ValueError(f"{who} needs out on {device}, not {out.device}")
