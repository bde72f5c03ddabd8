"""Open weights by what the file is, not by what it is called.

A GGUF or safetensors file, the index of a sharded checkpoint, or a folder with one of these.
What people give by mistake is named: a saved web page, a git-LFS pointer, a pickle. Pickles are
never loaded, because loading one runs code from the file.
"""

from pathlib import Path

from zquant.errors import FormatError
from zquant.formats.gguf_file import open_gguf
from zquant.formats.remote import AnyPath
from zquant.formats.safetensors_file import open_safetensors, open_sharded
from zquant.formats.source import WeightSource

__all__ = ["open_source"]

_EXPECTED = "Expected a .gguf or .safetensors file, or a folder with *.safetensors.index.json."
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def open_source(path: str | AnyPath) -> WeightSource:
    """The tensors of `path`, headers read and checked.

    Args:
        path: a `.gguf` or `.safetensors` file under any name, a `*.safetensors.index.json`, or a
            folder with exactly one index, or else with exactly one weight file. Text is a path
            here, never a URL.

    Raises:
        FormatError: nothing readable is there; the text says what is.
    """
    path = Path(path) if isinstance(path, str) else path
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise FormatError(f"{path}: {what}. {_EXPECTED}")
    start = _start_of(path)
    if start.startswith(b"GGUF"):
        return open_gguf(path)
    if path.name.endswith(".safetensors.index.json"):
        return open_sharded(path)
    if mistake := _mistake(start):
        raise FormatError(f"{path}: {mistake}")
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix == ".gguf":
        return open_gguf(path)
    raise FormatError(f"{path}: no known format, starts with {start[:8]!r}. {_EXPECTED}")


def _open_folder(folder: AnyPath) -> WeightSource:
    """A folder with one index, or with a single weight file."""
    if any(folder.glob("*.safetensors.index.json")):
        return open_sharded(folder)
    found = sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")], key=str)
    if len(found) == 1:
        return open_source(found[0])
    if found:
        names = ", ".join(path.name for path in found[:4])
        raise FormatError(
            f"{folder}: {len(found)} weight files and no index ({names}). Give one of the files."
        )
    inside = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(inside[:4]) or "nothing"
    raise FormatError(f"{folder}: no weights in this folder, found {shown}. {_EXPECTED}")


def _start_of(path: AnyPath) -> bytes:
    if not isinstance(path, Path):
        reader = path.open_file()
        return reader.read(0, min(512, reader.size)).tobytes()
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise FormatError(f"{path}: cannot be opened ({error.strerror}).") from error


def _mistake(start: bytes) -> str:
    """What a file is that is no weights file, and what to do; empty when not recognised."""
    text = start.lstrip().lower()
    if not start:
        return "the file is empty. Download it again."
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "a web page, not weights: the download was refused or needs a login. Download the "
            "file itself, with a login where the model needs one."
        )
    if text.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer of a few lines, not weights. Run `git lfs pull`, or download it."
    if start.startswith(_PICKLES):
        return (
            "a pickle (.ckpt, .pt, .bin); zquant never loads pickles, because they can run code. "
            "Give the model as safetensors or GGUF."
        )
    if text.startswith((b"{", b"[")):
        return f"a JSON file, not weights. {_EXPECTED}"
    return ""
