"""`zquant run PROMPT --model DIR`: a prompt becomes a PNG."""

import argparse
import json
import sys
from contextlib import closing
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
    picture.add_argument("--out", type=Path, default=Path("zquant.png"), metavar="FILE")
    add_picture_arguments(picture)
    picture.add_argument("--seed", type=int, help="default: drawn, and shown at the end")
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
    paths = output_paths(args.out, request.count)
    _check_targets(args)

    from zquant.cli.progress import PhaseBar
    from zquant.formats.latents import save_latents
    from zquant.image import save_png

    engine = open_engine(args, recipe)
    with closing(engine):
        device = engine.device
        print(device.summary, file=sys.stderr)
        changed = differences(recipe, engine)
        for notice in changed:
            print(f"note: {notice}", file=sys.stderr)
        with closing(PhaseBar()) as bar:
            result = engine.generate(request, bar, bar.note)
    for notice in result.notices:
        print(f"note: {notice}", file=sys.stderr)
    result.notices.extend(changed)
    for path, image, each in zip(paths, result.images, result.recipes, strict=True):
        save_png(image, path, each)
    if args.save_latents is not None and result.latents is not None:
        save_latents(args.save_latents, result.latents[-1])
    _report(args, paths, result)
    return 0


def output_paths(out: Path, count: int) -> list[Path]:
    """`fox.png`, or `fox-1.png`, `fox-2.png`, ... for several pictures."""
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i + 1}{out.suffix}") for i in range(count)]


def _check_targets(args: argparse.Namespace) -> None:
    """What would keep the results from being written is said before the work."""
    from zquant.image import check_target

    check_target(args.out)
    latents = args.save_latents
    if latents is not None and not latents.parent.is_dir():
        raise FileNotFoundError(f"folder '{latents.parent}' does not exist; create it first")


def _report(args: argparse.Namespace, paths: list[Path], result: Any) -> None:
    from zquant.memory.plan_report import measured_line
    from zquant.units import format_seconds

    if args.json:
        document = {
            "images": [str(path) for path in paths],
            "recipes": result.recipes,
            "timings": result.timings,
            "peak_host_bytes": result.peak_host_bytes,
            "peak_vram_bytes": result.peak_vram_bytes,
            "memory": result.memory,
            "latents": None if args.save_latents is None else str(args.save_latents),
            "notices": result.notices,
        }
        print(json.dumps(document, ensure_ascii=False))
        return
    for path, recipe in zip(paths, result.recipes, strict=True):
        print(f"{path}  seed {recipe['seed']}")
    seconds = result.timings
    steps = sorted(seconds["steps"])
    step_s = steps[len(steps) // 2]
    print(
        f"text encoder {format_seconds(seconds['text_encoder'])}, "
        f"{len(steps)} steps of {format_seconds(step_s)}, "
        f"VAE {format_seconds(seconds['vae'])}, total {format_seconds(seconds['total'])}",
        file=sys.stderr,
    )
    print(measured_line(result.memory, step_s), file=sys.stderr)
