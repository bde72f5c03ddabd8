"""`zquant verify PATH`: whether a model is whole, undamaged, and what its source made it."""

import argparse
import json
import sys
from contextlib import closing
from dataclasses import asdict
from typing import Any

from zquant.cli.progress import PhaseBar

__all__ = ["add_arguments", "run"]

MAX_LINES = 20
MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        help="a model folder, a GGUF or safetensors file of any program; demo: the small model "
        "inside zquant",
    )
    parser.add_argument(
        "--source",
        metavar="SOURCE",
        help="the original, as convert takes it: every weight's error is measured again, and a "
        "sample quantized again",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    from zquant.formats.model_folder import demo_notice
    from zquant.verify.check import verify

    if notice := demo_notice(args.path):
        print(f"note: {notice}", file=sys.stderr)
    with closing(PhaseBar("MiB")) as bar:
        verdict = verify(
            args.path, args.source, lambda name, done, n: bar(name, done // MIB, n // MIB)
        )
    if args.json:
        print(json.dumps({"ok": verdict.ok, **asdict(verdict)}, indent=2))
    else:
        print("\n".join(_lines(verdict)))
    return 0 if verdict.ok else 1


def _lines(verdict: Any) -> list[str]:
    """The verdict in one line, after it findings or what was not checked."""
    from zquant.units import format_bytes

    found = verdict.findings
    if found:
        lines = [f"FAILED: {verdict.path}: {_counted(len(found), 'finding')}", *found[:MAX_LINES]]
        if len(found) > MAX_LINES:
            lines.append(f"and {len(found) - MAX_LINES} more; --json has all")
        return lines
    files = verdict.files.values()
    size = format_bytes(sum(file["bytes"] for file in files))
    n_tensors = sum(file["tensors"] for file in files)
    compared = "as its source makes it" if verdict.compared else "not compared with a source"
    return [
        f"OK: {verdict.path}: {_counted(len(files), 'file')}, {_counted(n_tensors, 'tensor')}, "
        f"{size}, whole and sound; {compared}",
        *(f"note: {text}" for text in verdict.notes),
    ]


def _counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
