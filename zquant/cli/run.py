"""`zquant run PROMPT --model DIR`: a prompt becomes a PNG."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["add_arguments", "run"]

FROM_RECIPE = (  # request fields that a PNG's recipe sets, unless a flag says otherwise
    *("negative_prompt", "width", "height", "steps", "seed", "guidance_scale"),
    *("cfg_normalization", "cfg_truncation", "shift"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="what to paint")
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, metavar="DIR", help="a converted or official folder")
    for flag in ("--dit", "--text-encoder", "--vae"):
        model.add_argument(flag, type=Path, metavar="FILE", help="file in place of the folder's")
    model.add_argument("--variant", choices=("turbo", "base"), help="when the files cannot tell")
    picture = parser.add_argument_group("picture (defaults: the model's own)")
    picture.add_argument("--out", type=Path, default=Path("zquant.png"), metavar="FILE")
    picture.add_argument("--size", metavar="NAME", help="a preset, e.g. 1024, 1280x720, 832x1248")
    picture.add_argument("--width", type=int, help="pixels, a multiple of 16 (1024)")
    picture.add_argument("--height", type=int, help="pixels, a multiple of 16 (1024)")
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
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    machine.add_argument(
        "--compute-dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32")
    )
    machine.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    request, recipe = _request(args)
    paths = output_paths(args.out, request.count)

    import zquant
    from zquant.cli.progress import PhaseBar
    from zquant.formats.latents import save_latents
    from zquant.image import check_target, save_png

    check_target(args.out)
    engine = zquant.Engine.open(
        args.model,
        dit=args.dit,
        text_encoder=args.text_encoder,
        vae=args.vae,
        variant=args.variant,
        device=args.device,
        compute_dtype=args.compute_dtype or "auto",
    )
    device = engine.device
    dtype = str(device.compute_dtype).removeprefix("torch.")
    print(f"{device.name}, {dtype} ({device.reason})", file=sys.stderr)
    for notice in _differences(recipe, engine):
        print(f"note: {notice}", file=sys.stderr)
    bar = PhaseBar()
    result = engine.generate(request, bar)
    bar.close()
    for notice in result.notices:
        print(f"note: {notice}", file=sys.stderr)
    for path, image, each in zip(paths, result.images, result.recipes, strict=True):
        save_png(image, path, each)
    if args.save_latents and result.latents is not None:
        save_latents(args.save_latents, result.latents[-1])
    _report(args, paths, result)
    return 0


def output_paths(out: Path, count: int) -> list[Path]:
    """`fox.png`, or `fox-1.png`, `fox-2.png`, ... for several pictures."""
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i + 1}{out.suffix}") for i in range(count)]


def _request(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The request, and the recipe it repeats (empty without --from-png)."""
    from zquant.formats.latents import load_latents
    from zquant.image import read_recipe
    from zquant.request import PRESETS, RunRequest

    recipe = read_recipe(args.from_png) if args.from_png else {}
    fields = {name: recipe[name] for name in FROM_RECIPE if name in recipe}
    if args.size is not None:
        if args.size not in PRESETS:
            raise ValueError(f"size {args.size!r} is unknown; known: {', '.join(PRESETS)}")
        fields["width"], fields["height"] = PRESETS[args.size]
    for name in FROM_RECIPE:
        if getattr(args, name) is not None:
            fields[name] = getattr(args, name)
    prompt = args.prompt if args.prompt is not None else recipe.get("prompt")
    if prompt is None:
        raise ValueError("a PROMPT is needed (or --from-png FILE)")
    if args.initial_latents is not None:
        fields["initial_latents"] = load_latents(args.initial_latents)
    elif recipe.get("initial_latents"):
        raise ValueError(f"{args.from_png} was painted from --initial-latents; give them again")
    keep = args.save_latents is not None
    return RunRequest(prompt=prompt, count=args.count, keep_latents=keep, **fields), recipe


def _differences(recipe: dict[str, Any], engine: Any) -> list[str]:
    """Why a repeated picture may differ from the one it repeats."""
    if not recipe:
        return []
    device = engine.device
    now = {
        "sha256": engine.sha256,
        "compute_dtype": str(device.compute_dtype).removeprefix("torch."),
        "device": device.name,
    }
    return [
        f"{name} was {recipe[name]} and is {value}; the picture may differ"
        for name, value in now.items()
        if recipe.get(name) not in (None, value)
    ]


def _report(args: argparse.Namespace, paths: list[Path], result: Any) -> None:
    from zquant.units import format_bytes, format_seconds

    if args.json:
        document = {
            "images": [str(path) for path in paths],
            "recipes": result.recipes,
            "timings": result.timings,
            "peak_host_bytes": result.peak_host_bytes,
            "peak_vram_bytes": result.peak_vram_bytes,
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
