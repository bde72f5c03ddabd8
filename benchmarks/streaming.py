"""Proof of the memory plan: the same picture within every budget, and at what price.

    python benchmarks/streaming.py MODEL... --budgets none 2GiB 4GiB [--compute int8] [--ballast]

Every model paints the same picture once within each budget, in a process of its own: VRAM on a GPU
(`zquant run --budget`), RAM on a CPU (`--max-ram`); "none" has no ceiling. The process is watched
from outside, 50 times a second. Exit code 1: a process held more than its budget, ran out of
memory or failed, or latents differ between budgets of a model.

Before that each model paints one step, which is reported but not judged. All others are warm: a new
process, but files in the page cache and kernels compiled.

With `--ballast` VRAM is filled first. A plan leaves some of what is free to others, so that much
stays free until the process has announced its plan, and is then taken as well: from there on
exactly the budget is there, and one allocation too many fails.

The ceiling comes first: a step costs no less than its products, at the share of the data sheet's
rate that large kernels reach, and no less than its copies, at the measured rate of the link.

    overlap = 1 - (step - max(copy, compute)) / min(copy, compute),  compute = step within "none"

The last line is one JSON document; `--out` has it after every row.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from machine import describe_machine, new_file, write_document
from streaming_runs import Subject, measured, subject_of
from watch import Gpu

import zquant.memory.doctor
from zquant.memory.paths import AUTO, COMPUTES
from zquant.units import format_bytes, format_seconds, parse_bytes

SCHEMA = "zquant-streaming-1"
WARM = "a new process; files in the page cache and kernels compiled by an earlier one"
GIB = 2**30
BUDGETS = ("none", "2GiB", "3GiB", "4GiB", "6GiB", "8GiB")
LEAST_HZ = 10.0  # a peak that is looked for less often may be missed
RATIO_GOALS = {4 * GIB: 1.03, 2 * GIB: 1.10}  # budget -> most, of the resident step
PLAN_GOAL = 0.05  # most, between plan and peak
ENCODER_GOAL_S = 0.5  # of a warm text encoder of about 4 bits
Q4_BPW = 5.2  # most bits per weight that still are "about 4"


def overlap(step_s: float, compute_s: float, copy_s: float) -> float | None:
    """1: the shorter of copying and computing costs nothing; 0: one comes after the other."""
    if not (compute_s and copy_s):
        return None
    return 1 - (step_s - max(copy_s, compute_s)) / min(copy_s, compute_s)


def compare(
    row: dict[str, Any], resident: Mapping[str, Any], subject: Subject, *, gpu: bool
) -> None:
    """Add to a row what follows from it and from the one without a budget."""
    step_s, resident_s = row["step_s"], resident.get("step_s", 0.0)
    # the link is busy for the whole step where copies take longer than products
    busy = row["copy_s"] >= resident_s > 0
    row["moved_gib_s"] = row["step_bytes"] / step_s / GIB
    row["copying_gib_s"] = row["moved_gib_s"] if busy else None
    row["ratio"] = step_s / resident_s if resident_s else None
    row["overlap"] = overlap(step_s, resident_s, row["copy_s"])
    peak, planned = (row[name] for name in _names(gpu))
    goals = {}
    if gpu and peak and planned:
        goals["plan"] = (abs(planned / peak - 1), PLAN_GOAL)
    if gpu and row["ratio"] and row["budget_bytes"] in RATIO_GOALS:
        goals["step"] = (row["ratio"], RATIO_GOALS[row["budget_bytes"]])
    if gpu and subject.encoder_bpw <= Q4_BPW:
        goals["text encoder"] = (row["text_encoder_s"], ENCODER_GOAL_S)
    row["goals"] = [
        {"of": name, "value": round(value, 4), "at_most": most, "met": value <= most}
        for name, (value, most) in goals.items()
    ]


def judge(
    row: dict[str, Any], first: Mapping[str, Any], *, gpu: bool, max_ram: int | None = None
) -> None:
    """Add to the failures of a picture that was painted; all must have the latents of `first`."""
    failures, ceilings = row["failures"], {_names(gpu)[0]: row["budget_bytes"]}
    if gpu:
        ceilings["peak_ram_bytes"] = max_ram
    for name, ceiling in ceilings.items():
        kind, peak = name.split("_")[1].upper(), row[name]
        if ceiling is not None and peak is None:
            failures.append(f"its peak of {kind} is unknown")
        elif ceiling is not None and peak > ceiling:
            over = f"{peak - ceiling} bytes over the {format_bytes(ceiling)} it may"
            failures.append(f"held {format_bytes(peak)} of {kind}, {over}")
    if gpu and row["samples_hz"] < LEAST_HZ:
        failures.append(f"was looked at only {row['samples_hz']} times a second")
    if row["latents_sha256"] != first["latents_sha256"]:
        failures.append(f"latents differ from those within {shown(first['budget_bytes'])}")


def _names(gpu: bool) -> tuple[str, str]:
    """What the budget is of: the figures of its peak and its plan."""
    kind = "vram" if gpu else "ram"
    return f"peak_{kind}_bytes", f"planned_{kind}_bytes"


def shown(budget: int | None) -> str:
    """A budget for people."""
    return "none" if budget is None else format_bytes(budget)


def ceiling_line(subject: Subject) -> str:
    """What a step must cost."""
    found = subject.document()
    text = f"{subject.path}: {found['n_blocks']} blocks of {format_bytes(max(subject.blocks))}; "
    text += f"ceiling: products {format_seconds(found['compute_s'])} a step "
    text += f"at {found['flop_s'] / 1e12:.4g} TFLOP/s"
    if found["link_bytes_s"]:
        text += f", copies of all blocks {format_seconds(found['copy_all_s'])} "
        text += f"at {found['link_bytes_s'] / GIB:.1f} GiB/s"
    return text


def encoder_text(row: Mapping[str, Any]) -> str:
    """How long it took."""
    return f"text encoder {format_seconds(row['text_encoder_s'])}"


def line(row: Mapping[str, Any], *, gpu: bool) -> str:
    """A row for people."""
    text = f"  within {shown(row['budget_bytes'])}: "
    if "step_s" in row:
        text += f"{format_seconds(row['step_s'])} a step"
        text += f" ({row['ratio']:.3f} of resident)" if row.get("ratio") else ""
        text += f"; {row['streamed_blocks']} blocks streamed, {format_bytes(row['step_bytes'])}"
        text += f" a step, {row.get('moved_gib_s', 0.0):.1f} GiB/s"
        text += "" if row.get("overlap") is None else f", overlap {row['overlap']:.2f}"
        text += f"; {encoder_text(row)}, "
        text += f"VAE {format_seconds(row['vae_s'])}, total {format_seconds(row['total_s'])}"
        peak, planned = (row[name] for name in _names(gpu))
        text += f"; {'VRAM' if gpu else 'RAM'} {format_bytes(peak or 0)}"
        text += f", planned {format_bytes(planned)}" if planned else ""
        if gpu:
            text += f"; allocations after step 1: {row['allocations_after_step_1']}"
        text += f"; latents {row['latents_sha256'][:12]}"
    for goal in row.get("goals", ()):
        verdict = "meets" if goal["met"] else "MISSES"
        text += f"; {goal['of']} {goal['value']} {verdict} {goal['at_most']}"
    return "; ".join([text, *(f"FAILED: {failure}" for failure in row["failures"])])


def measure(path: str, args: argparse.Namespace, gpu: Gpu | None) -> Iterator[dict[str, Any]]:
    """One model and its rows so far, after every row; each is told."""
    subject, is_gpu = subject_of(path, args, gpu), gpu is not None
    say(ceiling_line(subject))
    before = measured(subject, args, gpu, None, steps=1)
    say(f"  to warm up, one step: {' '.join(before['failures']) or encoder_text(before)}")
    rows: list[dict[str, Any]] = []
    found = {"model": path, "ceilings": subject.document(), "before": before, "rows": rows}
    for budget in args.budgets:
        row = measured(subject, args, gpu, budget, steps=args.steps)
        rows.append(row)
        resident = rows[0] if rows[0]["budget_bytes"] is None else {}
        if "step_s" in row:
            compare(row, resident, subject, gpu=is_gpu)
            first = next(each for each in rows if "latents_sha256" in each)
            judge(row, first, gpu=is_gpu, max_ram=args.max_ram)
        say(line(row, gpu=is_gpu))
        yield found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every model, print as it comes, end with the document."""
    args = _arguments(argv)
    gpu = Gpu(torch.device(args.device)) if args.device.startswith("cuda") else None
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "machine": machine(),
        "command": shlex.join(
            ["benchmarks/streaming.py", *(sys.argv[1:] if argv is None else argv)]
        ),
        "device": args.device,
        "compute": args.compute,
        "warm": WARM,
        "budgets_are": "of VRAM" if gpu else "of RAM",
        "ballast": args.ballast,
        "max_ram": args.max_ram,
        "width": args.width,
        "height": args.height,
        "steps": args.steps,
        "models": [],
    }
    say(json.dumps(report["machine"], indent=1), f"warm: {WARM}")
    done: list[dict[str, Any]] = []
    for path in args.models:
        for found in measure(path, args, gpu):
            report["models"] = [*done, found]
            report["failures"] = failures_of(report["models"])
            if args.out:
                write_document(args.out, report)
        done = report["models"]
    print(json.dumps(report), flush=True)
    return int(bool(report["failures"]))


