"""How much of a matrix's output is lost in each qtype, from a sample of its rows.

    loss = mean over parts of  sum importance[k] (w - w')^2 / sum importance[k] w^2

w' is what the qtype decodes to. With the mean square of every input as importance, and inputs that
do not know of one another, that is the square of the error of the output relative to the output;
without importance all inputs count the same. Parts are normalised one by one, as the model does: a
norm follows q and k, and another what v becomes.

The sample is the same on every run: short runs of rows, evenly spread. Rows are quantized alone, so
those of the sample become what they will be in the file.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from zquant.convert.plan import OutputTensor
from zquant.convert.workers import cores, workers
from zquant.errors import CheckpointError
from zquant.formats.names import Part
from zquant.quant.codec import dequantize, quantize
from zquant.quant.qtypes import QType
from zquant.quant.scaled import dequantize_scaled

__all__ = ["Losses", "MeasureProgress", "measure_losses"]

Losses = dict[str, float]  # by qtype; one that cannot hold the weights is not there
MeasureProgress = Callable[[str, int, int], None]  # phase, tensors done, tensors

RUNS, RUN_ROWS = 12, 8  # of one part


def measure_losses(
    tensors: Sequence[OutputTensor],
    candidates: Sequence[Sequence[QType]],
    threads: int | None = None,
    progress: MeasureProgress = lambda *_: None,
) -> dict[str, Losses]:
    """The loss of every tensor in each of its candidates.

    Args:
        tensors: matrices; their `qtype` does not matter, their `importance` does.
        candidates: for each tensor the qtypes to try.
        threads: worker threads or processes; None: one per core.
        progress: called when it begins, and as tensors are done.

    Returns:
        name -> qtype's name -> loss, at least 0; the same on every run.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    jobs = zip(tensors, candidates, strict=True)
    searched = sum(_n_sampled(tensor) * len(qtypes) for tensor, qtypes in jobs)
    found: dict[str, Losses] = {}
    with workers(threads or cores(), searched) as pool:
        results = pool.map(_measure, tensors, candidates)
        progress("measuring", 0, len(tensors))
        for tensor, losses in zip(tensors, results, strict=True):
            found[tensor.name] = losses
            progress("measuring", len(found), len(tensors))
    return found


def _n_sampled(tensor: OutputTensor) -> int:
    rows = sum(last - first for part in tensor.parts for first, last in _runs(part))
    return rows * tensor.shape[-1]


def _runs(part: Part) -> Iterator[tuple[int, int]]:
    """Ranges of rows to sample, each in the middle of its share of the part."""
    n_rows = math.prod(part.shape[:-1])
    if n_rows <= RUNS * RUN_ROWS:
        yield 0, n_rows
        return
    for run in range(RUNS):
        middle = (2 * run + 1) * n_rows // (2 * RUNS)
        yield middle - RUN_ROWS // 2, middle - RUN_ROWS // 2 + RUN_ROWS


def _measure(tensor: OutputTensor, candidates: Sequence[QType]) -> Losses:
    """The loss of one tensor in each candidate that can hold it."""
    samples = [_sample(part) for part in tensor.parts]
    weighing = np.ones(tensor.shape[-1]) if tensor.importance is None else tensor.importance
    importance = () if tensor.importance is None else (tensor.importance,)
    losses = {}
    for qtype in candidates:
        shares = []
        for weights in samples:
            packed = torch.from_numpy(quantize(weights, qtype, *importance))
            error = dequantize(packed, qtype, torch.float32).numpy() - weights
            shares.append(_power(error, weighing) / (_power(weights, weighing) or 1.0))
        loss = sum(shares) / len(shares)
        if math.isfinite(loss):
            losses[qtype.name] = loss
    return losses


def _sample(part: Part) -> npt.NDArray[np.float32]:
    """The sampled rows, float32 `[n, K]`."""
    n_columns = part.shape[-1]
    row_bytes, runs = part.qtype.row_bytes(n_columns), list(_runs(part))
    rows = torch.cat([torch.arange(first, last) for first, last in runs])
    stored = np.empty((sum(last - first for first, last in runs), row_bytes), np.uint8)
    at = 0
    for first, last in runs:
        part.read_into(first * row_bytes, stored[at : at + last - first].reshape(-1))
        at += last - first
    weights: npt.NDArray[np.float32]
    weights = dequantize_scaled(
        torch.from_numpy(stored), part.qtype, torch.float32, part.scaling and part.scaling.of(rows)
    ).numpy()
    if not np.isfinite(weights).all():
        raise CheckpointError(
            f"{part.info.reader.name}: tensor {part.info.name!r} holds NaN or infinity; expected "
            f"finite weights. The file is damaged; download it again."
        )
    return weights


def _power(values: npt.NDArray[np.float32], weighing: npt.NDArray[np.floating]) -> float:
    """Sum of squares, those of column k times `weighing[k]`."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.square(values, dtype=np.float64).sum(axis=0) @ weighing.astype(np.float64))
