"""Carry out a conversion plan: every file as a `.part`, all renamed when all are complete.

    error of a tensor = sqrt( sum (w - w')^2 / sum w^2 ),  w' what the file decodes to

What was interrupted is resumed by `formats/resumable.py`.
"""

import math
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zquant.convert.place import Place
from zquant.convert.plan import ConversionPlan, Output
from zquant.convert.publish import manifest_of, publish
from zquant.convert.slabs import in_order, slabs_of
from zquant.convert.workers import cores, workers
from zquant.errors import PlanError, ZQuantError
from zquant.formats.resumable import ResumableFile
from zquant.memory.device import peak_host_bytes
from zquant.units import format_bytes

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
        ZQuantError: the folder cannot be written, or its parts are of another conversion.
    """
    start = time.perf_counter()
    folder = plan.request.out
    _check_disk(plan)
    _make_folder(folder)
    for output in plan.outputs:
        _drop_other_parts(output, resume=plan.request.resume)
    files: list[ResumableFile] = []
    peaks: dict[int, int] = {}
    try:
        source_bytes = _write_all(plan, files, peaks, progress)
    finally:
        for file in files:
            file.close()
    manifest = manifest_of(plan, files)
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
) -> int:
    """Every output as a sealed part, added to `files`; returns the bytes read.

    `peaks` gets the peak memory of every process that worked.
    """
    count, source_bytes = plan.request.threads or cores(), 0
    gpu = plan.place.gpu
    with workers(count, 0 if gpu else plan.n_searched) as pool:
        for output in plan.outputs:
            file = ResumableFile(output.path, output.fingerprint, resume=plan.request.resume)
            files.append(file)
            job = _Job(output, file, gpu, peaks, progress)
            source_bytes += job.write(pool, count * SLABS_PER_WORKER)
            file.seal()
    return source_bytes


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
        if not file.notes:
            file.append(output.header, None)
        n_done = len(file.notes) - 1
        done, left = output.tensors[:n_done], output.tensors[n_done:]
        self.progress(output.path.name, sum(t.n_weights for t in done))
        error = power = 0.0
        with closing(in_order(pool, slabs_of(left), window, self.gpu)) as results:
            for slab, packed in results:
                if slab.offset > file.size:  # alignment, before a tensor's first slab only
                    file.append(bytes(slab.offset - file.size), None, last=False)
                error, power = error + packed.error, power + packed.power
                note = None
                if slab.last:
                    note = math.sqrt(error / power) if power else 0.0
                    error = power = 0.0
                file.append(packed.data, note, last=slab.last)
                self.peaks[packed.process] = packed.peak_host_bytes or 0
                self.progress(output.path.name, slab.n_weights)
        if file.size < output.total_size:
            file.append(bytes(output.total_size - file.size), None)
        return sum(part.nbytes for tensor in left for part in tensor.parts)


def _drop_other_parts(output: Output, *, resume: bool) -> None:
    """Remove what an interrupted run with another policy left of this component."""
    own = output.path.with_name(output.path.name + ".part.journal")
    for journal in output.path.parent.glob(f"{output.component}-*.gguf.part.journal"):
        if journal == own:
            continue
        part = journal.with_suffix("")
        if resume:
            raise ZQuantError(
                f"{part}: made with other options than {output.policy}; it cannot be resumed so. "
                f"Run with the options of the interrupted run, or without --resume to start over."
            )
        part.unlink(missing_ok=True)
        journal.unlink()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZQuantError(
            f"{folder}: cannot be created ({error.strerror}). Choose a folder you may write to."
        ) from error


def _check_disk(plan: ConversionPlan) -> None:
    """Room for every byte that is still to be written."""
    have = sum(_present_bytes(output) for output in plan.outputs)
    folder = plan.request.out.absolute()
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    if free + have < plan.total_size:
        raise PlanError(
            f"{plan.request.out}: {format_bytes(plan.total_size - have)} are needed, "
            f"{format_bytes(free)} are free. Free some space or choose another disk."
        )


def _present_bytes(output: Output) -> int:
    """Bytes of the part, or of the file that a run killed while publishing has named already."""
    part = output.path.with_name(output.path.name + ".part")
    journal = part.with_name(part.name + ".journal")
    if not part.exists() and journal.exists() and output.path.exists():
        return output.path.stat().st_size
    return part.stat().st_size if part.exists() else 0
