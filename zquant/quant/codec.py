"""Quantize and decode tensors of any qtype: one table, checks, and work in cache-sized chunks.

Bytes are those of ggml's reference quantizers, with importance weights and without; decoding is
done in fp32 in ggml's order of operations and rounded once to the requested dtype.

Every qtype module has the same two functions: `quantize(weights, importance)` for whole rows, and
`dequantize(qblocks, out)` for a list of qblocks. A new qtype is a new module and a line in
`_MODULES`.
"""

from functools import cache
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from zquant_kernels import dequantize as kernels
from zquant_kernels.runtime import why_not

from zquant.quant import (
    floats,
    iq4_nl,
    iq4_xs,
    q2_k,
    q3_k,
    q4_0,
    q4_1,
    q4_k,
    q5_0,
    q5_1,
    q5_k,
    q6_k,
    q8_0,
)
from zquant.quant.qtypes import QType
from zquant.quant.search import compiled_loops

__all__ = ["DECODED_DTYPES", "dequantize", "holds_lock", "quantize", "scratch_bytes"]

DECODED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_MODULES: dict[str, ModuleType] = {
    "Q8_0": q8_0,
    "Q6_K": q6_k,
    "Q5_K": q5_k,
    "Q4_K": q4_k,
    "Q3_K": q3_k,
    "Q2_K": q2_k,
    "Q5_1": q5_1,
    "Q5_0": q5_0,
    "Q4_1": q4_1,
    "Q4_0": q4_0,
    "IQ4_NL": iq4_nl,
    "IQ4_XS": iq4_xs,
}

# weights per chunk: temporaries stay in a CPU's last-level cache, and calls are long enough that
# their overhead and the interpreter lock do not count
QUANTIZE_CHUNK = 1 << 19
DECODE_CHUNK_CPU = 1 << 20
# importing numba takes half a second and 0.1 GiB, which small models should not pay
COMPILED_FROM = 1 << 19
# an accelerator only needs a bound on the temporaries
DECODE_CHUNK = 1 << 23
TEMPORARIES = 3  # of a chunk, as float32, that exist at a time


