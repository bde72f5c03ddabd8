"""A model as three files and what the sampler must know about it.

The word `demo` names the small model inside zquant. A converted folder says what it is in its
`model.json`, an official folder in `scheduler_config.json`; loose files say nothing, so the variant
is asked for or assumed to be Turbo.
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from zquant.errors import CheckpointError, FormatError
from zquant.formats.names import COMPONENTS
from zquant.formats.remote import AnyPath
from zquant.formats.source import WeightSource

__all__ = [
    "DEMO",
    "MANIFEST",
    "MANIFEST_FORMAT",
    "OFFICIAL_FILES",
    "OFFICIAL_FOLDERS",
    "VARIANTS",
    "Hint",
    "ModelFiles",
    "Variant",
    "demo_notice",
    "find_model",
    "model_folder",
    "official_variant",
    "read_json",
    "source_metadata",
    "typed",
    "variant_of_shift",
]

DEMO = "demo"
MANIFEST = "model.json"
MANIFEST_FORMAT = "zquant-model-1"
OFFICIAL_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")  # unsharded
OFFICIAL_FOLDERS = {"dit": "transformer", "text_encoder": "text_encoder", "vae": "vae"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """How a variant of the model is sampled unless the user says otherwise.

    `guidance_scale` is diffusers' (0: the negative prompt is not used).
    """

    name: str
    shift: float
    steps: int
    guidance_scale: float


VARIANTS = {
    v.name: v
    for v in (
        Variant(name="turbo", shift=3.0, steps=8, guidance_scale=0.0),
        Variant(name="base", shift=6.0, steps=30, guidance_scale=4.0),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """What a model of few words says to a prompt that has others."""

    words: Sequence[str]
    text: str

    def about(self, prompt: str) -> str | None:
        """The text if `prompt` has more than known words, spaces and punctuation, else None."""
        left = prompt.lower()
        for word in sorted(self.words, key=len, reverse=True):
            left = re.sub(rf"\b{word}\b" if word.isascii() else word, " ", left)
        return self.text if any(unicodedata.category(c)[0] not in "CPZ" for c in left) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """The three files (or official component folders) of a model.

    `size` is the width and height of a picture whose request names none.
    """

    dit: Path
    text_encoder: Path
    vae: Path
    variant: Variant
    size: tuple[int, int] = (1024, 1024)
    hint: Hint | None = None
    tokenizer: Path | None = None
    manifest: Mapping[str, Any] | None = None


def variant_of_shift(shift: float) -> Variant:
    """The variant whose scheduler uses `shift`; another shift is Turbo with that shift."""
    for variant in VARIANTS.values():
        if variant.shift == shift:
            return variant
    return Variant(name="turbo", shift=shift, steps=8, guidance_scale=0.0)


def model_folder(model: str | Path) -> Path:
    """The folder that `model` means: the text "demo" is zquant's own, anything else a path.

    Raises:
        CheckpointError: this installation lacks the demo model.
    """
    if model != DEMO:  # Path("demo") is a folder of the user's, as "./demo" is
        return Path(model)
    folder = Path(str(package_files("zquant"))) / DEMO
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"the demo model is missing from this installation ({folder}). Install zquant again; "
            f"for a folder named demo write ./demo."
        )
    return folder


def demo_notice(model: str | Path | None) -> str | None:
    """What to say if `model` is zquant's own and a folder of its name is here too."""
    if model == DEMO and Path(DEMO).is_dir():
        return "demo is the model inside zquant; for the folder here write ./demo"
    return None


def typed(folder: Path) -> str:
    """How to write `folder` where a model is asked for."""
    return f"./{folder}" if str(folder) == DEMO else str(folder)


def find_model(folder: Path) -> ModelFiles:
    """The files of a converted folder or of an official one.

    Raises:
        CheckpointError: the folder is neither, or a file it names is missing.
    """
    if (folder / MANIFEST).is_file():
        return _converted(folder)
    if (folder / "transformer").is_dir():
        return _official(folder)
    found = "is a file" if folder.is_file() else "has neither" if folder.is_dir() else "is missing"
    raise CheckpointError(
        f"{folder}: not a model folder ({found}); expected {MANIFEST} (made by zquant convert) or "
        f"transformer/ (an official download). For single files use --dit, --text-encoder, --vae."
    )


def read_json(path: AnyPath) -> dict[str, Any]:
    """A JSON object from a small file.

    Raises:
        FormatError: the file cannot be read or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{path}: not valid JSON ({error}). Download or convert again."
        ) from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: holds a {type(value).__name__}; expected a JSON object.")
    return value


def official_variant(folder: AnyPath) -> Variant:
    """The variant of an official folder, by its scheduler's shift."""
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    shift = config.get("shift")
    if not isinstance(shift, (int, float)) or isinstance(shift, bool) or shift <= 0:
        raise FormatError(f"{folder}: scheduler shift is {shift!r}; expected a positive number.")
    return variant_of_shift(float(shift))


