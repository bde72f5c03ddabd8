"""`zquant doctor`: what this machine has, which path every kernel family takes, and why."""

import argparse
import json

from zquant.cli.run_request import add_machine_arguments

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_machine_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    from zquant.memory.device import probe
    from zquant.memory.doctor import diagnose, diagnosis_text

    device = probe(
        args.device,
        args.compute_dtype or "auto",
        compute=args.compute or "auto",
        kernels=args.kernels,
        attention=args.attention or "sdpa",
    )
    document = diagnose(device)
    print(json.dumps(document, indent=2) if args.json else diagnosis_text(document))
    return 0