def quantize(
    weights: npt.NDArray[np.float32],
    qtype: QType,
    importance: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.uint8]:
    """Store weights as `qtype`, byte for byte as ggml's reference does.

    Args:
        weights: float32 `[N, K]`, K a multiple of the qblock; any strides.
        qtype: storage type.
        importance: float32 `[K]`, at least 0 and finite, how much an error in each input channel
            costs, in any unit; usually the mean square of what enters there. None: each type's own
            measure of error. Floats and Q8_0 do not search and ignore it.

    Returns:
        uint8 `[N, row_bytes]`, contiguous, never a view of `weights`.

    Raises:
        ValueError: wrong dtype or number of dimensions, or a row that is not whole qblocks; or
            the importance is not one such number per channel.
    """
    if weights.dtype != np.float32 or weights.ndim != 2:
        raise ValueError(
            f"quantize needs float32 weights [N, K]; got {weights.dtype} {list(weights.shape)}"
        )
    n_rows, n_columns = weights.shape
    if importance is not None:
        importance = _checked(importance, n_columns)
    packed = np.empty((n_rows, qtype.row_bytes(n_columns)), np.uint8)
    step = max(1, QUANTIZE_CHUNK // max(1, n_columns))
    for row in range(0, n_rows if packed.size else 0, step):
        chunk = np.ascontiguousarray(weights[row : row + step])
        if qtype.is_float:
            packed[row : row + step] = floats.quantize(chunk, floats.FLOAT_DTYPES[qtype.name])
        else:
            packed[row : row + step] = _MODULES[qtype.name].quantize(chunk, importance)
    return packed


def _checked(importance: npt.NDArray[np.float32], n_columns: int) -> npt.NDArray[np.float32]:
    """The importance after checking it, contiguous; a copy."""
    if importance.dtype != np.float32 or importance.shape != (n_columns,):
        raise ValueError(
            f"importance must be float32 [{n_columns}], a number per input channel;"
            f" got {importance.dtype} {list(importance.shape)}"
        )
    wrong = np.flatnonzero(~(np.isfinite(importance) & (importance >= 0)))
    if wrong.size:
        raise ValueError(
            f"importance must be finite and at least 0; {wrong.size} of {n_columns} numbers are"
            f" not (first: channel {wrong[0]}, {importance[wrong[0]]})"
        )
    largest = importance.max(initial=0)
    # only ratios matter; far from 1, sums of costs would overflow or vanish where ratios do not
    far = largest > 0 and not 2.0**-40 < largest < 2.0**40
    scaled: npt.NDArray[np.float32] = np.ldexp(importance, -np.frexp(largest)[1] if far else 0)
    return scaled


def dequantize(
    packed: torch.Tensor, qtype: QType, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Decode stored weights; equal bit for bit to ggml's decoder rounded once to `dtype`.

    Args:
        packed: uint8 or int8 `[N, row_bytes]` on any device; any strides.
        qtype: storage type.
        dtype: float32, float16 or bfloat16.
        out: contiguous `[N, K]` of `dtype` on the same device, written and returned; saves the
            allocation.

    Returns:
        `[N, K]` of `dtype` on the device of `packed`.

    Raises:
        ValueError: a wrong dtype or shape, or a row that is not whole qblocks.
    """
    shape = _decoded_shape(packed, qtype, dtype)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=packed.device)
    elif out.shape != shape or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {dtype} {list(shape)}; got {out.dtype} {list(out.shape)}"
        )
    if packed.is_cuda and not why_not(packed.device) and qtype.name in kernels.QTYPES:
        data = packed.view(torch.uint8).contiguous()
        decoded: torch.Tensor = kernels.dequantize(data, qtype.name, dtype, out)
        return decoded
    chunk = _chunk(packed.device)
    step = max(1, chunk // max(1, shape[1]))
    scratch = None
    for row in range(0, shape[0] if out.numel() else 0, step):
        part, target = _aligned(packed[row : row + step]), out[row : row + step]
        if qtype.name in floats.PLAIN_DTYPES:
            floats.dequantize(part, floats.PLAIN_DTYPES[qtype.name], target)
            continue
        decoded = target
        if dtype != torch.float32:
            if scratch is None:
                scratch = torch.empty_like(target, dtype=torch.float32)
            decoded = scratch[: len(target)]
        qblocks = part.view(-1, qtype.qblock_bytes)
        _decode(qtype, qblocks, decoded.view(-1, qtype.qblock))
        if decoded is not target:
            target.copy_(decoded)
    return out


def _decode(qtype: QType, qblocks: torch.Tensor, out: torch.Tensor) -> None:
    """As the `dequantize` of the qtype's module, by a compiled loop where that is quicker."""
    if out.device.type == "cpu" and out.numel() >= COMPILED_FROM:
        decoders = compiled_decoders()
        if decoders is not None and qtype.name in decoders.UNITS:
            decoders.decode(qtype.name, qblocks, out)
            return
    _MODULES[qtype.name].dequantize(qblocks, out)


@cache
def compiled_decoders() -> ModuleType | None:
    """The module of that name, or None where numba is not installed."""
    try:
        from zquant.quant import compiled_decoders
    except ImportError:
        return None
    return compiled_decoders


def holds_lock(qtype: QType, *, importance: bool) -> bool:
    """Whether quantizing is many short array operations, so that threads wait for each other.

    Args:
        qtype: what weights become.
        importance: whether it is given.
    """
    if compiled_loops() is None:
        return qtype.searched(importance=importance)
    return qtype.name in ("IQ4_NL", "IQ4_XS") or (qtype.name == "Q3_K" and not importance)


def scratch_bytes(device: torch.device) -> int:
    """Most bytes of temporaries of `dequantize` where no kernel does it."""
    return TEMPORARIES * torch.float32.itemsize * _chunk(device)


def _chunk(device: torch.device) -> int:
    """Weights that are decoded at a time."""
    return DECODE_CHUNK_CPU if device.type == "cpu" else DECODE_CHUNK


def _decoded_shape(packed: torch.Tensor, qtype: QType, dtype: torch.dtype) -> torch.Size:
    """Check the arguments of `dequantize`; the shape of its result."""
    if packed.dtype not in (torch.uint8, torch.int8) or packed.ndim != 2:
        raise ValueError(
            f"dequantize needs uint8 bytes [N, row_bytes]; got {packed.dtype} {list(packed.shape)}"
        )
    if dtype not in DECODED_DTYPES:
        raise ValueError(f"weights decode to float32, float16 or bfloat16, not {dtype}")
    n_qblocks, rest = divmod(packed.shape[1], qtype.qblock_bytes)
    if rest:
        raise ValueError(
            f"{qtype} stores qblocks of {qtype.qblock_bytes} bytes;"
            f" a row of {packed.shape[1]} bytes does not divide"
        )
    return torch.Size((packed.shape[0], n_qblocks * qtype.qblock))


def _aligned(part: torch.Tensor) -> torch.Tensor:
    """Contiguous uint8 whose start in its storage suits every field, copied only when needed."""
    part = part.view(torch.uint8).contiguous()
    return part.clone() if part.storage_offset() % 4 else part
