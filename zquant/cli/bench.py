"""`zquant bench MODEL`: speed and memory against the ceiling; `zquant bench cost`: prices."""

import argparse
import json
import shlex
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from zquant.cli.run_request import (
    add_machine_arguments,
    add_memory_arguments,
    limits_of,
    machine_of,
)

__all__ = ["add_arguments", "run"]

COST = "cost"  # the word in the place of a model; ./cost is a folder of that name
MEASURE = (
    *("sizes", "steps", "repeat", "device", "compute_dtype", "compute", "kernels"),
    *("attention", "budget", "max_ram"),
)
NEEDED = {  # of `cost`: flag -> what it is
    "hardware_price": "of the machine",
    "watts": "the machine draws while it is powered",
    "price_per_kwh": "of electricity",
    "images_per_day": "wanted, every day",
    "api_price": "of one image of a service",
}
OPTIONAL = {
    "years": "the machine is used; default: 3",
    "hours_per_day": "the machine is powered; default: as long as the images take",
    "exchange_rate": "units of --currency for one of --api-currency",
}
CURRENCIES = {
    "currency": "of local prices; default: USD",
    "api_currency": "of --api-price; default: --currency",
}
AUTO = "auto"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a model folder; demo: the small model inside zquant; "
        "cost: no measurement, but what a picture costs",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the document here as well")
    parser.add_argument("--json", action="store_true", help="print nothing but the document")
    picture = parser.add_argument_group("pictures")
    picture.add_argument(
        "--sizes", nargs="+", metavar="SIZE", help="default: 512 768 1024 1280x720 1536"
    )
    picture.add_argument("--steps", type=int, help="default: the model's own")
    picture.add_argument("--repeat", type=int, help="warm pictures of each size; default: 3")
    machine = parser.add_argument_group("machine")
    add_machine_arguments(machine)
    add_memory_arguments(machine)
    cost = parser.add_argument_group("zquant bench cost")
    cost.add_argument("--result", type=Path, metavar="FILE", help="a document of zquant bench")
    cost.add_argument("--seconds-per-image", type=float, metavar="S", help="in its place")
    for name, text in (NEEDED | OPTIONAL).items():
        cost.add_argument(_flag(name), type=float, metavar="X", help=text)
    for name, text in CURRENCIES.items():
        cost.add_argument(_flag(name), metavar="NAME", help=text)


def run(args: argparse.Namespace) -> int:
    is_cost = args.model == COST
    others = MEASURE if is_cost else ("result", "seconds_per_image", *NEEDED, *OPTIONAL)
    others = others if is_cost else (*others, *CURRENCIES)
    if wrong := [name for name in others if getattr(args, name) not in (None, AUTO)]:
        right = "a model is measured" if is_cost else "zquant bench cost"
        raise ValueError(f"{_flag(wrong[0])} has a meaning only where {right}; leave it out")
    if args.out is not None and not args.out.parent.is_dir():
        raise FileNotFoundError(f"folder '{args.out.parent}' does not exist; create it first")
    return _cost(args) if is_cost else _bench(args)


def _bench(args: argparse.Namespace) -> int:
    from zquant.bench.measure import Bench, bench
    from zquant.bench.table import bench_text
    from zquant.cli.progress import PhaseBar
    from zquant.request import parse_size

    given = {name: getattr(args, name) for name in ("steps", "repeat")}
    if args.sizes is not None:
        given["sizes"] = [parse_size(text) for text in args.sizes]
    limits = limits_of(args)
    what = Bench(
        model=args.model,
        machine=machine_of(args, {}),
        budget_bytes=limits.budget_bytes,
        ram_bytes=limits.ram_bytes,
        **{name: value for name, value in given.items() if value is not None},
    )
    with closing(PhaseBar()) as bar:
        document = bench(what, _command(args), bar.note, bar)
    _print(args, document, bench_text)
    return int(any(row["failure"] is not None for row in document["sizes"]))


def _cost(args: argparse.Namespace) -> int:
    from zquant.bench.cost import Terms, cost_document, cost_text

    missing = [_flag(name) for name in NEEDED if getattr(args, name) is None]
    if missing:
        raise ValueError(f"zquant bench cost needs {', '.join(missing)}")
    names = (*NEEDED, *OPTIONAL, *CURRENCIES)
    given = {name: getattr(args, name) for name in names}
    terms = Terms(**{name: value for name, value in given.items() if value is not None})
    _print(args, cost_document(_seconds(args), terms), cost_text)
    return 0


def _seconds(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of an image by size, from the flag or a document."""
    from zquant.bench.cost import seconds_in
    from zquant.bench.schema import check
    from zquant.errors import FormatError
    from zquant.formats.model_folder import read_json

    if (args.result is None) == (args.seconds_per_image is None):
        raise ValueError("zquant bench cost needs either --result or --seconds-per-image")
    if args.result is None:
        return {"": args.seconds_per_image}
    document = read_json(args.result)
    check(document, str(args.result))
    seconds = seconds_in(document)
    if not seconds:
        raise FormatError(f"{args.result}: every size failed. Measure with smaller --sizes.")
    return seconds


def _print(args: argparse.Namespace, document: dict[str, Any], text_of: Any) -> None:
    """The text for people, and the document in the last line; in the file it has many."""
    from zquant.formats.part_file import part_file

    if not args.json:
        print(text_of(document), end="\n\n")
    print(json.dumps(document), flush=True)  # first: the disk may be full
    if args.out is not None:
        with part_file(args.out) as file:
            file.write(json.dumps(document, indent=1).encode() + b"\n")
        print(f"written: {args.out}", file=sys.stderr)


def _command(args: argparse.Namespace) -> str:
    """What asks for the same measurement again."""
    words = ["zquant", "bench", args.model]
    for name in MEASURE:
        value = getattr(args, name)
        if value not in (None, AUTO):
            words += [_flag(name), *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
