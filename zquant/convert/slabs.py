"""Quantize tensors slab by slab in a pool of threads, results in order.

A slab is some rows of a stored tensor: decoded, quantized and measured by one thread (numpy and
torch release the interpreter lock). A bounded number of slabs is under way, so memory does not
depend on the size of the model; rows are quantized alone, so bytes do not depend on the slabs.
"""

import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from zquant.convert.plan import OutputTensor
from zquant.errors import CheckpointError, PlanError
from zquant.formats.names import Part
from zquant.quant.codec import dequantize, quantize

__all__ = ["Packed", "Slab", "in_order", "slabs_of"]

SLAB_WEIGHTS = 2**20


@dataclass(frozen=True, slots=True)
class Slab:
    """Rows of one part of one tensor."""

    tensor: OutputTensor
    part: Part
    rows: slice
    last: bool  # of its tensor

    @property
    def n_weights(self) -> int:
        """Number of weights in these rows."""
        n_rows: int = self.rows.stop - self.rows.start
        return n_rows * self.part.shape[-1]


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantized slab: its bytes, and the sums of squares its tensor's error is made of."""

    data: Any
    error: float
    power: float


def slabs_of(tensors: Iterable[OutputTensor]) -> Iterator[Slab]:
    """All rows of `tensors`, in the order of the file."""
    for tensor in tensors:
        step = max(1, SLAB_WEIGHTS // tensor.shape[-1])
        for part in tensor.parts:
            n_rows = math.prod(part.shape) // part.shape[-1]
            for row in range(0, n_rows, step):
                last = part is tensor.parts[-1] and row + step >= n_rows
                yield Slab(tensor, part, slice(row, min(row + step, n_rows)), last)


def in_order(
    pool: Executor, slabs: Iterator[Slab], window: int
) -> Generator[tuple[Slab, Packed], None, None]:
    """Results in the order of `slabs`, at most `window` of them under way.

    Raises:
        CheckpointError: a weight is NaN or infinite.
        PlanError: a weight is too large for the qtype it shall have.
    """
    pending: deque[tuple[Slab, Future[Packed]]] = deque()
    try:
        for slab in slabs:
            pending.append((slab, pool.submit(_pack, slab)))
            if len(pending) >= window:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        for _, future in pending:
            future.cancel()


def _pack(slab: Slab) -> Packed:
    """Decode, quantize and measure one slab."""
    part, qtype = slab.part, slab.tensor.qtype
    row_bytes = part.qtype.row_bytes(part.shape[-1])
    stored = torch.from_numpy(part.raw().reshape(-1, row_bytes)[slab.rows])
    weights = dequantize(stored, part.qtype, torch.float32)
    power = _sum_of_squares(weights)
    if not math.isfinite(power):
        _refuse_non_finite(slab, weights)
    if qtype is part.qtype:
        return Packed(stored.numpy().reshape(-1).copy(), 0.0, power)
    packed = quantize(weights.numpy(), qtype)
    decoded = dequantize(torch.from_numpy(packed), qtype, torch.float32)
    error = _sum_of_squares(decoded.sub_(weights))
    if not math.isfinite(error):
        raise PlanError(
            f"{part.info.reader.name}: tensor {part.info.name!r} holds a weight of "
            f"{weights.abs().max():.3g}, too large for {qtype}. "
            f"Keep it wide: --tensor-type '{slab.tensor.name}=BF16'"
        )
    return Packed(packed.reshape(-1), error, power)


def _sum_of_squares(values: torch.Tensor) -> float:
    """Sum of squares; the same on every run, as no library may split it between threads."""
    rows = values.numpy()
    with np.errstate(over="ignore"):
        total = float(np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64))
    if math.isfinite(total):
        return total
    # squares of large float32 numbers overflow; infinities and NaN stay what they are
    return float(np.einsum("ij,ij->", rows, rows, dtype=np.float64))


def _refuse_non_finite(slab: Slab, weights: torch.Tensor) -> None:
    row, column = torch.nonzero(~torch.isfinite(weights))[0].tolist()
    value = weights[row, column].item()
    row += slab.rows.start + (slab.part.rows[0] if slab.part.rows else 0)
    raise CheckpointError(
        f"{slab.part.info.reader.name}: tensor {slab.part.info.name!r} holds {value} (row {row}, "
        f"column {column}); expected finite weights. The file is damaged; download it again."
    )
