"""Every size in a process of its own, the ceiling before and after all, one document in the end.

One process looks at the machine and measures its rates; only then are pictures painted. A size that
fails is kept as a failure and the others go on. This process never uses the device.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import zquant
from zquant.bench.ceiling import overlap, unwaited
from zquant.bench.schema import SCHEMA, check
from zquant.bench.table import ceiling_line, failed_line
from zquant.bench.watch import Nvml, Watch
from zquant.errors import ZQuantError
from zquant.request import RunRequest
from zquant.units import format_seconds

__all__ = ["Bench", "bench"]

WORKER = (sys.executable, "-m", "zquant.bench.worker")
EVENT = '{"event"'
INTERRUPTED = (130, -2)
SIZES = ((512, 512), (768, 768), (1024, 1024), (1280, 720), (1536, 1536))
MOST_REPEATED = 99  # the number of a picture has two digits in its prompt
MEANS = {
    "cold": "the first picture of a fresh process: memory is allocated and kernels are loaded; "
    "files may be in the system's page cache",
    "warm": "later pictures of the same process, each with another prompt of as many tokens",
    "startup": "from the start of the process until the model is open, its vocabulary read and "
    "the picture planned",
    "first_step": "with placing the weights; the other steps are without",
    "moved": "by the cold picture; overlap is the part of it that cost no time, at least",
}
PHASES = ("plan_s", "text_encoder_s", "first_step_s", "step_s", "vae_s", "save_s", "total_s")
Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What to measure.

    Attributes:
        model: a folder, or demo.
        sizes: width and height of every picture.
        steps: 2 or more; None is the model's own number.
        repeat: warm pictures per size, 1 to 99.
        machine: arguments of `Engine.open`.
        budget_bytes: ceiling on VRAM; None is what is free.
        ram_bytes: likewise of RAM.

    Raises:
        ValueError: a number is out of range.
    """

    model: str
    sizes: Sequence[tuple[int, int]] = SIZES
    steps: int | None = None
    repeat: int = 3
    machine: Mapping[str, str] = field(default_factory=dict)
    budget_bytes: int | None = None
    ram_bytes: int | None = None

    def __post_init__(self) -> None:
        for width, height in self.sizes:
            RunRequest(prompt="any", width=width, height=height, steps=self.steps)
        if self.steps is not None and self.steps < 2:
            raise ValueError(
                f"steps is {self.steps}; it must be 2 or more, as the first step is told apart"
            )
        if not 1 <= self.repeat <= MOST_REPEATED:
            raise ValueError(f"repeat is {self.repeat}; it must be from 1 to {MOST_REPEATED}")

    def job(self, kind: str, **values: Any) -> dict[str, Any]:
        """For a worker."""
        return {
            "kind": kind,
            "model": self.model,
            "steps": self.steps,
            "budget_bytes": self.budget_bytes,
            "ram_bytes": self.ram_bytes,
            "machine": dict(self.machine),
            **values,
        }


def bench(what: Bench, command: str, say: Say, progress: Progress) -> dict[str, Any]:
    """Measure; the document is valid.

    Args:
        what: to measure.
        command: that asked for it, for the document.
        say: is told how far it is.
        progress: as of `Engine.generate`.

    Raises:
        ZQuantError: the model or the device is not what it should be.
    """
    say("measuring the ceiling: products, memory, link and file")
    survey = _survey(what.job("survey", sizes=list(what.sizes)))
    found = survey.pop("sizes")
    # measured once: it could turn out otherwise in the next process
    dtype = survey["device"]["compute_dtype"]
    job = what.job("paint", repeat=what.repeat)
    job["machine"]["compute_dtype"] = dtype
    uuid, rows = survey["device"]["uuid"], []
    for (width, height), ceiling in zip(what.sizes, found, strict=True):
        row = {"width": width, "height": height, "failure": None, **ceiling}
        if row["failure"] is None:
            say(ceiling_line(row))
            nvml = Nvml(uuid) if uuid else None
            row |= _measured(job | {"width": width, "height": height}, row, nvml, say, progress)
        if row["failure"]:
            say(failed_line(row))
        rows.append(row)
    say("measuring the ceiling again, as other programs may have lowered it")
    with suppress(ZQuantError):  # of pictures that are painted; the first ceiling stays
        found = _survey(job | {"kind": "survey", "sizes": list(what.sizes)})["sizes"]
    for row, later in zip(rows, found, strict=True):
        if row["failure"] is None:
            row["ceiling"] = _lower(row["ceiling"], later.get("ceiling"))
            rate = survey["rates"]["file_bytes_s"]
            _compare(row, rate, is_gpu=survey["machine"]["plan"]["is_gpu"])
    document = _document(what, command, survey, rows)
    check(document)
    return document


def _survey(job: Mapping[str, Any]) -> dict[str, Any]:
    """The machine, the model, and what a step needs at least at the rates of now."""
    found: dict[str, Any] = {}

    def hear(event: dict[str, Any]) -> None:
        if event.pop("event") == "survey":
            found.update(event)

    _converse(job, hear)
    return found


def _lower(first: dict[str, Any], later: dict[str, Any] | None) -> dict[str, Any]:
    """The ceiling at the better rates; a picture that is planned otherwise now says nothing."""
    if later is None or later["streamed_blocks"] != first["streamed_blocks"]:
        return first
    return min(first, later, key=lambda ceiling: ceiling["roofline_s"])


