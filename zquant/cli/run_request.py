"""The flags of `zquant run`, and the recipe of a PNG to repeat, as one request."""

import argparse
from pathlib import Path
from typing import Any

__all__ = [
    "FROM_RECIPE",
    "add_machine_arguments",
    "add_memory_arguments",
    "add_model_arguments",
    "add_picture_arguments",
    "cache_of",
    "differences",
    "limits_of",
    "machine_of",
    "open_engine",
    "picture_fields",
    "request_of",
]

MACHINE = {  # flag -> what it may be; a PNG's recipe sets them unless a flag says otherwise
    "compute_dtype": ("auto", "bfloat16", "float16", "float32"),
    "compute": ("auto", "exact", "int8"),
    "attention": ("sdpa", "int8"),
}
CACHE_BYTES = 2**28  # of embeddings on disk: some hundred prompts
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


def add_model_arguments(parser: Any) -> None:
    """Which model; `parser` may be a group of one."""
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="a converted or official folder; demo: the small model inside zquant",
    )
    for flag in ("--dit", "--text-encoder", "--vae"):
        parser.add_argument(flag, type=Path, metavar="FILE", help="single file, or in its place")
    parser.add_argument("--variant", choices=("turbo", "base"), help="when the files cannot tell")


def add_picture_arguments(parser: Any) -> None:
    """What decides the memory of a picture; `parser` may be a group of one."""
    parser.add_argument("--size", metavar="SIZE", help="pixels, e.g. 1024 or 1280x720")
    parser.add_argument("--width", type=int, help="pixels, a multiple of 16")
    parser.add_argument("--height", type=int, help="pixels, a multiple of 16")
    parser.add_argument("--steps", type=int, help="of denoising, from 1 to 1000")
    parser.add_argument("--count", type=int, default=1, help="pictures, with seeds that count up")
    parser.add_argument("--guidance-scale", type=float, help="diffusers' scale; 0 is off")


def add_memory_arguments(parser: Any) -> None:
    """Ceilings on memory; `parser` may be a group of one."""
    parser.add_argument(
        "--budget",
        metavar="SIZE",
        help="VRAM of the whole process, e.g. 4GiB; default: what is free",
    )
    parser.add_argument(
        "--max-ram",
        metavar="SIZE",
        help="RAM of the whole process, e.g. 6GiB; default: what is free",
    )


def limits_of(args: argparse.Namespace) -> Any:
    """The ceilings as `Limits`."""
    from zquant.memory.needs import Limits
    from zquant.units import parse_bytes

    given = {"budget_bytes": args.budget, "ram_bytes": args.max_ram}
    return Limits(**{name: None if v is None else parse_bytes(v) for name, v in given.items()})


def cache_of() -> Any:
    """The embedding cache that the environment names, or None where it is switched off."""
    from zquant import env
    from zquant.formats.embed_cache import EmbedCache

    if env.CACHE.value.lower() in ("0", "off", "no", "false"):
        return None
    return EmbedCache(Path(env.CACHE.value).expanduser() / "embeds", max_bytes=CACHE_BYTES)


def open_engine(args: argparse.Namespace, recipe: dict[str, Any]) -> Any:
    """The engine that the flags ask for, a recipe's choices where they ask for nothing."""
    import zquant

    return zquant.Engine.open(
        args.model,
        dit=args.dit,
        text_encoder=args.text_encoder,
        vae=args.vae,
        variant=args.variant,
        limits=limits_of(args),
        cache=cache_of(),
        **machine_of(args, recipe),
    )


def machine_of(args: argparse.Namespace, recipe: dict[str, Any]) -> dict[str, str]:
    """Arguments of `Engine.open` for the machine flags, with a recipe's where no flag is given."""
    chosen = {"device": args.device, "kernels": args.kernels}
    for name, known in MACHINE.items():
        chosen[name] = getattr(args, name) or recipe.get(name, known[0])
    return chosen


def request_of(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The request, and the recipe it repeats (empty without --from-png)."""
    from zquant.formats.latents import load_latents
    from zquant.request import RunRequest

    if args.seed is not None and args.seed < 0:
        raise ValueError(
            f"seed is {args.seed}; it must be from 0 to 2**63 - 1. "
            f"Leave --seed out for a random one"
        )
    recipe = _recipe(args.from_png) if args.from_png is not None else {}
    fields = {name: recipe[name] for name in FROM_RECIPE if name in recipe}
    fields |= picture_fields(args)
    if args.prompt is not None:
        fields["prompt"] = args.prompt
    if "prompt" not in fields:
        raise ValueError("a PROMPT is needed (or --from-png FILE)")
    if args.initial_latents is not None:
        fields["initial_latents"] = load_latents(args.initial_latents)
    elif recipe.get("initial_latents"):
        raise ValueError(f"{args.from_png} was painted from --initial-latents; give them again")
    keep = args.save_latents is not None
    return RunRequest(count=args.count, keep_latents=keep, **fields), recipe


def picture_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The request fields that flags set."""
    from zquant.request import parse_size

    fields: dict[str, Any] = {}
    if args.size is not None:
        fields["width"], fields["height"] = parse_size(args.size)
    for name in FROM_RECIPE:
        if name != "prompt" and getattr(args, name, None) is not None:
            fields[name] = getattr(args, name)
    return fields


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
        "sha256": engine.checkpoint.sha256,
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
