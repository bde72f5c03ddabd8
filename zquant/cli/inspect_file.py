"""`zquant inspect PATH`: what is in a model folder, a weights file or a picture."""

import argparse
import json
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        help="a PNG made by zquant, a GGUF or safetensors file, a model folder; demo: the small "
        "model inside zquant",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    from zquant.formats.model_folder import demo_notice
    from zquant.report import as_text, describe

    if notice := demo_notice(args.path):
        print(f"note: {notice}", file=sys.stderr)
    document = describe(args.path)
    print(json.dumps(document, indent=2) if args.json else as_text(document))
    return 0
