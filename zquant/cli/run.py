"""`zquant run PROMPT --model DIR`: a prompt becomes a PNG."""

import argparse
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from zquant.cli.run_request import add_machine_arguments, differences, machine_of, request_of

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="what to paint")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="DIR",
        help="a converted or official folder; demo: the small model inside zquant",
    )
    for flag in ("--dit", "--text-encoder", "--vae"):
        model.add_argument(flag, type=Path, metavar="FILE", help="single file, or in its place")
    model.add_argument("--variant", choices=("turbo", "base"), help="when the files cannot tell")
    picture = parser.add_argument_group("picture (defaults: the model's own)")
    picture.add_argument("--out", type=Path, default=Path("zquant.png"), metavar="FILE")
    picture.add_argument("--size", metavar="NAME", help="a preset, e.g. 1024, 1280x720, 832x1248")
    picture.add_argument("--width", type=int, help="pixels, a multiple of 16")
    picture.add_argument("--height", type=int, help="pixels, a multiple of 16")
    picture.add_argument("--steps", type=int)
    picture.add_argument("--seed", type=int, help="default: drawn, and shown at the end")
    picture.add_argument("--count", type=int, default=1, help="pictures, with seeds that count up")
    picture.add_argument("--guidance-scale", type=float, help="diffusers' scale; 0 is off")
    picture.add_argument("--negative-prompt", help="what to avoid, when guidance is on")
    picture.add_argument("--cfg-normalization", type=float, help="limit of the guided norm; 0: off")
    picture.add_argument("--cfg-truncation", type=float, help="no guidance where 1 - sigma exceeds")
    picture.add_argument("--shift", type=float, help="of the sigma schedule")
    picture.add_argument("--from-png", type=Path, metavar="FILE", help="repeat a zquant picture")
    picture.add_argument("--initial-latents", type=Path, metavar="FILE", help=".npy, not a seed")
    picture.add_argument("--save-latents", type=Path, metavar="FILE", help="final latents as .npy")
    machine = parser.add_argument_group("machine")
    add_machine_arguments(machine)
    machine.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    request, recipe = request_of(args)
    paths = output_paths(args.out, request.count)
    _check_targets(args)

    import zquant
    from zquant.cli.progress import PhaseBar
    from zquant.formats.latents import save_latents
    from zquant.image import save_png

    engine = zquant.Engine.open(
        args.model,
        dit=args.dit,
        text_encoder=args.text_encoder,
        vae=args.vae,
        variant=args.variant,
        **machine_of(args, recipe),
    )
    with closing(engine):
        device = engine.device
        print(device.summary, file=sys.stderr)
        changed = differences(recipe, engine)
        for notice in changed:
            print(f"note: {notice}", file=sys.stderr)
        with closing(PhaseBar()) as bar:
            result = engine.generate(request, bar)
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
    from zquant.units import format_bytes, format_seconds

    if args.json:
        document = {
            "images": [str(path) for path in paths],
            "recipes": result.recipes,
            "timings": result.timings,
            "peak_host_bytes": result.peak_host_bytes,
            "peak_vram_bytes": result.peak_vram_bytes,
            "latents": None if args.save_latents is None else str(args.save_latents),
            "notices": result.notices,
        }
        print(json.dumps(document, ensure_ascii=False))
        return
    for path, recipe in zip(paths, result.recipes, strict=True):
        print(f"{path}  seed {recipe['seed']}")
    seconds, memory = result.timings, result.peak_host_bytes
    steps = sorted(seconds["steps"])
    print(
        f"text encoder {format_seconds(seconds['text_encoder'])}, "
        f"{len(steps)} steps of {format_seconds(steps[len(steps) // 2])}, "
        f"VAE {format_seconds(seconds['vae'])}, total {format_seconds(seconds['total'])}"
        + (f"; peak RAM {format_bytes(memory)}" if memory else "")
        + (f", VRAM {format_bytes(result.peak_vram_bytes)}" if result.peak_vram_bytes else ""),
        file=sys.stderr,
    )
