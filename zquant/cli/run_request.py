"""The flags of `zquant run`, and the recipe of a PNG to repeat, as one request."""

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_machine_arguments", "differences", "machine_of", "request_of"]

MACHINE = {  # flag -> what it may be; a PNG's recipe sets them unless a flag says otherwise
    "compute_dtype": ("auto", "bfloat16", "float16", "float32"),
    "compute": ("auto", "exact", "int8"),
    "attention": ("sdpa", "int8"),
}
FROM_RECIPE = (  # request fields that a PNG's recipe sets, unless a flag says otherwise
    *("prompt", "negative_prompt", "width", "height", "steps", "seed", "guidance_scale"),
    *("cfg_normalization", "cfg_truncation", "shift"),
)


def add_machine_arguments(parser: Any) -> None:
    """Where and how to compute; `parser` may be a group of one."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--compute-dtype", choices=MACHINE["compute_dtype"], help="default: auto")
    parser.add_argument(
        "--compute",
        choices=MACHINE["compute"],
        help="exact: multiply floats; int8: tokens and weights as int8, faster on most GPUs; "
        "default: auto, what pays here",
    )
    parser.add_argument(
        "--kernels",
        choices=("auto", "triton", "torch"),
        default="auto",
        help="triton insists on our kernels, torch does without",
    )
    parser.add_argument("--attention", choices=MACHINE["attention"], help="default: sdpa")


def machine_of(args: argparse.Namespace, recipe: dict[str, Any]) -> dict[str, str]:
    """Arguments of `Engine.open` for the machine flags, with a recipe's where no flag is given."""
    chosen = {"device": args.device, "kernels": args.kernels}
    for name, known in MACHINE.items():
        chosen[name] = getattr(args, name) or recipe.get(name, known[0])
    return chosen


def request_of(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The request, and the recipe it repeats (empty without --from-png)."""
    from zquant.formats.latents import load_latents
    from zquant.request import PRESETS, RunRequest

    recipe = _recipe(args.from_png) if args.from_png is not None else {}
    fields = {name: recipe[name] for name in FROM_RECIPE if name in recipe}
    if args.size is not None:
        if args.size not in PRESETS:
            raise ValueError(f"size {args.size!r} is unknown; known: {', '.join(PRESETS)}")
        fields["width"], fields["height"] = PRESETS[args.size]
    for name in FROM_RECIPE:
        if getattr(args, name) is not None:
            fields[name] = getattr(args, name)
    if "prompt" not in fields:
        raise ValueError("a PROMPT is needed (or --from-png FILE)")
    if args.initial_latents is not None:
        fields["initial_latents"] = load_latents(args.initial_latents)
    elif recipe.get("initial_latents"):
        raise ValueError(f"{args.from_png} was painted from --initial-latents; give them again")
    keep = args.save_latents is not None
    return RunRequest(count=args.count, keep_latents=keep, **fields), recipe


def _recipe(path: Path) -> dict[str, Any]:
    """The recipe in a PNG, whose values may be anything, checked."""
    from zquant.errors import FormatError
    from zquant.image import read_recipe
    from zquant.request import RunRequest

    recipe = read_recipe(path)
    fields = {name: recipe[name] for name in FROM_RECIPE if name in recipe}
    try:
        RunRequest(**{"prompt": None, **fields})
    except ValueError as error:
        raise FormatError(f"{path}: the recipe is damaged: {error}. Give flags instead.") from error
    for name, known in MACHINE.items():
        if recipe.get(name, known[0]) not in known:
            raise FormatError(
                f"{path}: the recipe is damaged: {name} is {recipe[name]!r:.80}; "
                f"expected one of {', '.join(known)}."
            )
    return recipe


def differences(recipe: dict[str, Any], engine: Any) -> list[str]:
    """Why a repeated picture may differ from the one it repeats."""
    if not recipe:
        return []
    device, paths = engine.device, engine.checkpoint.paths
    now = {
        "model": {part: path.name for part, path in paths.items()},
        "sha256": engine.sha256,
        "variant": engine.checkpoint.files.variant.name,
        "compute_dtype": str(device.compute_dtype).removeprefix("torch."),
        "compute": device.compute.mode,
        "attention": "int8" if device.compute.int8_attention else "sdpa",
        "device": device.name,
    }
    return [
        f"{name} was {recipe[name]!r:.300} and is {value!r:.300}; the picture may differ"
        for name, value in now.items()
        if recipe.get(name) not in (None, value)
    ]