def failures_of(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of all rows, with the model and the budget."""
    return [
        f"{found['model']} within {shown(row['budget_bytes'])}: {failure}"
        for found in models
        for row in found["rows"]
        for failure in row["failures"]
    ]


def machine() -> dict[str, Any]:
    """What this runs on."""
    return zquant.memory.doctor.describe_machine() | describe_machine()


def say(*lines: str) -> None:
    """To people."""
    print(*lines, sep="\n", file=sys.stderr, flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="converted folder, or demo")
    parser.add_argument("--budgets", nargs="+", default=BUDGETS, metavar="SIZE", help="or none")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compute-dtype", default="auto", help="found once, then the same for all")
    parser.add_argument("--compute", choices=COMPUTES, default=AUTO, help="likewise")
    parser.add_argument("--max-ram", metavar="SIZE", help="beside a GPU: of every run")
    parser.add_argument("--ballast", action="store_true", help="leave no more VRAM than the budget")
    parser.add_argument("--out", type=new_file, help="write the document here as well")
    args = parser.parse_args(argv)
    try:
        sizes = {text: None if text == "none" else parse_bytes(text) for text in args.budgets}
        args.max_ram = parse_bytes(args.max_ram) if args.max_ram else None
    except ValueError as error:
        parser.error(str(error))
    if args.device.partition(":")[0] not in ("cpu", "cuda"):
        parser.error(f"--device {args.device!r} is neither cpu nor cuda nor cuda:1")
    if args.device == "cpu" and (args.ballast or args.max_ram):
        parser.error("--ballast and --max-ram are for a GPU; on a CPU the budgets are of RAM")
    # what others are compared with comes first
    args.budgets = sorted(sizes.values(), key=lambda size: (size is not None, size or 0))
    return args


if __name__ == "__main__":
    sys.exit(main())
