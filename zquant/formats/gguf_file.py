"""Read GGUF strictly, for files from anywhere; lay out the header of a GGUF file to write.

    "GGUF" | u32 version | u64 tensor count | u64 pair count
    pairs:   string key, u32 type, value            (string = u64 length + UTF-8)
    tensors: string name, u32 n_dims, u64 dims, u32 type, u64 offset into the data
    zeros up to `general.alignment` | tensor data

Dims are reversed: a `[out, in]` weight has dims `[in, out]`; the data are the same. Every number
is checked against the file before it is used (`gguf_parser.py` walks through the header). Ranges
of tensors may come in any order but not overlap. Weights are not looked at.

Source: the GGUF specification of ggml, versions 2 and 3, little-endian.
"""

import struct
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from zquant.errors import FormatError
from zquant.formats.gguf_parser import MAX_DIMS, Entry, Header
from zquant.formats.remote import AnyPath
from zquant.formats.source import (
    READABLE,
    ByteReader,
    HeaderPlan,
    TensorInfo,
    WeightSource,
    open_file,
    quoted,
)
from zquant.quant.qtypes import UNSUPPORTED_IDS, QType, qtype_by_id
from zquant.units import format_bytes

__all__ = ["ALIGNMENT", "gguf_header", "open_gguf"]

ALIGNMENT = 32  # where the file does not say
MAX_ALIGNMENT = 2**20

_AGAIN = "The file is damaged; download it again."


