"""The document of `zquant bench`: what it holds, and whether one does.

A shape is a type, a `Maybe` of a shape, a list of one shape (any number of such values), or a
dictionary of shapes by key. Keys that no shape names are allowed: a later version may add them
without another number.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zquant.errors import FormatError

__all__ = ["SCHEMA", "check", "check_shape"]

SCHEMA = "zquant-bench-1"


@dataclass(frozen=True, slots=True)
class Maybe:
    """`shape` or None."""

    shape: Any


SPREAD = {"median": float, "min": float, "max": float, "n": int}
PHASES = {
    **dict.fromkeys(("plan_s", "text_encoder_s", "first_step_s", "step_s"), SPREAD),
    **dict.fromkeys(("vae_s", "save_s", "total_s"), SPREAD),
}
CEILING = {
    "streamed_blocks": int,
    "product_rows": int,
    "product_flop_s": float,
    "product_int8_op_s": Maybe(float),
    "product_int8_reason": str,
    "step_flop": float,
    "products_s": float,
    "weights_s": float,
    "moving_s": float,
    "expand_s": float,
    "roofline_s": float,
    "bound": str,
}
PEAKS = {
    "vram_process_bytes": Maybe(int),
    "vram_witness": str,
    "vram_allocator_bytes": Maybe(int),
    "vram_samples_hz": float,
    "ram_bytes": Maybe(int),
}
PREDICTED = {"vram_bytes": Maybe(int), "ram_bytes": int, "step_s": float}
MOVED = {
    "streamed_blocks": int,
    "read_bytes": int,
    "copied_bytes": int,
    "storage_read_bytes": Maybe(int),
    "overlap_at_least": Maybe(float),
}
MEASURED = {  # of a size that was painted
    "n_tokens": int,
    "ceiling": CEILING,
    "startup_s": float,
    "cold": PHASES,
    "warm": PHASES,
    "times_ceiling": float,
    "predicted": PREDICTED,
    "peaks": PEAKS,
    "moved": MOVED,
    "notices": [str],
}
FILE = {"name": str, "sha256": Maybe(str)}
DOCUMENT = {
    "schema": str,
    "command": str,
    "versions": {
        **dict.fromkeys(("zquant", "torch", "python"), str),
        **dict.fromkeys(("triton", "driver", "commit"), Maybe(str)),
    },
    "machine": {"system": str, "cores": int, "ram_bytes": int, "plan": {"is_gpu": bool}},
    "device": {
        **dict.fromkeys(("name", "compute_dtype", "compute", "attention"), str),
        "uuid": Maybe(str),
    },
    "model": {"name": str, "files": dict.fromkeys(("dit", "text_encoder", "vae"), FILE)},
    "means": dict.fromkeys(("cold", "warm", "startup", "first_step", "moved"), str),
    "rates": {"memory_bytes_s": float, "link_bytes_s": float, "file_bytes_s": float},
    "settings": {
        "steps": int,
        "repeat": int,
        "budget_bytes": Maybe(int),
        "max_ram_bytes": Maybe(int),
    },
    "sizes": [{"width": int, "height": int, "failure": Maybe(str)}],
}
NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def check(document: Any, where: str = "the document") -> None:
    """Whether `document` is one of this version; `where` names it in the error.

    Raises:
        FormatError: it is of another kind, a key is missing, or a value is of a wrong type.
    """
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise FormatError(
            f"{where}: schema is {schema!r:.80}; expected {SCHEMA!r}. Make it with zquant bench."
        )
    check_shape(document, DOCUMENT, where)
    for i, row in enumerate(document["sizes"]):
        if row["failure"] is None:
            check_shape(row, MEASURED, where, f"sizes[{i}]")


def check_shape(value: Any, shape: Any, where: str, path: str = "") -> None:
    """Whether `value`, which is at `path` in `where`, has that shape.

    Raises:
        FormatError: it has not; the message says where.
    """
    if isinstance(shape, Maybe):
        if value is not None:
            check_shape(value, shape.shape, where, path)
    elif isinstance(shape, list):
        _expect(isinstance(value, list), value, "a list", where, path)
        for i, each in enumerate(value):
            check_shape(each, shape[0], where, f"{path}[{i}]")
    elif isinstance(shape, Mapping):
        _expect(isinstance(value, dict), value, "an object", where, path)
        for key, inner in shape.items():
            at = f"{path}.{key}" if path else key
            if key not in value:
                raise FormatError(f"{where}: {at} is missing. Make it again with zquant bench.")
            check_shape(value[key], inner, where, at)
    else:
        _expect(_is_a(value, shape), value, NAMES[shape], where, path)


def _is_a(value: Any, kind: type) -> bool:
    """JSON's types: a bool is no number, a whole number is one, and every number is finite."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, kind)


def _expect(fits: object, value: Any, expected: str, where: str, path: str) -> None:
    if not fits:
        raise FormatError(
            f"{where}: {path or 'all of it'} is {value!r:.80}; expected {expected}. Make it again "
            f"with zquant bench."
        )
