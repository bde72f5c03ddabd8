"""Builders of small files, right and wrong; written from the format descriptions, not our code."""

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, elements: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + elements


def tensor(name: str | bytes, dims: Sequence[int], type_id: int = 0, offset: int = 0) -> bytes:
    packed = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return string(name) + packed + struct.pack("<IQ", type_id, offset)


def gguf_bytes(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    **fields: Any,
) -> bytes:
    head = fields.get("magic", b"GGUF") + struct.pack(
        "<IQQ",
        fields.get("version", 3),
        fields.get("n_tensors", len(tensors)),
        fields.get("n_pairs", len(pairs)),
    )
    head += b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % fields.get("alignment", 32)) + data


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture(scope="session")
def build() -> SimpleNamespace:
    """The functions of this file, which tests cannot import."""
    return SimpleNamespace(
        array=array,
        entry=entry,
        gguf=gguf_bytes,
        pair=pair,
        safetensors=safetensors_bytes,
        string=string,
        tensor=tensor,
    )


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes], Path]:
    """Writes bytes under a name (folders allowed) below `tmp_path`."""

    def write(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    return write
