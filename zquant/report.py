"""What is in a picture, a weights file or a model folder, as text or as JSON.

`describe` gives one JSON document with a `kind`:

    picture  path, recipe
    weights  path, container, components, producer, variant, notes, n_tensors, n_weights, n_bytes,
             bpw, qtypes, metadata, tensors
    model    path, model (what the folder says of itself), parts (weights without their tensors)

Only headers are read. Long arrays are cut to their first values, in JSON too: a tokenizer inside a
GGUF file is no summary. Text from files is printed with control characters escaped.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zquant.errors import FormatError
from zquant.formats.detect import open_source
from zquant.formats.model_folder import MANIFEST, find_model, model_folder
from zquant.formats.producer import identify
from zquant.formats.source import TensorInfo, WeightSource
from zquant.image import read_recipe
from zquant.units import format_bytes, format_count

__all__ = ["as_text", "describe"]

_PNG_START = b"\x89PNG"
_TOTALS = ("tensors", "weights", "size", "bpw")
_MAX_ARRAY = 8
_MAX_TEXT = 100


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of `path` as a JSON document; its `kind` is in the module's docstring.

    The text "demo" is the model inside zquant.

    Raises:
        FormatError: the file is damaged or of a kind that zquant does not read.
        CheckpointError: a model folder that lacks a part.
    """
    path = model_folder(path if isinstance(path, str) else Path(path))
    if not path.exists():
        raise FormatError(f"{path}: there is no such file or folder.")
    if (path / MANIFEST).is_file() or (path / "transformer").is_dir():
        return _describe_model(path)
    if path.is_file():
        with path.open("rb") as file:
            is_png = file.read(len(_PNG_START)) == _PNG_START
        if is_png:
            return {"kind": "picture", "path": str(path), "recipe": read_recipe(path)}
    return _describe_weights(path)


def as_text(document: Mapping[str, Any]) -> str:
    """What `describe` gave, as aligned text for a terminal."""
    lines = [f"{document['kind']}  {_clean(document['path'])}"]
    if document["kind"] == "picture":
        lines += _pairs(document["recipe"])
    elif document["kind"] == "model":
        lines += _pairs(document["model"])
        lines += ["", *_part_lines(document["parts"])]
    else:
        lines += _weights_lines(document)
    return "\n".join(lines)


def _describe_model(folder: Path) -> dict[str, Any]:
    """A converted or official folder: what it says of itself, and its three parts."""
    files = find_model(folder)
    paths = {"dit": files.dit, "text_encoder": files.text_encoder, "vae": files.vae}
    said = files.manifest or {**asdict(files.variant), "variant": files.variant.name}
    return {
        "kind": "model",
        "path": str(folder),
        "model": {
            key: said[key] for key in said if key not in ("name", "files", "tensors", "hint")
        },
        "parts": {name: _describe_weights(p, with_contents=False) for name, p in paths.items()},
    }


def _describe_weights(path: Path, *, with_contents: bool = True) -> dict[str, Any]:
    source = open_source(path)
    try:
        return _weights_document(source, path, with_contents=with_contents)
    finally:
        source.close()


def _weights_document(source: WeightSource, path: Path, *, with_contents: bool) -> dict[str, Any]:
    infos = list(source.tensors.values())
    document: dict[str, Any] = {
        "kind": "weights",
        "path": str(path),
        "container": source.container,
        **asdict(identify(source)),
        **_totals(infos),
        "qtypes": _per_qtype(infos),
    }
    if with_contents:
        document["metadata"] = {key: _short(value) for key, value in source.metadata.items()}
        document["tensors"] = [
            {"name": i.name, "qtype": i.qtype.name, "shape": list(i.shape), "n_bytes": i.nbytes}
            for i in infos
        ]
    return document


def _totals(infos: Iterable[TensorInfo]) -> dict[str, Any]:
    """Counts over some tensors; bpw is 0 for none."""
    infos = list(infos)
    n_weights = sum(i.n_weights for i in infos)
    n_bytes = sum(i.nbytes for i in infos)
    bpw = round(8 * n_bytes / n_weights, 4) if n_weights else 0.0
    return {"n_tensors": len(infos), "n_weights": n_weights, "n_bytes": n_bytes, "bpw": bpw}


