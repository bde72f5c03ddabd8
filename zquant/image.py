"""Decoded picture -> PNG with its recipe in the metadata, and the recipe back from the PNG.

Two text chunks are written:

    parameters  one readable text as other tools write it (prompt, Steps, Sampler, CFG scale, ...)
    zquant      JSON, UTF-8: the whole recipe; `read_recipe` reads only this one

`CFG scale` follows the convention of those tools, guidance_scale + 1, so 1 means no guidance.
Reading walks the chunks and checks their checksums; it never decodes pixels, so a decompression
bomb costs nothing.

Source: PNG specification (W3C), chunks tEXt and iTXt.
"""

import itertools
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from zquant.errors import FormatError

__all__ = ["check_target", "read_recipe", "save_png", "to_image"]

RECIPE_KEY = "zquant"
MAX_RECIPE_BYTES = 2**20
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIECE_BYTES = 2**20
_NEEDS_OLD = os.name == "nt"  # whether a file that cannot be opened cannot be replaced either


def to_image(pixels: npt.ArrayLike) -> Image.Image:
    """An RGB image from what the VAE decodes.

    Args:
        pixels: float32 `[3, H, W]` in [-1, 1], a numpy array or a torch tensor on the CPU.

    Raises:
        ValueError: the dtype or the shape is another one, or a value is not finite.
    """
    array = np.asarray(pixels)
    if array.dtype != np.float32 or array.ndim != 3 or array.shape[0] != 3:
        raise ValueError(f"an image is float32 [3, H, W]; got {array.dtype} {list(array.shape)}")
    if not np.isfinite(array).all():
        n_bad = int(array.size - np.isfinite(array).sum())
        raise ValueError(f"{n_bad} of {array.size} pixel values are not finite; nothing to save")
    levels = np.rint(np.clip(array * 0.5 + 0.5, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))


def check_target(path: str | os.PathLike[str]) -> None:
    """Fail early when `save_png` could not write `path`: before the work, not after it.

    Raises:
        ValueError: the name does not end in .png.
        FileNotFoundError: the folder does not exist.
        IsADirectoryError: a folder has this name.
        OSError: the folder cannot be written, or the file that is there cannot be replaced.
    """
    path = Path(path)
    _check_name(path)
    part = _part_of(path)
    try:
        part.open("wb").close()
        part.unlink()
        if _NEEDS_OLD and path.exists():
            path.open("r+b").close()
    except OSError as error:
        # the name that was asked for says more than that of the part
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from error


