"""Carry out a conversion plan: slabs of rows through a pool of threads, written in order.

A slab is decoded, quantized and measured by one thread (numpy and torch release the interpreter
lock), a bounded number of slabs is under way, and source pages are dropped as soon as a tensor is
done, so memory does not depend on the size of the model.

    error of a tensor = sqrt( sum (w - w')^2 / sum w^2 ),  w' what the file decodes to
"""

import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import zquant
from zquant.convert.plan import ConversionPlan, Output, OutputTensor
from zquant.errors import CheckpointError, PlanError, ZQuantError
from zquant.formats.model_folder import MANIFEST, MANIFEST_FORMAT
from zquant.formats.names import Part
from zquant.formats.resumable import ResumableFile
from zquant.memory.device import peak_host_bytes
from zquant.quant.codec import dequantize, quantize
from zquant.units import format_bytes

__all__ = ["ConvertResult", "Progress", "convert"]

Progress = Callable[[str, int], None]  # what is being written, weights done since the last call

SLAB_WEIGHTS = 2**20
SLABS_PER_THREAD = 2  # one being computed, one waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertResult:
    """What was written.

    `manifest` is the content of `model.json`; `seconds` and `source_bytes` cover the weights.
    """

    folder: Path
    manifest: dict[str, Any]
    seconds: float
    source_bytes: int
    n_weights: int
    peak_host_bytes: int | None


@dataclass(frozen=True, slots=True)
class _Slab:
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
class _Packed:
    data: Any
    error: float  # sum of squared errors
    power: float  # sum of squared weights


def convert(plan: ConversionPlan, progress: Progress = lambda *_: None) -> ConvertResult:
    """Write the model folder.

    Raises:
        PlanError: not enough disk; parts stay and can be resumed.
        CheckpointError: a weight is NaN or infinite.
        ZQuantError: the folder cannot be written.
    """
    start = time.perf_counter()
    folder = plan.request.out
    _make_folder(folder)
    _check_disk(plan)
    threads = plan.request.threads or _cores()
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the pool is the parallelism
    files = []
    try:
        with ThreadPoolExecutor(threads) as pool:
            for output in plan.outputs:
                file = ResumableFile(output.path, output.fingerprint, resume=plan.request.resume)
                files.append(file)
                _write(output, file, pool, threads * SLABS_PER_THREAD, progress)
                file.seal()
    finally:
        torch.set_num_threads(torch_threads)
        for file in files:
            file.close()
    manifest = _manifest(plan, files)
    _publish(folder, files, manifest)
    return ConvertResult(
        folder=folder,
        manifest=manifest,
        seconds=time.perf_counter() - start,
        source_bytes=sum(p.nbytes for o in plan.outputs for t in o.tensors for p in t.parts),
        n_weights=plan.n_weights,
        peak_host_bytes=peak_host_bytes(),
    )


def _write(
    output: Output, file: ResumableFile, pool: ThreadPoolExecutor, window: int, progress: Progress
) -> None:
    """Everything of `output` that `file` does not hold yet."""
    if not file.notes:
        file.append(output.header, None)
    done = len(file.notes) - 1
    progress(output.path.name, sum(t.n_weights for t in output.tensors[:done]))
    error = power = 0.0
    for slab, packed in _in_order(pool, _slabs(output.tensors[done:]), window):
        tensor = slab.tensor
        if tensor.offset > file.size:  # alignment, before a tensor's first slab only
            file.append(bytes(tensor.offset - file.size), None, last=False)
        error, power = error + packed.error, power + packed.power
        note = None
        if slab.last:
            note = math.sqrt(error / power) if power else 0.0
            error = power = 0.0
            output.source.forget()
        file.append(packed.data, note, last=slab.last)
        progress(output.path.name, slab.n_weights)
    if file.size < output.total_size:
        file.append(bytes(output.total_size - file.size), None)


