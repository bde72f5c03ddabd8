"""Compare a file with its source: every weight's error, the source's bytes, a sample of new bytes.

    error of a tensor = sqrt( sum (w - w')^2 / sum w^2 ),  w of the source, w' what the file has

Tensors are matched under their official names, whatever either side calls them. Of every slab, the
first rows are quantized again and must give the stored bytes; that makes about 1 % of the work of a
conversion and touches every part of every tensor.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from zquant.convert.importance import weighs
from zquant.convert.receipts import Receipt, rounded, sum64
from zquant.convert.slabs import sum_of_squares
from zquant.convert.workers import run_in_order
from zquant.formats.names import Part
from zquant.quant.codec import quantize
from zquant.quant.scaled import dequantize_scaled
from zquant.verify.scan import Progress

__all__ = ["Comparison", "compare", "source_findings"]

SLAB_WEIGHTS = 2**19
SAMPLE_WEIGHTS = 2**12  # of every slab, quantized again
# sums of float32 squares in another order, and the four digits of a receipt
SAME_ERROR = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A file beside its source; all are by tensor name in the file.

    `other_bytes` are the tensors whose sample is stored otherwise than it is quantized now.
    """

    errors: dict[str, float]
    source_sum64: dict[str, int]
    other_bytes: tuple[str, ...]
    n_sampled: int


@dataclass(frozen=True, slots=True)
class _Slab:
    """The same rows of a weight in both files."""

    ours: Part
    theirs: Part
    rows: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Sums:
    """What a slab adds: to its tensor's error, to the sum of the source's bytes, to the sample."""

    error: float
    power: float
    source_sum64: int
    n_sampled: int
    same: bool


def compare(
    ours: Mapping[str, Part],
    theirs: Mapping[str, Part],
    pool: Executor,
    window: int,
    *,
    weighed: bool,
    progress: Progress,
) -> Comparison:
    """Compare every weight.

    Args:
        ours: official name -> part of the file that is checked.
        theirs: the same of its source; it has all these names, in the same shapes.
        pool: threads that read, decode and quantize.
        window: slabs that may be in memory.
        weighed: whether importance was used; types that it guides are not quantized again.
        progress: is told the file, and its bytes.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    source_sum64: dict[str, int] = defaultdict(int)
    other: dict[str, None] = {}
    n_sampled = done = 0
    total = sum(part.nbytes for part in ours.values())
    work = partial(_compare, weighed=weighed)
    with closing(run_in_order(pool, work, _slabs(ours, theirs), window)) as results:
        for slab, found in results:
            name = slab.ours.info.name
            sums[name][0] += found.error
            sums[name][1] += found.power
            source_sum64[name] = (source_sum64[name] + found.source_sum64) % 2**64
            n_sampled += found.n_sampled
            if not found.same:
                other[name] = None
            n_rows = slab.rows[1] - slab.rows[0]
            done += n_rows * slab.ours.qtype.row_bytes(slab.ours.shape[-1])
            progress(slab.ours.info.reader.name, done, total)
    return Comparison(
        errors={name: math.sqrt(e / p) if p else 0.0 for name, (e, p) in sums.items()},
        source_sum64=dict(source_sum64),
        other_bytes=tuple(other),
        n_sampled=n_sampled,
    )


def source_findings(name: str, receipt: Receipt, found: Comparison) -> Iterator[str]:
    """Where the receipt and the source disagree; what follows from another source is left out."""
    n, sums = len(found.errors), receipt.source_sum64
    foreign = [t for t, own in found.source_sum64.items() if own != sums.get(t, own)]
    if foreign:
        yield (
            f"{name}: {len(foreign)} of {n} tensors were made from other bytes than this source "
            f"holds (first: {foreign[0]!r}). It was made from {', '.join(receipt.source_files)}; "
            f"give that as --source, or convert again."
        )
    for tensor, error in found.errors.items():
        own = receipt.errors[tensor]
        if tensor not in foreign and not math.isclose(rounded(error), own, rel_tol=SAME_ERROR):
            yield (
                f"{name}: {tensor!r} has the error {error:.4g} against its source; its receipt "
                f"says {own:.4g}. The file was changed after it was made; convert again."
            )
    for tensor in found.other_bytes:
        if tensor not in foreign:
            yield (
                f"{name}: {tensor!r} is stored otherwise than its source is quantized now. The "
                f"file was changed after it was made; convert again."
            )


def _slabs(ours: Mapping[str, Part], theirs: Mapping[str, Part]) -> Iterator[_Slab]:
    for name, part in sorted(ours.items(), key=lambda item: item[1].offset):
        step = max(1, SLAB_WEIGHTS // part.shape[-1])
        n_rows = math.prod(part.shape) // part.shape[-1]
        for row in range(0, n_rows, step):
            yield _Slab(part, theirs[name], (row, min(row + step, n_rows)))


def _compare(slab: _Slab, *, weighed: bool) -> _Sums:
    (theirs, start), (ours, _) = _rows(slab.theirs, slab.rows), _rows(slab.ours, slab.rows)
    weights = _decoded(theirs, slab.theirs, slab.rows)
    decoded = _decoded(ours, slab.ours, slab.rows)
    qtype = slab.ours.qtype
    n_rows = 0 if weighed and weighs(qtype) else max(1, SAMPLE_WEIGHTS // weights.shape[1])
    sample = weights[:n_rows].numpy()
    if qtype == slab.theirs.qtype:
        same = bool(torch.equal(ours, theirs))
    else:
        same = not len(sample) or np.array_equal(quantize(sample, qtype), ours[:n_rows].numpy())
    return _Sums(
        error=sum_of_squares(decoded.sub_(weights)),
        power=sum_of_squares(weights),
        source_sum64=sum64(theirs.numpy().reshape(-1), start),
        n_sampled=sample.size,
        same=same,
    )


def _decoded(stored: torch.Tensor, part: Part, rows: tuple[int, int]) -> torch.Tensor:
    scaling = part.scaling and part.scaling.of(slice(*rows))
    return dequantize_scaled(stored, part.qtype, torch.float32, scaling)


def _rows(part: Part, rows: tuple[int, int]) -> tuple[torch.Tensor, int]:
    """Stored bytes of some rows, uint8 `[n, row_bytes]`, and where in the part they begin."""
    row_bytes = part.qtype.row_bytes(part.shape[-1])
    data: npt.NDArray[np.uint8] = np.empty((rows[1] - rows[0], row_bytes), np.uint8)
    part.read_into(rows[0] * row_bytes, data.reshape(-1))
    return torch.from_numpy(data), rows[0] * row_bytes
