"""`zquant run PROMPT --model DIR`: a prompt becomes a PNG."""

import argparse
import json
import secrets
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from zquant.cli.run_batch import run_batch
from zquant.cli.run_request import (
    add_machine_arguments,
    add_memory_arguments,
    add_model_arguments,
    add_picture_arguments,
    differences,
    open_engine,
    request_of,
)

__all__ = ["add_arguments", "run"]

OUT = Path("zquant.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="what to paint")
    many = parser.add_argument_group("many prompts")
    many.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="a prompt per line, or JSON with settings of its own; - reads them; --out is a folder",
    )
    many.add_argument("--resume", action="store_true", help="go on with what was interrupted")
    add_model_arguments(parser.add_argument_group("model"))
    picture = parser.add_argument_group("picture (defaults: the model's own)")
    picture.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"PNG to write, replaced if it exists; default: {OUT}",
    )
    add_picture_arguments(picture)
    picture.add_argument(
        "--seed", type=int, help="0 or more, below 2**63; default: drawn, and shown at the end"
    )
    picture.add_argument("--negative-prompt", help="what to avoid, when guidance is on")
    picture.add_argument("--cfg-normalization", type=float, help="limit of the guided norm; 0: off")
    picture.add_argument("--cfg-truncation", type=float, help="no guidance where 1 - sigma exceeds")
    picture.add_argument("--shift", type=float, help="of the sigma schedule")
    picture.add_argument("--from-png", type=Path, metavar="FILE", help="repeat a zquant picture")
    picture.add_argument("--initial-latents", type=Path, metavar="FILE", help=".npy, not a seed")
    picture.add_argument("--save-latents", type=Path, metavar="FILE", help="final latents as .npy")
    machine = parser.add_argument_group("machine")
    add_machine_arguments(machine)
    add_memory_arguments(machine)
    machine.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    if args.prompt_file is not None:
        return run_batch(args)
    if args.resume:
        raise ValueError("--resume goes on with a --prompt-file; give it too")
    request, recipe = request_of(args)
    paths = output_paths(args.out or OUT, request.count)
    _check_targets(args, paths)

    from zquant.cli.progress import PhaseBar

    engine = open_engine(args, recipe)
    with closing(engine):
        device = engine.device
        print(device.summary, file=sys.stderr)
        changed = differences(recipe, engine)
        for notice in changed:
            print(f"note: {notice}", file=sys.stderr)
        with closing(PhaseBar()) as bar:
            results = _paint(args, engine, request, paths, bar)
    notices = list(dict.fromkeys(notice for result in results for notice in result.notices))
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)
    _report(args, paths, results, [*notices, *changed])
    return 0


def _paint(
    args: argparse.Namespace, engine: Any, request: Any, paths: list[Path], bar: Any
) -> list[Any]:
    """A result per picture, each of which is saved as soon as it is decoded."""
    from zquant.formats.latents import save_latents
    from zquant.image import save_png

    results: list[Any] = []
    for result in engine.generate_all(singles(request), bar, bar.note):
        path = paths[len(results)]
        save_png(result.images[0], path, result.recipes[0])
        result.images.clear()
        if not args.json:
            print(f"{path}  seed {result.seed}", flush=True)
        results.append(result)
    if args.save_latents is not None:
        import torch

        save_latents(args.save_latents, torch.cat([result.latents[-1] for result in results]))
    return results


def singles(request: Any) -> list[Any]:
    """A request for each picture of `request`, all with a seed."""
    seed = secrets.randbelow(2**32) if request.seed is None else request.seed
    given = request.initial_latents
    latents: Any = [None] * request.count if given is None else given.split(1)
    if len(latents) != request.count:
        return [request]  # the engine refuses it, with the shapes
    return [
        replace(request, count=1, seed=seed + i, initial_latents=each)
        for i, each in enumerate(latents)
    ]


def output_paths(out: Path, count: int) -> list[Path]:
    """`fox.png`, or `fox-1.png`, `fox-2.png`, ... for several pictures."""
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i + 1}{out.suffix}") for i in range(count)]


def _check_targets(args: argparse.Namespace, paths: list[Path]) -> None:
    """What would keep the results from being written is said before the work."""
    from zquant.image import check_target

    for path in paths:
        check_target(path)
    latents = args.save_latents
    if latents is not None and not latents.parent.is_dir():
        raise FileNotFoundError(f"folder '{latents.parent}' does not exist; create it first")


def _report(
    args: argparse.Namespace, paths: list[Path], results: list[Any], notices: list[str]
) -> None:
    from zquant.memory.plan_report import measured_line
    from zquant.units import format_seconds

    result = results[-1]  # its numbers are those of the whole run, but for the steps
    seconds = {**result.timings, "steps": [s for each in results for s in each.timings["steps"]]}
    if args.json:
        document = {
            "images": [str(path) for path in paths],
            "recipes": [each.recipes[0] for each in results],
            "timings": seconds,
            "peak_host_bytes": result.peak_host_bytes,
            "peak_vram_bytes": result.peak_vram_bytes,
            "memory": result.memory,
            "latents": None if args.save_latents is None else str(args.save_latents),
            "notices": notices,
        }
        print(json.dumps(document))
        return
    steps = sorted(seconds["steps"])
    step_s = steps[len(steps) // 2]
    print(
        f"text encoder {format_seconds(seconds['text_encoder'])}, "
        f"{len(steps)} steps of {format_seconds(step_s)}, "
        f"VAE {format_seconds(seconds['vae'])}, total {format_seconds(seconds['total'])}",
        file=sys.stderr,
    )
    print(measured_line(result.memory, step_s), file=sys.stderr)
