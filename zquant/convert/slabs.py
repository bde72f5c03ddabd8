"""Quantize tensors slab by slab in a pool of workers, results in order.

A slab is some rows of a stored tensor: decoded, quantized and measured by one worker, which opens
the file by itself when it is another process, and computes a piece at a time, which fits the cache.
A bounded number of slabs is under way, so memory does not depend on the size of the model; rows are
quantized alone, so bytes do not depend on the slabs.

With a GPU, workers are threads that read; the stored bytes go there, and it decodes, quantizes and
measures a whole slab, one at a time.
"""

import math
import os
import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch
from zquant_kernels import quantize as kernels

from zquant.convert.plan import OutputTensor
from zquant.convert.receipts import sum64
from zquant.convert.workers import run_in_order
from zquant.errors import CheckpointError, DeviceError, PlanError
from zquant.formats.names import Part
from zquant.memory.device import peak_host_bytes
from zquant.quant.codec import dequantize, quantize
from zquant.quant.qtypes import QType
from zquant.quant.scaled import dequantize_scaled

__all__ = ["Packed", "Slab", "in_order", "slabs_of", "sum_of_squares"]

SLAB_WEIGHTS = 2**21  # long enough that passing results around does not count
PIECE_WEIGHTS = 2**19  # what is computed at a time, so that it stays in the cache
DOT_LENGTH = 2048  # BLAS splits dot products of more than 10000 numbers
Sums = npt.NDArray[np.float64]

_LOCAL = threading.local()
_GPU = threading.Lock()  # held by who uses it: bounds its memory, and Triton compiles once


@dataclass(frozen=True, slots=True)
class Slab:
    """Rows of one part of one tensor."""

    name: str  # in the output
    qtype: QType  # in the output
    part: Part
    rows: tuple[int, int]
    offset: int  # of its tensor in the output
    last: bool  # of its tensor
    importance: npt.NDArray[np.float32] | None = None  # of its columns

    @property
    def n_weights(self) -> int:
        """Number of weights in these rows."""
        return (self.rows[1] - self.rows[0]) * self.part.shape[-1]


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantized slab: its bytes, and the sums of squares its tensor's error is made of.

    `sums` is float64 `[4]`: of the errors, of the weights, and of both times their importance;
    `source_sum64` is of the bytes that were read.
    """

    data: npt.NDArray[np.uint8]
    sums: Sums
    source_sum64: int
    process: int
    peak_host_bytes: int | None  # of that process so far


def slabs_of(tensors: Iterable[OutputTensor]) -> Iterator[Slab]:
    """All rows of `tensors`, in the order of the file."""
    for tensor in tensors:
        step = max(1, SLAB_WEIGHTS // tensor.shape[-1])
        for part in tensor.parts:
            n_rows = math.prod(part.shape) // part.shape[-1]
            for row in range(0, n_rows, step):
                last = part is tensor.parts[-1] and row + step >= n_rows
                rows = (row, min(row + step, n_rows))
                yield Slab(
                    tensor.name, tensor.qtype, part, rows, tensor.offset, last, tensor.importance
                )


def in_order(
    pool: Executor, slabs: Iterator[Slab], window: int, gpu: torch.device | None = None
) -> Generator[tuple[Slab, Packed], None, None]:
    """Results in the order of `slabs`, at most `window` of them under way.

    Raises:
        CheckpointError: a weight is NaN or infinite.
        PlanError: a weight is too large for the qtype it shall have.
        DeviceError: the GPU has no memory left.
    """
    yield from run_in_order(pool, partial(_pack, gpu=gpu), slabs, window)


def _pack(slab: Slab, gpu: torch.device | None) -> Packed:
    """Decode, quantize and measure one slab."""
    n_columns, (first, last) = slab.part.shape[-1], slab.rows
    data = np.empty((last - first, slab.qtype.row_bytes(n_columns)), np.uint8)
    _LOCAL.sum64 = 0
    if gpu and slab.qtype.name in kernels.QTYPES and slab.qtype != slab.part.qtype:
        sums = _pack_on(gpu, slab, data)
    else:
        sums = _pack_pieces(slab, data)
    return Packed(data.reshape(-1), sums, _LOCAL.sum64, os.getpid(), peak_host_bytes())


def _pack_pieces(slab: Slab, out: npt.NDArray[np.uint8]) -> Sums:
    """Fill `out` on the CPU; the sums of the slab."""
    first, last = slab.rows
    step = max(1, PIECE_WEIGHTS // slab.part.shape[-1])
    sums = np.zeros(4)
    for row in range(first, last, step):
        stop = min(row + step, last)
        sums += _pack_piece(slab, row, out[row - first : stop - first])
    return sums


def _pack_piece(slab: Slab, row: int, out: npt.NDArray[np.uint8]) -> Sums:
    """Fill `out` with the rows from `row` on; their sums."""
    part, qtype = slab.part, slab.qtype
    row_bytes = part.qtype.row_bytes(part.shape[-1])
    stored, weights, decoded = _scratch(len(out), row_bytes, part.shape[-1])
    _read(part, row * row_bytes, stored)
    scaling = part.scaling and part.scaling.of(slice(row, row + len(out)))
    dequantize_scaled(stored, part.qtype, torch.float32, scaling, out=weights)
    power = sum_of_squares(weights)
    if not math.isfinite(power):
        _refuse_non_finite(slab, row, weights)
    if qtype == part.qtype and scaling is None:
        out[:] = stored.numpy()
        weighed = 0.0 if slab.importance is None else _weighed(weights, slab.importance)
        return np.array([0.0, power, 0.0, weighed])
    out[:] = quantize(weights.numpy(), qtype, slab.importance)
    dequantize(torch.from_numpy(out), qtype, torch.float32, out=decoded)
    error = sum_of_squares(decoded.sub_(weights))
    if not math.isfinite(error):
        _refuse_too_large(slab, weights)
    if slab.importance is None:
        return np.array([error, power, 0.0, 0.0])
    both = [_weighed(each, slab.importance) for each in (decoded, weights)]
    return np.array([error, power, *both])


def _pack_on(gpu: torch.device, slab: Slab, out: npt.NDArray[np.uint8]) -> Sums:
    """`_pack_pieces` on a GPU, the whole slab at once; importance is for the CPU only."""
    assert slab.importance is None
    part, qtype = slab.part, slab.qtype
    row_bytes = part.qtype.row_bytes(part.shape[-1])
    stored, _, _ = _scratch(len(out), row_bytes, part.shape[-1])
    _read(part, slab.rows[0] * row_bytes, stored)
    try:
        with _GPU:
            scaling = part.scaling and part.scaling.of(slice(*slab.rows)).to(gpu)
            weights = dequantize_scaled(stored.to(gpu), part.qtype, torch.float32, scaling)
            power = _sum_of_squares_on_gpu(weights)
            if not math.isfinite(power):
                _refuse_non_finite(slab, slab.rows[0], weights)
            packed = kernels.quantize(weights, qtype.name)
            out[:] = packed.cpu().numpy()
            decoded = dequantize(packed, qtype, torch.float32)
            error = _sum_of_squares_on_gpu(decoded.sub_(weights))
            if not math.isfinite(error):
                _refuse_too_large(slab, weights)
    except torch.OutOfMemoryError as no_memory:
        raise DeviceError(
            f"no memory left on {gpu} for {slab.n_weights} weights of {slab.name!r}. "
            f"Free some, or go on with --device cpu --resume, which writes the same bytes."
        ) from no_memory
    return np.array([error, power, 0.0, 0.0])


def _read(part: Part, start: int, stored: torch.Tensor) -> None:
    """Fill `stored` with the part's bytes from `start` on; they count for this thread's sum."""
    data = stored.numpy().reshape(-1)
    part.read_into(start, data)
    _LOCAL.sum64 += sum64(data, start)


def _scratch(
    n_rows: int, row_bytes: int, n_columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Buffers of this thread, as fresh memory is slow to touch: one of stored bytes, two of floats.

    uint8 `[n_rows, row_bytes]`, then float32 `[n_rows, n_columns]` twice; row_bytes <= 4 n_columns.
    """
    n = n_rows * n_columns
    if getattr(_LOCAL, "size", 0) < n:
        _LOCAL.size, _LOCAL.buffers = n, [torch.empty(n) for _ in range(3)]
    stored, first, second = (buffer[:n] for buffer in _LOCAL.buffers)
    stored = stored.view(torch.uint8)[: n_rows * row_bytes].view(n_rows, row_bytes)
    return stored, first.view(n_rows, n_columns), second.view(n_rows, n_columns)