def open_gguf(path: AnyPath) -> WeightSource:
    """One GGUF file, its header read and checked; tensors come in the order of their data.

    Raises:
        FormatError: the file is damaged, or a tensor has a type that zquant cannot read.
    """
    reader = open_file(path)
    header = Header(reader)
    n_tensors = header.prologue()
    metadata = header.pairs()
    alignment = _alignment(reader, metadata)
    entries = header.entries(n_tensors)
    start = -(-header.at // alignment) * alignment
    infos = [_tensor(reader, start, alignment, entry) for entry in entries]
    infos.sort(key=lambda info: info.offset)
    _check_layout(reader, infos)
    return WeightSource(
        path=path,
        container="gguf",
        tensors={info.name: info for info in infos},
        metadata=metadata,
        readers=(reader,),
    )


def _alignment(reader: ByteReader, metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", ALIGNMENT)
    if type(value) is not int or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise FormatError(
            f"{reader.name}: general.alignment is {quoted(value)}; expected a power of two from 8 "
            f"to {MAX_ALIGNMENT}. {_AGAIN}"
        )
    return value


def _tensor(reader: ByteReader, start: int, alignment: int, entry: Entry) -> TensorInfo:
    """One checked entry; that its bytes lie in the file is for `_check_layout`."""
    where = f"{reader.name}: tensor {quoted(entry.name)}"
    qtype = qtype_by_id(entry.type_id)
    if qtype is None:
        spelled = UNSUPPORTED_IDS.get(entry.type_id, f"of the unknown type {entry.type_id}")
        raise FormatError(
            f"{where} is {spelled}, which zquant cannot read. Readable: {READABLE}. Convert the "
            "original: zquant convert --qtype Q4_K_M"
        )
    if 0 in entry.dims or entry.dims[0] % qtype.qblock:
        raise FormatError(
            f"{where} has dims {list(entry.dims)}; expected no 0, and the first a multiple of "
            f"{qtype.qblock} for {qtype}. {_AGAIN}"
        )
    if entry.offset % alignment:
        raise FormatError(
            f"{where} begins at {entry.offset}; expected a multiple of {alignment}. {_AGAIN}"
        )
    return TensorInfo(
        name=entry.name,
        qtype=qtype,
        shape=entry.dims[::-1],
        reader=reader,
        offset=start + entry.offset,
        nbytes=qtype.row_bytes(entry.dims[0]) * prod(entry.dims[1:]),
    )


def _check_layout(reader: ByteReader, infos: Sequence[TensorInfo]) -> None:
    """Tensors, sorted by offset, lie in the file and do not overlap."""
    last = max(infos, key=lambda info: info.offset + info.nbytes, default=None)
    if last and last.offset + last.nbytes > reader.size:
        expected = last.offset + last.nbytes
        raise FormatError(
            f"{reader.name}: tensor {quoted(last.name)} ends at byte {expected} "
            f"({format_bytes(expected)}); the file has {reader.size} "
            f"({format_bytes(reader.size)}). The download may be incomplete; download it again."
        )
    for i, info in enumerate(infos[1:]):
        if info.offset < infos[i].offset + infos[i].nbytes:
            raise FormatError(
                f"{reader.name}: tensors {quoted(infos[i].name)} and {quoted(info.name)} overlap "
                f"at byte {info.offset}. {_AGAIN}"
            )


def gguf_header(
    architecture: str | None,
    metadata: Mapping[str, Any],
    tensors: Sequence[tuple[str, QType, tuple[int, ...]]],
) -> HeaderPlan:
    """Header of a GGUF file, version 3, and where each tensor goes.

    Args:
        architecture: `general.architecture`, e.g. "lumina2"; None for what is not a model.
        metadata: str, bool, int (as u32), float (as f32), a list of one of these (int as i32), or
            a one-dimensional NumPy array of u32, u64 or f32, which may be empty.
        tensors: (name, type, torch shape) in the order of the data.

    Returns:
        The header with its padding, absolute offsets, and the size of the whole file.

    Raises:
        ValueError: a value GGUF cannot hold, a name twice, a shape of no or of over 4 dimensions.
    """
    if "general.alignment" in metadata:
        raise ValueError(f"general.alignment is always {ALIGNMENT}; leave it out of the metadata")
    named = {} if architecture is None else {"general.architecture": architecture}
    pairs = {**named, **metadata}
    out = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(pairs))]
    out += [_packed_string(key) + _packed(key, value) for key, value in pairs.items()]
    relative, at = [], 0
    for name, qtype, shape in tensors:
        if not 1 <= len(shape) <= MAX_DIMS or 0 in shape:
            raise ValueError(
                f"{name!r} is {list(shape)}; GGUF holds 1 to {MAX_DIMS} dimensions > 0"
            )
        out.append(_packed_string(name))
        out.append(struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1]))
        out.append(struct.pack("<IQ", qtype.ggml_id, at))
        relative.append(at)
        at += _padded(qtype.row_bytes(shape[-1]) * prod(shape[:-1]))
    if len({name for name, _, _ in tensors}) != len(tensors):
        raise ValueError("a tensor name is there twice")
    header = b"".join(out)
    header += bytes(_padded(len(header)) - len(header))
    offsets = [len(header) + offset for offset in relative]
    return HeaderPlan(header, offsets, len(header) + at)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _packed_string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _packed(key: str, value: Any) -> bytes:
    """A typed metadata value."""
    if isinstance(value, np.ndarray):
        kind = {"uint32": 4, "float32": 6, "uint64": 10}[value.dtype.name]
        data = value.astype(value.dtype.newbyteorder("<")).tobytes()
        return struct.pack("<IIQ", 9, kind, len(value)) + data
    try:
        if isinstance(value, str) or not isinstance(value, Sequence):
            kind, code = {str: (8, ""), bool: (7, "?"), int: (4, "I"), float: (6, "f")}[type(value)]
            return struct.pack("<I", kind) + _packed_elements(code, [value])
        kind, code = {str: (8, ""), bool: (7, "?"), int: (5, "i"), float: (6, "f")}[type(value[0])]
        if any(type(element) is not type(value[0]) for element in value):
            raise KeyError("mixed")
        return struct.pack("<IIQ", 9, kind, len(value)) + _packed_elements(code, value)
    except (KeyError, IndexError, struct.error) as error:
        raise ValueError(f"metadata {key!r} cannot be stored as GGUF: {value!r:.80}") from error


def _packed_elements(code: str, values: Sequence[Any]) -> bytes:
    if not code:
        return b"".join(map(_packed_string, values))
    return struct.pack(f"<{len(values)}{code}", *values)
