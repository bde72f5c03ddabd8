"""What an earlier conversion left in OUT: to go on from, to keep, or not to be written again.

    dit-Q4_K_M.gguf.part(.journal)   interrupted; lost only when the user says so
    .part.lock                       held by the process that converts into the folder

Parts that hold nothing yet are in nobody's way.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zquant.convert.plan import ConversionPlan, Output
from zquant.convert.receipts import measured_pairs, read_receipt
from zquant.errors import CheckpointError, FormatError, PlanError, ZQuantError
from zquant.formats.detect import open_source
from zquant.formats.locked import take_lock, unlock
from zquant.formats.model_folder import MANIFEST, find_model
from zquant.formats.resumable import bytes_kept
from zquant.units import format_bytes

__all__ = ["alone_in", "check_disk", "check_parts", "drop_empty_parts", "finished"]

LOCK_FILE = ".part.lock"
JOURNAL = ".part.journal"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """OUT, which is made, for this process only.

    Raises:
        ZQuantError: another process converts into it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZQuantError(
            f"{folder}: cannot be created ({error.strerror}). Choose a folder you may write to."
        ) from error
    lock = folder / LOCK_FILE
    try:
        handle = take_lock(lock, "choose another OUT")
    except OSError as error:
        raise ZQuantError(
            f"{folder}: cannot be written ({error.strerror}). Choose a folder you may write to."
        ) from error
    try:
        yield
    finally:
        unlock(handle, lock)


def check_disk(plan: ConversionPlan) -> None:
    """Room for every byte that is still to be written.

    Raises:
        PlanError: there is not.
    """
    have = sum(_present_bytes(output) for output in plan.outputs)
    folder = plan.request.out.absolute()
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    if free + have < plan.total_size:
        raise PlanError(
            f"{plan.request.out}: {format_bytes(plan.total_size - have)} are needed, "
            f"{format_bytes(free)} are free. Free some space or choose another disk."
        )


def check_parts(plan: ConversionPlan) -> None:
    """Parts of interrupted runs either hold nothing or are what the plan goes on from.

    Raises:
        ZQuantError: they would be lost, or were made with other policies.
    """
    folder, own = plan.request.out, [output.path for output in plan.outputs]
    kept = {path: n_bytes for path in _begun(plan.outputs) if (n_bytes := bytes_kept(path))}
    if kept and not plan.request.resume:
        done = ", ".join(f"{path.name} {format_bytes(n)}" for path, n in kept.items())
        raise ZQuantError(
            f"{folder}: an interrupted conversion is here (done: {done}). Go on with --resume and "
            f"the options of that run; to start anew, remove the .part and .part.journal files."
        )
    if foreign := [path for path in kept if path not in own]:
        part = foreign[0].with_name(foreign[0].name + ".part")
        policies = ", ".join(dict.fromkeys(o.policy for o in plan.outputs if o.component != "vae"))
        raise ZQuantError(
            f"{part}: made with other options than {policies}; it cannot be resumed so. Run with "
            f"the options of the interrupted run; to start anew, remove it and {part.name}.journal."
        )


def drop_empty_parts(plan: ConversionPlan) -> None:
    """Remove what is left of runs with other policies, after `check_parts`."""
    own = [output.path for output in plan.outputs]
    for path in _begun(plan.outputs):
        if path not in own:
            path.with_name(path.name + ".part").unlink(missing_ok=True)
            path.with_name(path.name + JOURNAL).unlink()


def finished(plan: ConversionPlan) -> dict[str, Any] | None:
    """The content of `model.json` if OUT has all that the plan would write, else None.

    Sizes and headers are compared, weights are not.

    Raises:
        ZQuantError: another process converts into OUT.
    """
    folder, outputs = plan.request.out, plan.outputs
    if not (folder / MANIFEST).is_file():
        return None
    with alone_in(folder):
        if list(_begun(outputs)):
            return None
        try:
            found = find_model(folder)
            said = dict(found.manifest or {})
            same = (
                [found.dit, found.text_encoder, found.vae] == [output.path for output in outputs]
                and found.variant == plan.variant
                and said.get("source") == plan.origin.label
                and all(map(_is_written, outputs))
            )
        except (CheckpointError, FormatError):
            return None  # damaged, to be written again
    return said if same else None


def _is_written(output: Output) -> bool:
    """Whether the file has the output's size and header, with whatever was measured."""
    path = output.path
    if not path.is_file() or path.stat().st_size != output.total_size:
        return False
    header = output.header
    if output.component != "vae":
        source = open_source(path)
        try:
            receipt = read_receipt(source)
        finally:
            source.close()
        if receipt is None or len(receipt.errors) != len(output.tensors):
            return False
        errors, sums = list(receipt.errors.values()), list(receipt.source_sum64.values())
        header = output.sealed(measured_pairs(errors, list(receipt.crc32.values()), sums))
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _begun(outputs: Sequence[Output]) -> Iterator[Path]:
    """Every file whose journal is in OUT, of these and of other qtypes."""
    for output in outputs:
        pattern = output.path.name if output.component == "vae" else f"{output.component}-*.gguf"
        for journal in sorted(output.path.parent.glob(pattern + JOURNAL)):
            yield journal.with_name(journal.name.removesuffix(JOURNAL))


def _present_bytes(output: Output) -> int:
    """Bytes of the part, or of the file that a run killed while publishing has named already."""
    part = output.path.with_name(output.path.name + ".part")
    journal = output.path.with_name(output.path.name + JOURNAL)
    if not part.exists() and journal.exists() and output.path.exists():
        return output.path.stat().st_size
    return part.stat().st_size if part.exists() else 0
