"""Prompt files: one prompt per line, as plain text or as JSON with settings; both may be mixed.

    # a comment; blank lines are skipped, too
    a red fox in the snow
    {"prompt": "a lighthouse", "width": 1280, "height": 720, "seed": 7, "name": "lighthouse"}

A line that starts with "{" is a JSON object. That is also how to write a prompt that starts with
"#" or "{", or has several lines. Text is UTF-8, with or without a byte order mark.

The names of the settings are checked here, and `name`, which becomes a file name; every other value
is checked by whoever uses it.
"""

import json
import os
import re
import sys
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches
from io import BytesIO
from pathlib import Path
from typing import Any

from zquant.errors import FormatError
from zquant.formats.source import quoted
from zquant.units import format_bytes

__all__ = ["PromptLine", "read_prompts"]

STDIN = "-"
MAX_FILE_BYTES = 2**26
MAX_LINE_BYTES = 2**16
MAX_PROMPTS = 10_000
MAX_DIGITS = 40  # a seed has 19
MAX_NAME_BYTES = 200  # file systems allow 255; a number, .png and .PID.part are added

_EXAMPLE = 'Write it like {"prompt": "a red fox", "seed": 7}.'
_UNNAMEABLE = ("Cc", "Cs", "Zl", "Zp")  # control characters, lone surrogates, line separators
# Windows opens a device under these names, whatever follows the first dot
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\..*)?", re.I)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLine:
    """One prompt and its settings.

    Attributes:
        number: its line in the file, from 1; for messages.
        fields: "prompt", and those of the allowed settings that the line has.
    """

    number: int
    fields: dict[str, Any]


def read_prompts(path: str | os.PathLike[str], allowed: Collection[str]) -> list[PromptLine]:
    """All prompts of a file, in its order.

    Args:
        path: a file; "-" is standard input.
        allowed: settings that a JSON line may have beside "prompt". One of them may be "name": a
            file name without folder and ending, different in every line.

    Raises:
        FormatError: the file cannot be read, is too large or has no prompts, or a line is not what
            it should be.
    """
    shown, data = _contents(path)
    known = sorted({"prompt", *allowed})
    prompts: list[PromptLine] = []
    names: dict[str, int] = {}
    offset = 0
    for number, raw in enumerate(BytesIO(data), 1):
        try:
            if fields := _fields(raw, offset, known):
                _take_name(fields, number, names)
                if len(prompts) == MAX_PROMPTS:
                    raise ValueError(f"more than {MAX_PROMPTS:,} prompts. Split the file.")
                prompts.append(PromptLine(number=number, fields=fields))
        except ValueError as error:
            raise FormatError(f"{shown}, line {number}: {error}") from error
        offset += len(raw)
    if not prompts:
        raise FormatError(
            f"{shown}: has no prompts ({len(data)} bytes). Write one per line; lines that start "
            f"with # are comments."
        )
    return prompts


def _contents(path: str | os.PathLike[str]) -> tuple[str, bytes]:
    """The file's name for messages, and its bytes."""
    if os.fspath(path) == STDIN:
        shown, stream = "standard input", getattr(sys.stdin, "buffer", None)
        if stream is None:
            raise FormatError(f"{shown}: is closed. Pipe prompts into it, or name a file.")
        data = stream.read(MAX_FILE_BYTES + 1)
        size = len(data)
    else:
        shown = os.fspath(path)
        if Path(path).is_dir():
            raise FormatError(f"{shown}: is a folder; expected a file with one prompt per line.")
        try:
            with Path(path).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                # a pipe has no size, and a file may grow
                data = file.read(MAX_FILE_BYTES + 1) if size <= MAX_FILE_BYTES else b""
        except OSError as error:
            raise FormatError(
                f"{shown}: cannot be read ({error.strerror}). Check the path of the prompt file."
            ) from error
    if max(size, len(data)) > MAX_FILE_BYTES:
        raise FormatError(
            f"{shown}: is larger than {format_bytes(MAX_FILE_BYTES)}; expected a file with one "
            f"prompt per line. Split it if it is one."
        )
    return shown, data