def sum_of_squares(values: torch.Tensor) -> float:
    """Sum of squares; the same on every run, as no dot product is split between threads."""
    flat = values.numpy().reshape(-1)
    whole = flat.size - flat.size % DOT_LENGTH
    pieces, rest = flat[:whole].reshape(-1, 1, DOT_LENGTH), flat[whole:]
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.matmul(pieces, pieces.transpose(0, 2, 1))
        total = float(squares.sum(dtype=np.float64)) + float(np.dot(rest, rest))
    if math.isfinite(total):
        return total
    # squares of large float32 numbers overflow; infinities and NaN stay what they are
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64))


def _weighed(values: torch.Tensor, importance: npt.NDArray[np.float32]) -> float:
    """Sum of squares times the importance of their columns; overwrites `values`."""
    columns = values.square_().sum(0, dtype=torch.float64).numpy()
    return float(np.dot(columns, importance.astype(np.float64)))


def _sum_of_squares_on_gpu(values: torch.Tensor) -> float:
    return float(values.double().square_().sum())


def _refuse_too_large(slab: Slab, weights: torch.Tensor) -> NoReturn:
    raise PlanError(
        f"{slab.part.info.reader.name}: tensor {slab.part.info.name!r} holds a weight of "
        f"{weights.abs().max():.3g}, too large for {slab.qtype}. "
        f"Keep it wide: --tensor-type '{slab.name}=BF16'"
    )


def _refuse_non_finite(slab: Slab, first_row: int, weights: torch.Tensor) -> NoReturn:
    row, column = torch.nonzero(~torch.isfinite(weights))[0].tolist()
    value = weights[row, column].item()
    row += first_row + (slab.part.rows[0] if slab.part.rows else 0)
    raise CheckpointError(
        f"{slab.part.info.reader.name}: tensor {slab.part.info.name!r} holds {value} (row {row}, "
        f"column {column}); expected finite weights. The file is damaged; download it again."
    )