def _slabs(tensors: tuple[OutputTensor, ...]) -> Iterator[_Slab]:
    for tensor in tensors:
        width = tensor.shape[-1]
        step = max(1, SLAB_WEIGHTS // width)
        for part in tensor.parts:
            n_rows = math.prod(part.shape) // part.shape[-1]
            for row in range(0, n_rows, step):
                last = part is tensor.parts[-1] and row + step >= n_rows
                yield _Slab(tensor, part, slice(row, min(row + step, n_rows)), last)


def _in_order(
    pool: ThreadPoolExecutor, slabs: Iterator[_Slab], window: int
) -> Iterator[tuple[_Slab, _Packed]]:
    """Results in the order of `slabs`, at most `window` of them under way."""
    pending: deque[tuple[_Slab, Future[_Packed]]] = deque()
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


def _pack(slab: _Slab) -> _Packed:
    """Decode, quantize and measure one slab."""
    part, qtype = slab.part, slab.tensor.qtype
    row_bytes = part.qtype.row_bytes(part.shape[-1])
    stored = torch.from_numpy(part.raw().reshape(-1, row_bytes)[slab.rows])
    weights = dequantize(stored, part.qtype, torch.float32)
    power = _sum_of_squares(weights)
    if not math.isfinite(power):
        _refuse_non_finite(slab, weights)
    if qtype is part.qtype:
        return _Packed(stored.numpy().reshape(-1).copy(), 0.0, power)
    packed = quantize(weights.numpy(), qtype)
    decoded = dequantize(torch.from_numpy(packed), qtype, torch.float32)
    return _Packed(packed.reshape(-1), _sum_of_squares(weights.sub_(decoded)), power)


def _sum_of_squares(values: torch.Tensor) -> float:
    """Sum of squares; the same on every run, as no library may split it between threads."""
    flat = values.reshape(-1).numpy()
    return float(np.einsum("i,i->", flat, flat))


def _refuse_non_finite(slab: _Slab, weights: torch.Tensor) -> None:
    bad = torch.nonzero(~torch.isfinite(weights))
    if len(bad):
        row, column = bad[0].tolist()
        value = weights[row, column].item()
        raise CheckpointError(
            f"{slab.part.info.reader.name}: tensor {slab.part.info.name!r} holds {value} (row "
            f"{row + slab.rows.start}, column {column}); expected finite weights. The file is "
            f"damaged; download it again."
        )
    raise CheckpointError(
        f"{slab.part.info.reader.name}: tensor {slab.part.info.name!r} holds values beyond 1e19, "
        f"which no real model has. The file is damaged; download it again."
    )


def _manifest(plan: ConversionPlan, files: list[ResumableFile]) -> dict[str, Any]:
    """Content of `model.json`; depends on the sources and options only."""
    variant = plan.variant
    return {
        "format": MANIFEST_FORMAT,
        "zquant": zquant.__version__,
        "variant": variant.name,
        "shift": variant.shift,
        "steps": variant.steps,
        "guidance_scale": variant.guidance_scale,
        "source": plan.origin.label,
        "files": {
            output.component: {
                "name": output.path.name,
                "policy": output.policy,
                "bytes": output.total_size,
                "sha256": file.sha256,
                "weights": output.n_weights,
                "bpw": round(output.bpw, 4),
            }
            for output, file in zip(plan.outputs, files, strict=True)
        },
        "tensors": {
            output.component: {
                tensor.name: {"qtype": tensor.qtype.name, "relative_rms_error": note}
                for tensor, note in zip(output.tensors, file.notes[1:], strict=False)
            }
            for output, file in zip(plan.outputs, files, strict=True)
        },
    }


def _publish(folder: Path, files: list[ResumableFile], manifest: dict[str, Any]) -> None:
    """Give every file its name, `model.json` last: without it the folder is not a model."""
    target = folder / MANIFEST
    part = target.with_name(MANIFEST + ".part")
    try:
        with part.open("w", encoding="utf-8") as text:
            json.dump(manifest, text, indent=1, ensure_ascii=False)
            text.flush()
            os.fsync(text.fileno())
        target.unlink(missing_ok=True)
        for file in files:
            file.publish()
        part.replace(target)
        for file in files:
            file.clean_up()
    except OSError as error:
        raise ZQuantError(
            f"{folder}: cannot be completed ({error.strerror}). Run again with --resume."
        ) from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZQuantError(
            f"{folder}: cannot be created ({error.strerror}). Choose a folder you may write to."
        ) from error


def _check_disk(plan: ConversionPlan) -> None:
    """Room for every byte that is still to be written."""
    parts = [o.path.with_name(o.path.name + ".part") for o in plan.outputs]
    have = sum(part.stat().st_size for part in parts if part.exists())
    free = shutil.disk_usage(plan.request.out).free
    if free + have < plan.total_size:
        raise PlanError(
            f"{plan.request.out}: {format_bytes(plan.total_size - have)} are needed, "
            f"{format_bytes(free)} are free. Free some space or choose another disk."
        )


def _cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