def _per_qtype(infos: Sequence[TensorInfo]) -> list[dict[str, Any]]:
    """One row per storage type, the one with most bytes first."""
    names = dict.fromkeys(i.qtype.name for i in infos)
    rows = [{"qtype": n, **_totals(i for i in infos if i.qtype.name == n)} for n in names]
    return sorted(rows, key=lambda row: -row["n_bytes"])


def _short(value: Any) -> Any:
    """A metadata value as JSON, long arrays cut."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if hasattr(value, "tolist"):  # numpy scalars and arrays; cut first, they may be huge
        value = value.tolist() if value.ndim == 0 or len(value) <= _MAX_ARRAY else value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no nan and no inf
    if isinstance(value, str | int | float) or value is None:
        return value
    if len(value) > _MAX_ARRAY:
        return {"length": len(value), "first": [_short(item) for item in value[:_MAX_ARRAY]]}
    return [_short(item) for item in value]


def _weights_lines(document: Mapping[str, Any]) -> list[str]:
    totals = {**document, "qtype": "total"}
    qtypes = [[row["qtype"], *_shown_totals(row)] for row in (*document["qtypes"], totals)]
    tensors = [
        [_clean(t["name"]), t["qtype"], _shown_shape(t["shape"]), format_bytes(t["n_bytes"])]
        for t in document["tensors"]
    ]
    return [
        *_pairs({"container": document["container"], **_identity(document)}),
        *[f"  note: {_clean(note)}" for note in document["notes"]],
        *(["", *_pairs(document["metadata"])] if document["metadata"] else []),
        "",
        *_table(("qtype", *_TOTALS), qtypes, n_left=1),
        "",
        *_table(("tensor", "qtype", "shape", "size"), tensors, n_left=3),
    ]


def _identity(document: Mapping[str, Any]) -> dict[str, str]:
    """What the file is, in words."""
    holds = ", ".join(document["components"]) or "no part of a Z-Image model"
    shown = {"holds": holds, "producer": document["producer"]}
    return shown | ({"variant": document["variant"]} if document["variant"] else {})


def _part_lines(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = [
        [name, _clean(Path(part["path"]).name), _shown_qtypes(part), *_shown_totals(part)]
        for name, part in parts.items()
    ]
    producers = {name: part["producer"] for name, part in parts.items()}
    notes = [f"  note: {_clean(note)}" for part in parts.values() for note in part["notes"]]
    table = _table(("part", "file", "qtypes", *_TOTALS), rows, n_left=3)
    return [*table, "", "producers", *_pairs(producers), *notes]


def _shown_totals(row: Mapping[str, Any]) -> list[str]:
    """The columns `_TOTALS` of something counted by `_totals`."""
    weights, size = format_count(row["n_weights"]), format_bytes(row["n_bytes"])
    return [str(row["n_tensors"]), weights, size, f"{row['bpw']:.2f}"]


def _shown_qtypes(part: Mapping[str, Any]) -> str:
    return "+".join(row["qtype"] for row in part["qtypes"])


def _shown_shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, n_left: int) -> list[str]:
    """Aligned lines; the first `n_left` columns flush left, the others flush right."""
    cells = [head, *rows]
    widths = [max(len(row[at]) for row in cells) for at in range(len(head))]
    return [
        "  ".join(
            text.ljust(widths[at]) if at < n_left else text.rjust(widths[at])
            for at, text in enumerate(row)
        ).rstrip()
        for row in cells
    ]


def _pairs(values: Mapping[str, Any]) -> list[str]:
    """One aligned line per key."""
    keys = {key: _clean(key) for key in values}
    width = max(map(len, keys.values()), default=0)
    return [f"  {keys[key].ljust(width)}  {_shown(values[key])}" for key in values]


def _shown(value: Any) -> str:
    """A value on one line of bounded length."""
    if isinstance(value, dict) and set(value) == {"length", "first"}:
        text = f"{value['length']} values: {json.dumps(value['first'], ensure_ascii=False)}"
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = _clean(text)
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}… ({len(text)} characters)"


def _clean(text: str) -> str:
    """`text` with control characters escaped: a file must not steer the terminal."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
