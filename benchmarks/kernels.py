"""Every kernel against its reference, then against its ceiling, at the shapes of Z-Image.

    python benchmarks/kernels.py [--device auto|cpu|cuda] [--tiny] [--check] [--only NAME...]

Before it is timed a kernel's result is compared with that of its reference on a small shape, on the
same device; one that differs is wrong and is not timed, and the exit code is 1. `--check` ends
there. Ceilings are measured first: a copy of 1 GiB on the device, read plus written, and products
in bfloat16 (cuBLAS) and int8 (`torch._int_mm`). What is called is in `kernel_cases.py`.

Times are medians between CUDA events after a warm-up. Before the first event a buffer larger than
the L2 cache is read, for as long as Python needs to launch what is timed. What memory bounds is
called again and again on buffers that together exceed the cache, 1 GiB in all, or its results would
be in memory only after the clock has stopped. The last line is one JSON document.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from kernel_cases import BOUND_BY_MEMORY, COPY, GROUPS, UNITS, Case, Shapes, plainly, small
from machine import describe_machine, new_file, write_document
from torch import Tensor
from zquant_kernels import runtime

import zquant.memory.doctor

SCHEMA = "zquant-kernels-1"
CPU_NOTE = "references on a CPU; rates mean nothing"
TIMING = "CUDA events; L2 flushed first; what memory bounds goes round buffers larger than L2"
FLUSH_BYTES = 2**28  # twice the largest L2 cache there is
WINDOW_BYTES = 2**30  # moved between two events, where memory is the bound
LEAST_BYTES = 12e6  # moved by the smallest of these calls: quantizing 1056 tokens
SET_BYTES = 2e9  # of one set of buffers, at most
NAMES = [name for names in GROUPS for name in names]


class Clock:
    """Times calls: of a GPU its own time between events, of a CPU the time of the call.

    `n_sets` is how many sets of buffers exceed the L2 cache three times, as far as they fit.
    Results are kept until the end, so that each is written to memory of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.n_sets = 1
        if self.cuda:
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            fit = int(torch.cuda.mem_get_info(device)[0] / SET_BYTES)
            self.n_sets = max(1, min(16, fit, math.ceil(3 * l2_bytes / LEAST_BYTES)))
            self.buffer = torch.zeros(FLUSH_BYTES // 4, device=device)
            self.flush_s = 1e-4
            self.flush_s = self([self.buffer.sum])["median_us"] / 1e6

    def __call__(self, calls: Sequence[Callable[[], Any]]) -> dict[str, float]:
        """Per call: median, least and most of the repeats, and what Python needs to launch it."""
        for _ in range(2 if self.cuda else 0):
            self._launch(calls)
        launch_s, once_s = self._launch(calls)
        repeats = max(5, min(50, int(0.5 / once_s))) if self.cuda else 2
        marks = [self._run(calls, launch_s) for _ in range(repeats)]
        self._wait()
        times = [a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in marks]
        per_call_us = [1e6 * t / len(calls) for t in times]
        return {
            "median_us": rounded(statistics.median(per_call_us)),
            "min_us": rounded(min(per_call_us)),
            "max_us": rounded(max(per_call_us)),
            "repeats": repeats,
            "launch_us": rounded(1e6 * launch_s / len(calls)),
        }

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _launch(self, calls: Sequence[Callable[[], Any]]) -> tuple[float, float]:
        """Seconds until all are launched, and until all are done."""
        self._wait()
        start = time.perf_counter()
        _ = [call() for call in calls]
        launched = time.perf_counter()
        self._wait()
        return launched - start, time.perf_counter() - start

    def _run(self, calls: Sequence[Callable[[], Any]], launch_s: float) -> tuple[Any, Any]:
        """Marks before and after."""
        if not self.cuda:
            start, _ = time.perf_counter(), [call() for call in calls]
            return start, time.perf_counter()
        for _ in range(min(200, 1 + int(2 * launch_s / self.flush_s))):
            self.buffer.sum()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        _ = [call() for call in calls]
        last.record()
        return first, last


def rounded(x: float) -> float:
    """To four digits: more would be noise."""
    return float(f"{x:.4g}")


def ceilings(s: Shapes, clock: Clock) -> dict[str, Any]:
    """What this device reaches without us."""
    source = s.random(s.copy_bytes // 4, dtype=torch.float32)
    target = torch.empty_like(source)
    copy = clock([partial(target.copy_, source)])
    rows = []
    for m, k, n in s.products():
        x, w = s.random(m, k, dtype=torch.int8), s.random(n, k, dtype=torch.int8)
        row: dict[str, Any] = {"shape": f"{m}x{k}x{n}"}
        for name, work in (
            ("bf16_tflop_s", partial(torch.mm, x.to(s.dtype), w.to(s.dtype).t())),
            ("int8_top_s", partial(torch._int_mm, x, w.t())),
        ):
            row[name] = rounded(2e-6 * m * k * n / clock([work])["median_us"])
        rows.append(row)
    copy_gib_s = rounded(2e6 * s.copy_bytes / copy["median_us"] / 2**30)
    return {"copy_gib_s": copy_gib_s, "copy_bytes": s.copy_bytes, "products": rows}


def difference(case: Case) -> float:
    """Relative error against the reference; infinite where shapes, dtypes or finiteness differ."""
    case.reset()
    found = [t.clone() for t in tensors(case.work())]
    case.reset()
    wanted = tensors(case.reference() if case.reference else plainly(case.work))
    if not wanted or [(t.shape, t.dtype) for t in found] != [(t.shape, t.dtype) for t in wanted]:
        return math.inf
    pairs = [(a.double(), b.double()) for a, b in zip(found, wanted, strict=True)]
    errors = [float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs]
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def tensors(result: Any) -> list[Tensor]:
    """All in a result."""
    parts = result if isinstance(result, tuple | list) else (result,)
    return [part for part in parts if isinstance(part, Tensor)]


def timed(
    sets: Sequence[Case], clock: Clock, copy_gib_s: float, *, compare: bool
) -> dict[str, Any]:
    """A row of the report; `sets` are the same call on buffers of their own."""
    case, rounds = sets[0], 1
    if case.unit == "GiB/s" and clock.cuda:
        rounds = math.ceil(WINDOW_BYTES / case.amount / len(sets))
    figures = clock([one.work for one in sets] * rounds)
    rate = case.amount / UNITS[case.unit] / figures["median_us"] * 1e6
    ratios = {COPY: rounded(rate / copy_gib_s)} if case.unit == "GiB/s" else {}
    for name in case.rivals:
        rival = clock([one.rivals[name] for one in sets] * rounds)
        ratios[name] = rounded(rival["median_us"] / figures["median_us"])
    row = {"kernel": case.kernel, "label": case.label, "amount": case.amount, "unit": case.unit}
    row |= {"rate": rounded(rate), **figures, "ratios": ratios}
    if case.goal and compare:
        of, least = case.goal
        row["goal"] = {"of": of, "at_least": least, "met": ratios[of] >= least}
    return row


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    text = f"{row['kernel']:16} {row['label']:34} {row['median_us']:9.1f} us"
    text += f" ({row['min_us']:.1f} to {row['max_us']:.1f}) {row['rate']:8.4g} {row['unit']}"
    text += "".join(f", {ratio:.2f} of {name}" for name, ratio in row["ratios"].items())
    if goal := row.get("goal"):
        text += f": {'meets' if goal['met'] else 'MISSES'} {goal['at_least']:.2f}"
    return text


def machine(device: torch.device) -> dict[str, Any]:
    """What this runs on."""
    found = zquant.memory.doctor.describe_machine() | describe_machine()
    if device.type == "cuda":
        found["l2_bytes"] = torch.cuda.get_device_properties(device).L2_cache_size
    return found


def differing(cases: Iterator[Case], asked: set[str]) -> list[dict[str, Any]]:
    """The kernels whose result is not that of the reference."""
    wrong = []
    for case in cases:
        if case.kernel in asked and not (error := difference(case)) <= case.limit:
            shown = rounded(error) if math.isfinite(error) else "another shape or dtype, or NaN"
            wrong.append({"kernel": case.kernel, "label": case.label, "error": shown})
            say(f"{case.kernel} {case.label}: wrong, {shown}; the limit is {case.limit}")
    return wrong


@torch.inference_mode()
def main() -> int:
    """Compare, measure, print as it comes, end with the document."""
    args = _arguments()
    device = torch.device(args.device)
    cuda, full = device.type == "cuda", shapes(device)
    report: dict[str, Any] = {"schema": SCHEMA, "machine": machine(device), "device": str(device)}
    report |= {"timing": TIMING if cuda else CPU_NOTE, "tiny": args.tiny, "wrong": [], "rows": []}
    say(json.dumps(report["machine"], indent=1), report["timing"])
    measured = small(full) if args.tiny else full
    if not args.check:
        clock = Clock(device)
        report["ceilings"] = ceilings(measured, clock)
        say(json.dumps(report["ceilings"], indent=1))
    faults = []
    for names, cases in GROUPS.items():
        asked = set(names) & set(args.only)
        try:
            wrong = differing(cases(small(full)), asked) if asked else []
            report["wrong"] += wrong
            asked -= {row["kernel"] for row in wrong}
            if not asked or args.check:
                continue
            n_sets = clock.n_sets if cases in BOUND_BY_MEMORY else 1
            for sets in zip(*(cases(measured) for _ in range(n_sets)), strict=True):
                if sets[0].kernel in asked:
                    copy_gib_s = report["ceilings"]["copy_gib_s"]
                    row = timed(sets, clock, copy_gib_s, compare=cuda and not args.tiny)
                    report["rows"].append(row)
                    say(line(row))
        except Exception as fault:  # raised again when the other groups have had their turn
            faults.append(fault)
            report["wrong"].append({"kernel": ", ".join(sorted(asked)), "error": repr(fault)})
    if args.out:
        write_document(args.out, report)
    print(json.dumps(report), flush=True)
    if faults:
        raise faults[0]
    return int(bool(report["wrong"]))


def shapes(device: torch.device) -> Shapes:
    """Those of the model.

    Raises:
        SystemExit: it is a GPU on which no kernel can run.
    """
    if device.type == "cuda" and (reason := runtime.why_not(device)):
        raise SystemExit(f"no kernel can run on {torch.cuda.get_device_name(device)}: {reason}")
    # the interpreter has no bfloat16 arithmetic, and most CPUs only a slow one
    on_cpu = torch.float16 if runtime.INTERPRETED else torch.float32
    return Shapes(device=device, dtype=torch.bfloat16 if device.type == "cuda" else on_cpu)


def say(*lines: str) -> None:
    """To people."""
    print(*filter(None, lines), sep="\n", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to test this script")
    parser.add_argument("--check", action="store_true", help="time nothing; leaves out the block")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--out", type=new_file, help="write the document here as well")
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cpu" and not (args.tiny or args.check):
        parser.error("there is no GPU to measure; --tiny runs the references on the CPU")
    # a block launches what the others launch
    args.only = args.only or [name for name in NAMES if not (args.check and name == "block")]
    return args


if __name__ == "__main__":
    sys.exit(main())