def _fields(raw: bytes, offset: int, known: list[str]) -> dict[str, Any] | None:
    """The fields of a line that starts at byte `offset`; None if it has no prompt.

    Raises:
        ValueError: what is wrong with it.
    """
    raw = raw.rstrip(b"\r\n")
    if len(raw) > MAX_LINE_BYTES:
        raise ValueError(
            f"has {len(raw)} bytes; at most {MAX_LINE_BYTES} are read. Write one prompt per line."
        )
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff").strip()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {offset + error.start} of the file (0x{raw[error.start]:02x}) is not UTF-8. "
            f"Save the file as UTF-8."
        ) from error
    if not text or text.startswith("#"):
        return None
    if text.startswith("{"):
        return _json_fields(text, known)
    control = next((i for i, c in enumerate(text) if c < " " and c != "\t"), None)
    if control is not None:
        raise ValueError(
            f"character {control + 1} is {text[control]!r}; expected text without control "
            f"characters. Save the file as UTF-8 text with one prompt per line."
        )
    return {"prompt": text}


def _json_fields(text: str, known: list[str]) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(
            text, object_pairs_hook=_unique, parse_int=_integer, parse_constant=_no_number
        )
    except json.JSONDecodeError as error:
        raise ValueError(
            f"is not a JSON object (character {error.colno}: {error.msg} "
            f"{quoted(text[error.pos : error.pos + 20])}). A prompt that starts with '{{' is "
            f'written as {{"prompt": "{{..."}}.'
        ) from error
    except RecursionError as error:
        raise ValueError(f"is nested too deeply. {_EXAMPLE}") from error
    for key, value in fields.items():
        if key not in known:
            near = get_close_matches(key[:80], known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{quoted(key)} is not a setting; {hint}Known: {', '.join(known)}.")
        if isinstance(value, list | dict):
            kind = "an object" if isinstance(value, dict) else "a list"
            raise ValueError(f"{key!r} is {kind}; expected text or a number. {_EXAMPLE}")
    prompt = fields.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        found = f"'prompt' is {prompt!r:.80}" if "prompt" in fields else "has no 'prompt'"
        raise ValueError(f"{found}; expected the text of a prompt. {_EXAMPLE}")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"has {quoted(key)} twice; expected each setting once. Remove one.")
        fields[key] = value
    return fields


def _integer(text: str) -> int:
    # Python itself refuses longer numbers only from 4,300 digits on, and not in every version
    if len(text) > MAX_DIGITS:
        raise ValueError(
            f"has a number of {len(text)} digits ({text[:10]}...); expected at most {MAX_DIGITS}. "
            f"Write a smaller one."
        )
    return int(text)


def _no_number(text: str) -> Any:
    raise ValueError(f"has {text}, which is not JSON; expected a finite number. Write one.")


def _take_name(fields: dict[str, Any], number: int, names: dict[str, int]) -> None:
    """Check the line's `name`, if it has one, and add it to the lines by name."""
    if "name" not in fields:
        return
    name = fields["name"]
    if fault := _name_fault(name):
        raise ValueError(
            f"'name' is {quoted(name)}, which {fault}; expected a plain file name such as "
            f'"fox-1", without folder and ending.'
        )
    # some file systems do not tell such names apart
    same = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    if same in names:
        raise ValueError(
            f"'name' is {quoted(name)}, as in line {names[same]}; expected another file name in "
            f"every line. Change one of them."
        )
    names[same] = number


def _name_fault(name: Any) -> str:
    """Why `name` cannot be a file name on every system; empty if it can."""
    if not isinstance(name, str):
        return "is not text"
    if not name:
        return "is empty"
    bad = [c for c in name if c in '/\\:*?"<>|' or unicodedata.category(c) in _UNNAMEABLE]
    if bad:
        return f"has the character {bad[0]!r}"
    if name != name.strip() or name[0] == "." or name[-1] == ".":
        return "starts or ends with a dot or a space"
    if _DEVICES.fullmatch(name):
        return "is reserved by Windows"
    if name.lower().endswith(".png"):
        return "ends in .png already"
    n_bytes = len(name.encode())
    return f"has {n_bytes} bytes of at most {MAX_NAME_BYTES}" if n_bytes > MAX_NAME_BYTES else ""
