"""Carry out a conversion plan: every file as a `.part`, all renamed when all are complete.

    error of a tensor = sqrt( sum (w - w')^2 / sum w^2 ),  w' what the file decodes to

With importance there is a second error, whose terms are weighed by that of their input.

What was interrupted is resumed by `formats/resumable.py`.
"""

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zquant.convert.earlier import alone_in, check_disk, check_parts, drop_empty_parts
from zquant.convert.fetch import fetched
from zquant.convert.place import Place
from zquant.convert.plan import ConversionPlan, Output
from zquant.convert.publish import manifest_of, publish
from zquant.convert.receipts import measured_pairs
from zquant.convert.slabs import in_order, slabs_of
from zquant.convert.workers import cores, workers
from zquant.formats.resumable import ResumableFile, sha256_of
from zquant.memory.device import peak_host_bytes

__all__ = ["ConvertResult", "Progress", "convert"]

Progress = Callable[[str, int], None]  # what is being written, weights done since the last call

SLABS_PER_WORKER = 2  # one being computed, one waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertResult:
    """What was written.

    `manifest` is the content of `model.json`; `source_bytes` were read in `seconds`, without what
    an interrupted run had done; `peak_host_bytes` adds up all worker processes.
    """

    folder: Path
    manifest: dict[str, Any]
    place: Place
    seconds: float
    source_bytes: int
    peak_host_bytes: int | None


def convert(plan: ConversionPlan, progress: Progress = lambda *_: None) -> ConvertResult:
    """Write the model folder.

    Raises:
        PlanError: not enough disk (parts stay and can be resumed), or a weight is too large.
        CheckpointError: a weight is NaN or infinite.
        DeviceError: the GPU has no memory left.
        ZQuantError: the folder cannot be written, another process converts into it, or what was
            interrupted there would be lost or is another conversion.
    """
    start = time.perf_counter()
    folder = plan.request.out
    check_disk(plan)
    files: list[ResumableFile] = []
    peaks: dict[int, int] = {}
    with alone_in(folder):
        check_parts(plan)
        drop_empty_parts(plan)
        try:
            source_bytes, hashes = _write_all(plan, files, peaks, progress)
        finally:
            for file in files:
                file.close()
        manifest = manifest_of(plan, files, hashes)
        own = peak_host_bytes()
        publish(folder, files, manifest)
    return ConvertResult(
        folder=folder,
        manifest=manifest,
        place=plan.place,
        seconds=time.perf_counter() - start,
        source_bytes=source_bytes,
        peak_host_bytes=sum({**peaks, os.getpid(): own}.values()) if own else None,
    )


def _write_all(
    plan: ConversionPlan, files: list[ResumableFile], peaks: dict[int, int], progress: Progress
) -> tuple[int, list[str]]:
    """Every output as a sealed part, added to `files`; returns the bytes read and every sha256.

    `peaks` gets the peak memory of every process that worked.
    """
    count, source_bytes = plan.request.threads or cores(), 0
    gpu = plan.place.gpu
    hashes: list[Future[str]] = []
    with workers(count, 0 if gpu else plan.n_locked) as pool:
        for output in plan.outputs:
            file = ResumableFile(
                output.path, output.fingerprint, output.header, resume=plan.request.resume
            )
            files.append(file)
            job = _Job(output, file, gpu, peaks, progress)
            source_bytes += job.write(pool, count * SLABS_PER_WORKER)
            file.seal(_final_header(output, file))
            hashes.append(pool.submit(sha256_of, file.written))  # beside the next output
        return source_bytes, [each.result() for each in hashes]


@dataclass(frozen=True, slots=True)
class _Job:
    """One output on its way into its file."""

    output: Output
    file: ResumableFile
    gpu: torch.device | None
    peaks: dict[int, int]
    progress: Progress

    def write(self, pool: Executor, window: int) -> int:
        """Everything that the file does not hold yet; returns the bytes read."""
        output, file = self.output, self.file
        n_done = len(file.notes)
        done, left = output.tensors[:n_done], output.tensors[n_done:]
        self.progress(output.path.name, sum(t.n_weights for t in done))
        sums, sum64 = np.zeros(4), 0
        with (
            closing(fetched(slabs_of(left))) as slabs,
            closing(in_order(pool, slabs, window, self.gpu)) as results,
        ):
            for slab, packed in results:
                if slab.offset > file.size:  # alignment, before a tensor's first slab only
                    file.pad(slab.offset)
                sums += packed.sums
                sum64 = (sum64 + packed.source_sum64) % 2**64
                note = None
                if slab.last:
                    errors = _errors(sums, weighed=slab.importance is not None)
                    note = {"errors": errors, "source_sum64": sum64}
                    sums, sum64 = np.zeros(4), 0
                file.append(packed.data, note, last=slab.last)
                self.peaks[packed.process] = packed.peak_host_bytes or 0
                self.progress(output.path.name, slab.n_weights)
        file.pad(output.total_size)
        return sum(part.nbytes for tensor in left for part in tensor.parts)


def _final_header(output: Output, file: ResumableFile) -> bytes:
    """The header with the receipt's measured part; safetensors have none."""
    if output.component == "vae":
        return output.header
    errors = [note["errors"]["relative_rms_error"] for note in file.notes]
    sums = [note["source_sum64"] for note in file.notes]
    return output.sealed(measured_pairs(errors, file.checksums, sums))


def _errors(sums: npt.NDArray[np.float64], *, weighed: bool) -> dict[str, float]:
    """What `model.json` says of a tensor's loss."""
    names = ("relative_rms_error", "weighted_rms_error")[: 1 + weighed]
    pairs = zip(names, sums.reshape(2, 2).tolist(), strict=False)
    return {name: math.sqrt(error / power) if power else 0.0 for name, (error, power) in pairs}
