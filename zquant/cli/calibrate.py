"""`zquant calibrate --model DIR --prompts FILE --out FILE`: what enters every linear of a model."""

import argparse
import json
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from zquant.cli.run_batch import batch_requests
from zquant.cli.run_request import (
    add_memory_arguments,
    add_model_arguments,
    add_picture_arguments,
    limits_of,
)

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser.add_argument_group("model"))
    pictures = parser.add_argument_group("pictures (defaults: the model's own)")
    pictures.add_argument(
        "--prompts",
        dest="prompt_file",
        required=True,
        metavar="FILE",
        help="a prompt per line, or JSON with settings of its own, as for zquant run --prompt-file",
    )
    pictures.add_argument("--limit", type=int, metavar="N", help="only the first N pictures")
    add_picture_arguments(pictures)
    pictures.add_argument("--seed", type=int, help="of the first picture; default: 0")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    add_memory_arguments(machine)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="importance file to write, .gguf"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    if not args.out.parent.is_dir():
        raise FileNotFoundError(f"folder '{args.out.parent}' does not exist; create it first")
    requests = [request for _, request in batch_requests(args)][: _limit(args)]

    from zquant.calibrate import Calibration, calibrate, exact_device
    from zquant.cli.progress import PhaseBar
    from zquant.formats.imatrix import write_imatrix
    from zquant.models.checkpoint import model_files

    given = {"dit": args.dit, "text_encoder": args.text_encoder, "vae": args.vae}
    device, start = exact_device(args.device), time.perf_counter()
    print(device.summary, file=sys.stderr)
    calibration = Calibration(
        files=model_files(args.model, {k: v for k, v in given.items() if v}, args.variant),
        requests=requests,
        dataset=Path(args.prompt_file).name,
        device=device,
        limits=limits_of(args),
    )
    with closing(PhaseBar()) as bar:
        imatrix = calibrate(calibration, bar, bar.note)
    write_imatrix(args.out, imatrix)
    _report(args, imatrix, device.name, time.perf_counter() - start)
    return 0


def _limit(args: argparse.Namespace) -> int | None:
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit is {args.limit}; it must be at least 1")
    return None if args.limit is None else int(args.limit)


def _report(args: argparse.Namespace, imatrix: Any, device: str, seconds: float) -> None:
    from zquant.units import format_seconds

    if args.json:
        document = {
            "imatrix": str(args.out),
            "matrices": len(imatrix.entries),
            "pictures": imatrix.n_chunks,
            "tokens_per_picture": imatrix.chunk_size,
            "dataset": imatrix.datasets[0],
            "device": device,
            "seconds": seconds,
        }
        print(json.dumps(document))
        return
    print(args.out)
    print(
        f"importance of {len(imatrix.entries)} matrices from {imatrix.n_chunks} pictures in "
        f"{format_seconds(seconds)}; next: zquant convert SOURCE OUT --imatrix {args.out}",
        file=sys.stderr,
    )
