"""Every check and measurement that needs a GPU, in stages that can be taken up again.

    tools/gpu_session [STAGE...] --out DIR [--work DIR] [--total-s N] [--again] [--rehearse]
    tools/gpu_session --list

Without names every stage runs, those that find most first, each with a limit of 540 s, and leaves
`DIR/<stage>.json`: status (done, failed or skipped) with the reason, seconds, the commands and
their result. What commands print goes to `DIR/session.log`. A stage that is done is not run again.
After `--total-s` seconds the whole session ends: no stage goes past them, and one that would begin
with less than 20 s left is skipped, for the next call. Where `environment` fails, nothing after it
is run. Exit code 1: one failed; 2: there is no GPU. `--rehearse` runs everything small and on the
CPU, to test this script.

Stages about whole models keep them in a work folder, 40 GB while they are made; each needs those
before it. Peers that are not installed are skipped with the reason, and fail their stage where none
painted: PYTHONPATH may name their wheels (diffusers, gguf). A stage is a function that runs
commands and returns its result, listed in `STAGES`.
"""

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_model_stages as models
import gpu_stages as stages
from gpu_run import ROOT, Failed, Run, Skipped, say

SCHEMA = "zquant-gpu-session-1"
LIMIT_S = 540.0
LEAST_S = 20.0  # with less a stage is not begun
WORK = ROOT / "build" / "gpu_session"

STAGES: dict[str, Callable[[Run], Any]] = {
    "environment": stages.environment,
    "tests": stages.tests,
    "kernels": stages.kernels,
    "checkpoint": models.checkpoint,
    "convert-q8_0": models.convert_q8_0,
    "convert-q4_k_m": models.convert_q4_k_m,
    "streaming-q8_0": models.streaming_q8_0,
    "streaming-q4_k_m": models.streaming_q4_k_m,
    "streaming-q4_k_m-int8": models.streaming_q4_k_m_int8,
    "ballast": models.ballast,
    "peers-1024": models.peers_1024,
    "peers-512": models.peers_512,
    "memcheck": stages.memcheck,
    "racecheck": stages.racecheck,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for and not done."""
    start = time.monotonic()
    args = _arguments(argv)
    if args.list:
        width = max(map(len, STAGES)) + 2
        for name, stage in STAGES.items():
            print(f"{name:{width}}{(stage.__doc__ or '').splitlines()[0]}")
        return 0
    if not args.rehearse and (missing := no_gpu()):
        say(f"{missing}. --rehearse tests this script without one.")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    names = list(args.stages or STAGES)
    faults: list[Exception] = []
    statuses: list[str] = []
    for name in names:
        statuses.append(run_stage(name, args, start + args.total_s, faults))
        if (name, statuses[-1]) == ("environment", "failed"):
            if left := names[len(statuses) :]:
                say(f"not run, as environment failed: {', '.join(left)}")
            break
    if faults:
        raise faults[0]
    return int("failed" in statuses)


def no_gpu() -> str:
    """Why no GPU can be used; empty when one can."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    return "" if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"


def run_stage(name: str, args: argparse.Namespace, deadline: float, faults: list[Exception]) -> str:
    """Run a stage, write its document, return its status; a fault of its own goes to `faults`.

    `deadline` is the whole session's, on the clock of `time.monotonic`.
    """
    path = args.out / f"{name}.json"
    if not args.again and is_done(path, rehearsed=args.rehearse):
        say(f"{name}: is done ({path}); --again runs it again")
        return "done"
    start = time.monotonic()
    run = Run(
        rehearse=args.rehearse,
        log=args.out / "session.log",
        work=(args.work or (args.out / "work" if args.rehearse else WORK)).absolute(),
        end=min(start + LIMIT_S, deadline),
    )
    late = deadline - start < LEAST_S
    no_time = ("skipped", "no time is left", None)
    status, reason, result = no_time if late else _outcome(STAGES[name], run, faults)
    seconds = round(time.monotonic() - start, 1)
    document = {
        "schema": SCHEMA,
        "stage": name,
        "status": status,
        "reason": reason,
        "rehearsed": args.rehearse,
        "seconds": seconds,
        "command": run.commands,
        "result": result,
    }
    if not (late and path.is_file()):  # what an earlier call found says more
        write(path, document)
    say(f"{name}: {status} in {seconds} s" + (f": {reason}" if reason else ""))
    return status


def _outcome(
    stage: Callable[[Run], Any], run: Run, faults: list[Exception]
) -> tuple[str, str, Any]:
    """Status, reason and result."""
    try:
        return "done", "", stage(run)
    except Skipped as skip:
        return "skipped", str(skip), None
    except Failed as failure:
        return "failed", str(failure), failure.result
    except Exception as fault:  # raised again when the other stages have had their turn
        faults.append(fault)
        trace = {"traceback": traceback.format_exc().splitlines()}
        return "failed", f"{type(fault).__name__}: {fault}", trace


def is_done(path: Path, *, rehearsed: bool) -> bool:
    """Whether a stage's document says that it was done, of the same kind."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return bool(document["status"] == "done") and document["rehearsed"] == rehearsed


def write(path: Path, document: Mapping[str, Any]) -> None:
    """The whole file or none of it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
    part.replace(path)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], prog="tools/gpu_session"
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the documents")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for models, 40 GB")
    parser.add_argument(
        "--total-s", type=float, default=math.inf, metavar="N", help="seconds for all stages"
    )
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU")
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument("--list", action="store_true", help="name the stages and end")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.stages if name not in STAGES]:
        parser.error(f"stage {unknown[0]!r} is unknown; known: {', '.join(STAGES)}")
    if args.out is None and not args.list:
        parser.error("--out DIR is needed")
    return args


if __name__ == "__main__":
    sys.exit(main())
