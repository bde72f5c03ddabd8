"""Every check and measurement that needs a GPU, in stages that can be taken up again.

    tools/gpu_session [STAGE...] --out DIR [--work DIR] [--rehearse] [--again] [--list]

Without names every stage runs, each with a limit of 540 s, and leaves `DIR/<stage>.json`: status
(done, failed or skipped) with the reason, seconds, the commands and their result. What commands
print goes to `DIR/session.log`. A stage that is done is not run again. Exit code 1: one failed;
2: there is no GPU. `--rehearse` runs everything small and on the CPU, to test this script.

Stages about whole models keep them in a work folder, 40 GB while they are made; each needs those
before it. Peers that are not installed are skipped with the reason: PYTHONPATH may name their
wheels (diffusers, gguf). A stage is a function that runs commands and returns its result, listed in
`STAGES`.
"""

import argparse
import json
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
WORK = ROOT / "build" / "gpu_session"

STAGES: dict[str, Callable[[Run], Any]] = {
    "environment": stages.environment,
    "tests": stages.tests,
    "sanitizer": stages.sanitizer,
    "kernels": stages.kernels,
    "checkpoint": models.checkpoint,
    "convert-q8_0": models.convert_q8_0,
    "convert-q4_k_m": models.convert_q4_k_m,
    "streaming-q8_0": models.streaming_q8_0,
    "streaming-q4_k_m": models.streaming_q4_k_m,
    "ballast": models.ballast,
    "peers": models.peers,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for and not done."""
    args = _arguments(argv)
    if args.list:
        for name, stage in STAGES.items():
            print(f"{name:18}{(stage.__doc__ or '').splitlines()[0]}")
        return 0
    if not args.rehearse and (missing := no_gpu()):
        say(f"{missing}. --rehearse tests this script without one.")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    names = args.stages or STAGES
    faults: list[Exception] = []
    statuses = [run_stage(name, args, faults) for name in names]
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


def run_stage(name: str, args: argparse.Namespace, faults: list[Exception]) -> str:
    """Run a stage, write its document, return its status; a fault of its own goes to `faults`."""
    path = args.out / f"{name}.json"
    if not args.again and is_done(path, rehearsed=args.rehearse):
        say(f"{name}: is done ({path}); --again runs it again")
        return "done"
    start = time.monotonic()
    run = Run(
        rehearse=args.rehearse,
        log=args.out / "session.log",
        work=(args.work or (args.out / "work" if args.rehearse else WORK)).absolute(),
        end=start + LIMIT_S,
    )
    status, reason, result = "done", "", None
    try:
        result = STAGES[name](run)
    except Skipped as skip:
        status, reason = "skipped", str(skip)
    except Failed as failure:
        status, reason, result = "failed", str(failure), failure.result
    except Exception as fault:  # raised again when the other stages have had their turn
        faults.append(fault)
        status, reason = "failed", f"{type(fault).__name__}: {fault}"
        result = {"traceback": traceback.format_exc().splitlines()}
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
    write(path, document)
    say(f"{name}: {status} in {seconds} s" + (f": {reason}" if reason else ""))
    return status


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
