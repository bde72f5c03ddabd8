"""Carry out a conversion plan: every file as a `.part`, all renamed when all are complete.

    error of a tensor = sqrt( sum (w - w')^2 / sum w^2 ),  w' what the file decodes to

With importance there is a second error, whose terms are weighed by that of their input.

What was interrupted is resumed by `formats/resumable.py`.
"""

import math
import os
import shutil
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

from zquant.convert.fetch import fetched
from zquant.convert.place import Place
from zquant.convert.plan import ConversionPlan, Output
from zquant.convert.publish import manifest_of, publish
from zquant.convert.receipts import measured_pairs
from zquant.convert.slabs import in_order, slabs_of
from zquant.convert.workers import cores, workers
from zquant.errors import PlanError, ZQuantError
from zquant.formats.resumable import ResumableFile, sha256_of
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