def _official(folder: Path) -> ModelFiles:
    paths = {part: folder / name for part, name in OFFICIAL_FOLDERS.items()}
    missing = [path.name for path in paths.values() if not path.is_dir()]
    if missing:
        raise CheckpointError(f"{folder}: lacks {', '.join(missing)}/. Download the whole model.")
    tokenizer = folder / "tokenizer"
    return ModelFiles(
        dit=paths["dit"],
        text_encoder=paths["text_encoder"],
        vae=paths["vae"],
        variant=official_variant(folder),
        tokenizer=tokenizer if tokenizer.is_dir() else None,
    )


def _converted(folder: Path) -> ModelFiles:
    where = folder / MANIFEST
    manifest = read_json(where)
    if manifest.get("format") != MANIFEST_FORMAT:
        raise FormatError(
            f"{where}: format is {manifest.get('format')!r}; expected {MANIFEST_FORMAT!r}. "
            f"{_other_format(manifest.get('format'))}"
        )
    dit, text_encoder, vae = (_named_file(folder, manifest, part) for part in COMPONENTS)
    return ModelFiles(
        dit=dit,
        text_encoder=text_encoder,
        vae=vae,
        variant=_variant(where, manifest),
        size=_size(where, manifest),
        hint=_hint(where, manifest),
        manifest=manifest,
    )


def _other_format(found: Any) -> str:
    """What to do about a manifest of another format; their versions count up."""
    family, _, ours = MANIFEST_FORMAT.rpartition("-")
    match = re.fullmatch(rf"{family}-(\d{{1,9}})", str(found), re.ASCII)
    if match and int(match[1]) > int(ours):
        return "A newer zquant made it: upgrade this one."
    return "Convert the model with this version of zquant."


def _named_file(folder: Path, manifest: Mapping[str, Any], part: str) -> Path:
    files = manifest.get("files")
    entry = files.get(part) if isinstance(files, dict) else None
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise FormatError(
            f"{folder / MANIFEST}: the file of {part!r} is {name!r}; expected a plain file name."
        )
    if not (folder / name).is_file():
        raise CheckpointError(
            f"{folder / name}: missing, though {MANIFEST} names it. Convert again."
        )
    return folder / name


def _variant(where: Path, manifest: Mapping[str, Any]) -> Variant:
    try:
        variant = Variant(
            name=str(manifest["variant"]),
            shift=float(manifest["shift"]),
            steps=int(manifest["steps"]),
            guidance_scale=float(manifest["guidance_scale"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"{where}: incomplete ({error}). Convert the model again.") from error
    if variant.shift <= 0 or variant.steps < 1:
        raise FormatError(
            f"{where}: shift {variant.shift} and steps {variant.steps} must be positive."
        )
    return variant


def _size(where: Path, manifest: Mapping[str, Any]) -> tuple[int, int]:
    size = manifest.get("size", [1024, 1024])
    if not isinstance(size, list) or [type(edge) for edge in size] != [int, int]:
        raise FormatError(
            f"{where}: size is {size!r:.80}; expected [width, height]. Convert the model again."
        )
    width, height = size
    return width, height


def _hint(where: Path, manifest: Mapping[str, Any]) -> Hint | None:
    hint = manifest.get("hint")
    if hint is None:
        return None
    said = hint if isinstance(hint, dict) else {}
    words, text = said.get("words"), said.get("text")
    if isinstance(words, list) and isinstance(text, str):
        known = all(isinstance(word, str) and word.isalnum() for word in words)
        if known and text.isprintable():
            return Hint(words=words, text=text)
    raise FormatError(
        f"{where}: hint is {hint!r:.80}; expected its words and text. Convert the model again."
    )


def source_metadata(source: WeightSource) -> Mapping[str, Any]:
    """A GGUF's own key-value pairs, or an official folder's config.json under the same keys.

    Raises:
        FormatError: the config file cannot be read.
    """
    path = source.path
    folder = path.parent if path.name in OFFICIAL_FILES else path
    config_file = folder / "config.json"
    if source.container == "gguf" or not config_file.is_file():
        return source.metadata
    config = read_json(config_file)
    family = "lumina2" if "axes_dims" in config else "qwen3"
    keys = {
        "axes_dims": "lumina2.rope.dimension_sections",
        "norm_num_groups": "norm_num_groups",
        "rms_norm_eps": "qwen3.attention.layer_norm_rms_epsilon",
        "rope_theta": f"{family}.rope.freq_base",
    }
    return {key: config[name] for name, key in keys.items() if config.get(name) is not None}