def _check_name(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise ValueError(f"'{path}' does not end in .png; pictures are saved as PNG")
    if path.is_dir():
        raise IsADirectoryError(f"'{path}' is a folder; name a file to write")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder '{path.parent}' does not exist; create it first")


def save_png(image: Image.Image, path: str | os.PathLike[str], recipe: Mapping[str, Any]) -> None:
    """Write `image` with `recipe` in its metadata; `path` appears complete or not at all.

    Args:
        image: an RGB image.
        path: a name that ends in .png, in a folder that exists; replaced when it exists.
        recipe: JSON values. `prompt`, `negative_prompt`, `steps`, `guidance_scale`, `seed`,
            `width`, `height`, `model` (a name, or file names by part) and `zquant` (its version)
            also go into the readable text.

    Raises:
        ValueError: the recipe is not JSON or longer than 1 MiB, or see `check_target`.
        OSError: the file cannot be written; where it only cannot be replaced, the picture lies
            beside it, and the message says so.
    """
    path = Path(path)
    _check_name(path)
    text = json.dumps(recipe, ensure_ascii=False, allow_nan=False)
    if len(text.encode()) > MAX_RECIPE_BYTES:
        raise ValueError(f"the recipe takes {len(text.encode())} bytes; at most {MAX_RECIPE_BYTES}")
    info = PngInfo()
    info.add_text("parameters", _parameters(recipe))  # tEXt if it is Latin-1, else iTXt
    info.add_itxt(RECIPE_KEY, text)
    part = _part_of(path)
    try:
        with part.open("wb") as file:
            image.save(file, format="PNG", pnginfo=info)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
    _publish(part, path)


def _part_of(path: Path) -> Path:
    """Where `path` is written first; another process with the same target has another."""
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def _publish(part: Path, path: Path) -> None:
    """Give the finished picture its name, or a free one if that fails."""
    try:
        part.replace(path)
    except OSError as error:
        names = (path.with_name(f"{path.stem}-kept-{i}{path.suffix}") for i in itertools.count(1))
        kept = part.rename(next(name for name in names if not name.exists()))
        reason = f"cannot be replaced ({error.strerror}); the picture is in '{kept}'"
        raise type(error)(error.errno, reason, os.fspath(path)) from error


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe that `save_png` stored in `path`.

    Raises:
        FormatError: not a PNG, damaged, or without a zquant recipe.
    """
    try:
        with Path(path).open("rb") as file:
            stored = [text for text in _texts(file, str(path)) if text is not None]
    except OSError as error:
        raise FormatError(f"{path}: cannot be opened ({error.strerror}).") from error
    if not stored:
        raise FormatError(
            f"{path}: no zquant recipe in this picture. Another program made it or removed it."
        )
    try:
        recipe = json.loads(stored[0])
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the recipe is damaged: not JSON ({error}).") from error
    if len(stored) > 1 or not isinstance(recipe, dict):
        raise FormatError(f"{path}: the recipe is damaged: expected one JSON object.")
    return recipe


def _parameters(recipe: Mapping[str, Any]) -> str:
    """The recipe as the text that other tools read."""
    lines = [str(recipe.get("prompt", ""))]
    if recipe.get("negative_prompt"):
        lines.append(f"Negative prompt: {recipe['negative_prompt']}")
    guidance_scale, model = recipe.get("guidance_scale"), recipe.get("model")
    fields = {
        "Steps": recipe.get("steps"),
        "Sampler": "Euler",
        "CFG scale": None if guidance_scale is None else f"{guidance_scale + 1:g}",
        "Seed": recipe.get("seed"),
        "Size": f"{recipe['width']}x{recipe['height']}" if "width" in recipe else None,
        "Model": Path(model["dit"]).stem if isinstance(model, Mapping) else model,
        "Version": f"zquant {recipe['zquant']}" if "zquant" in recipe else None,
    }
    lines.append(", ".join(f"{k}: {_quoted(v)}" for k, v in fields.items() if v is not None))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    """A field's value; in quotes when it holds a separator."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def _texts(file: BinaryIO, name: str) -> Iterator[bytes | None]:
    """For every chunk up to IEND, its recipe text or None; checks all checksums."""
    if file.read(8) != _SIGNATURE:
        raise FormatError(f"{name}: not a PNG file.")
    kind = b""
    while kind != b"IEND":
        header = file.read(8)
        n_bytes, kind = int.from_bytes(header[:4], "big"), header[4:]
        if len(header) < 8 or n_bytes >= 2**31:
            raise FormatError(f"{name}: the PNG ends early or is damaged. Copy it again.")
        head = file.read(min(n_bytes, len(RECIPE_KEY) + 1)) if kind == b"iTXt" else b""
        is_recipe = head == RECIPE_KEY.encode() + b"\0"
        if is_recipe and n_bytes > 2 * MAX_RECIPE_BYTES:
            raise FormatError(f"{name}: the recipe claims {n_bytes} bytes; it cannot be ours.")
        crc, body, left = zlib.crc32(kind + head), b"", n_bytes - len(head)
        while left > 0 and (piece := file.read(min(left, _PIECE_BYTES))):
            crc, left = zlib.crc32(piece, crc), left - len(piece)
            body += piece if is_recipe else b""
        if left or int.from_bytes(file.read(4), "big") != crc:
            raise FormatError(f"{name}: the PNG ends early or is damaged. Copy it again.")
        yield _international_text(body, name) if is_recipe else None


def _international_text(body: bytes, name: str) -> bytes:
    """The text of an iTXt chunk after its keyword; programs that shrink PNGs may compress it."""
    parts = body[2:].split(b"\0", 2)  # language, translated keyword, text
    if len(body) < 2 or len(parts) < 3:
        raise FormatError(f"{name}: the recipe is damaged: a text chunk without text.")
    if body[0] == 0:
        return parts[2]
    try:
        text = zlib.decompressobj().decompress(parts[2], MAX_RECIPE_BYTES + 1)
    except zlib.error as error:
        raise FormatError(f"{name}: the recipe is damaged ({error}).") from error
    if len(text) > MAX_RECIPE_BYTES:
        raise FormatError(f"{name}: the recipe is longer than {MAX_RECIPE_BYTES} bytes.")
    return text