def _document(
    what: Bench, command: str, survey: Mapping[str, Any], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    machine = survey["machine"]
    names = ("zquant", "torch", "python", "triton", "driver")
    return {
        "schema": SCHEMA,
        "command": command,
        "versions": {name: machine[name] for name in names} | {"commit": _commit()},
        "machine": machine,
        "device": survey["device"],
        "model": survey["model"],
        "means": MEANS,
        "rates": survey["rates"],
        "settings": {
            "steps": survey["model"]["steps"] if what.steps is None else what.steps,
            "repeat": what.repeat,
            "budget_bytes": what.budget_bytes,
            "max_ram_bytes": what.ram_bytes,
        },
        "sizes": rows,
    }


def _commit() -> str | None:
    """Of the checkout that zquant runs from; None where it is installed."""
    root = Path(zquant.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _converse(
    job: Mapping[str, Any], hear: Callable[[dict[str, Any]], None], watch: Watch | None = None
) -> None:
    """Run a worker to its end and hand on what it tells.

    Raises:
        ZQuantError: what it says is wrong, or that it ended without a word.
    """
    errors: list[str] = []
    command = [*WORKER, json.dumps(job)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if watch is not None:
                watch.start(process.pid)
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith(EVENT):  # a library's
                    continue
                event = json.loads(line)
                if event["event"] == "error":
                    errors.append(event["message"])
                else:
                    hear(event)
        except BaseException:
            process.kill()
            raise
    if process.returncode in INTERRUPTED:
        raise KeyboardInterrupt
    if errors:
        raise ZQuantError(errors[0])
    if process.returncode:
        raise ZQuantError(
            f"the measuring process ended with exit code {process.returncode}; what it said is "
            f"above. If it said nothing, memory ran out: use a smaller size, or --max-ram."
        )


def _measured(
    job: Mapping[str, Any], row: Mapping[str, Any], nvml: Nvml | None, say: Say, progress: Progress
) -> dict[str, Any]:
    """Figures of one size, or the failure of its process."""
    size = f"{row['width']}x{row['height']}"
    runs: list[dict[str, Any]] = []
    startup: list[float] = []

    def hear(event: dict[str, Any]) -> None:
        kind = event.pop("event")
        name = f"warm {len(runs)} of {job['repeat']}" if runs else "cold"
        if kind == "ready":
            startup.append(time.perf_counter() - began)
            say(f"{size}: ready after {format_seconds(startup[0])}")
        elif kind == "progress":
            progress(f"{size} {name}, {event['phase']}", event["done"], event["total"])
        elif kind == "run":
            runs.append(event)
            say(f"{size}: {name}, {format_seconds(event['total_s'])}")

    try:
        with TemporaryDirectory() as folder, Watch(nvml) as watch:
            began = time.perf_counter()
            _converse({**job, "folder": folder}, hear, watch)
    except ZQuantError as error:
        return {"failure": str(error)}
    return {"startup_s": startup[0], **_figures(runs), "peaks": _peaks(runs, watch)}


def _figures(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    cold, *warm = runs
    memory = cold["memory"]
    streams = list(memory["streams"].values())
    notices = [notice for run in runs for notice in run["notices"]]
    return {
        "cold": _phases([cold]),
        "warm": _phases(warm),
        "predicted": {
            "vram_bytes": memory["predicted_vram_bytes"],
            "ram_bytes": memory["predicted_host_bytes"],
            "step_s": memory["predicted_step_s"],
        },
        "moved": {
            "streamed_blocks": memory["streamed_blocks"],
            "read_bytes": sum(stream["bytes_read"] for stream in streams),
            "copied_bytes": sum(stream["bytes_copied"] for stream in streams),
            "storage_read_bytes": cold["storage_read_bytes"],
            "overlap_at_least": None,
        },
        "streams": memory["streams"],
        "notices": list(dict.fromkeys(notices)),
    }


def _phases(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds of every phase; steps but the first of all runs are one set."""
    steps = [s for run in runs for s in run["steps_s"]]
    values = {name: steps if name == "step_s" else [run[name] for run in runs] for name in PHASES}
    return {
        name: {
            "median": statistics.median(seconds),
            "min": min(seconds),
            "max": max(seconds),
            "n": len(seconds),
        }
        for name, seconds in values.items()
    }


def _peaks(runs: Sequence[Mapping[str, Any]], watch: Watch) -> dict[str, Any]:
    """Largest of all runs."""

    def most(name: str) -> int | None:
        return max((run[name] for run in runs if run[name] is not None), default=None)

    return {
        "vram_process_bytes": watch.vram_bytes,
        "vram_witness": watch.witness,
        "vram_samples_hz": round(watch.rate_hz, 1),
        "vram_allocator_bytes": most("peak_allocator_bytes"),
        "ram_bytes": most("peak_ram_bytes"),
    }


def _compare(row: dict[str, Any], file_bytes_s: float, *, is_gpu: bool) -> None:
    """Add to a row what its distance from the ceiling is."""
    if row["failure"] is not None:
        return
    ceiling, moved = row["ceiling"], row["moved"]
    step_s = row["warm"]["step_s"]["median"]
    row["times_ceiling"] = step_s / ceiling["roofline_s"]
    if moved["streamed_blocks"] != ceiling["streamed_blocks"]:
        row["notices"].append(
            f"{moved['streamed_blocks']} blocks were streamed, but the ceiling is for "
            f"{ceiling['streamed_blocks']}: other programs took or freed memory meanwhile"
        )
        return
    if is_gpu:
        computing = max(ceiling["products_s"], ceiling["weights_s"])
        moved["overlap_at_least"] = overlap(step_s, computing, ceiling["moving_s"])
    elif stream := row["streams"].get("dit"):
        reading = stream["bytes_read"] / file_bytes_s
        moved["overlap_at_least"] = unwaited(stream["waited_s"], reading)
