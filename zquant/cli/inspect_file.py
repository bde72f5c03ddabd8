"""`zquant inspect PATH`: what is in a model folder, a weights file or a picture."""

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        type=Path,
        help="a PNG made by zquant, a GGUF or safetensors file, or a model folder",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    from zquant.report import as_text, describe

    document = describe(args.path)
    print(json.dumps(document, indent=2) if args.json else as_text(document))
    return 0
