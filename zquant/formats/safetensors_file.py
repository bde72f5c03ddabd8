"""Read safetensors, one file or a sharded folder, strictly; lay out a file to write.

    u64 header length | JSON header, padded with spaces | tensor data without holes
    {"__metadata__": {key: text}, name: {"dtype", "shape", "data_offsets": [begin, end]}}

Reading looks at the header only and checks every number in it against the file before use.
Weights may be F32, F16, BF16, or 8-bit numbers, whose scales `scales.py` finds. Tensors of other
dtypes (counters, tokenizers, packed 4-bit weights) are listed: whether one is in the way depends on
its name, which is `names.py`'s to judge.

Source: the safetensors format description; `model.safetensors.index.json` of transformers.
"""

import json
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from zquant.errors import FormatError
from zquant.formats.remote import AnyPath
from zquant.formats.source import (
    ByteReader,
    HeaderPlan,
    TensorInfo,
    WeightSource,
    open_file,
    quoted,
)
from zquant.quant.qtypes import EIGHT_BIT, QTYPES, QType
from zquant.units import format_bytes

__all__ = ["READABLE_FLOATS", "open_safetensors", "open_sharded", "safetensors_header"]

HEADER_LIMIT = 100_000_000  # bytes, fixed by the format
MAX_DIMS = 8

_FLOATS = {name: QTYPES[name] for name in ("F32", "F16", "BF16")}
_BYTES = {"BOOL": 1, "U8": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4}
_BYTES |= {"I64": 8, "U64": 8, "F64": 8, "C64": 8}  # per number, of what is no weight
_DTYPES = _FLOATS | EIGHT_BIT | {name: QType(name, -1, 1, n) for name, n in _BYTES.items()}
READABLE_FLOATS = ", ".join((*_FLOATS, *EIGHT_BIT))

_AGAIN = "Download it again."
_MIXED = "Index and shards are of different downloads; download all of them again."


def open_safetensors(path: AnyPath) -> WeightSource:
    """One safetensors file, its header read and checked.

    Raises:
        FormatError: the file is damaged, or a tensor has a dtype that zquant cannot read.
    """
    return _open_reader(open_file(path), path)


def open_sharded(path: str | AnyPath) -> WeightSource:
    """All shards of a `*.safetensors.index.json`, as one source.

    Args:
        path: the index, or a folder that holds exactly one.

    Raises:
        FormatError: the index or a shard is damaged, missing or outside the folder, or they
            disagree about which tensor is where.
    """
    where = Path(path) if isinstance(path, str) else path
    index = _index_in(where) if where.is_dir() else where
    weight_map = _weight_map(index)
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        raise FormatError(
            f"{index}: {len(absent)} of {len(shards)} shards missing (first: {quoted(absent[0])}). "
            "Download the missing files into the same folder."
        )
    for shard in shards:
        _check_inside(index, shard)
    opened = {shard: open_safetensors(index.parent / shard) for shard in shards}
    _check_shards(index, weight_map, opened)
    return WeightSource(
        path=index.parent,
        container="safetensors",
        tensors={name: info for source in opened.values() for name, info in source.tensors.items()},
        metadata={k: v for source in opened.values() for k, v in source.metadata.items()},
        readers=tuple(reader for source in opened.values() for reader in source.readers),
    )


def safetensors_header(
    tensors: Sequence[tuple[str, QType, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> HeaderPlan:
    """Header of a safetensors file, and where each tensor goes.

    Args:
        tensors: (name, F32, F16 or BF16, shape) in the order of the data.
        metadata: text for `__metadata__`.

    Raises:
        ValueError: a type that safetensors does not have, or a name twice.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begins, end = [], 0
    for name, qtype, shape in tensors:
        if qtype.name not in _FLOATS or name in header:
            raise ValueError(
                f"{name!r} as {qtype} cannot be written: expected {list(_FLOATS)}, once"
            )
        begin, end = end, end + prod(shape) * qtype.qblock_bytes
        header[name] = {"dtype": qtype.name, "shape": list(shape), "data_offsets": [begin, end]}
        begins.append(begin)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    packed = struct.pack("<Q", len(text)) + text
    return HeaderPlan(packed, [len(packed) + begin for begin in begins], len(packed) + end)


def _open_reader(reader: ByteReader, path: AnyPath) -> WeightSource:
    header, start = _header(reader)
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(v) is str for v in metadata.values()):
        raise FormatError(f"{reader.name}: '__metadata__' is not a map of text to text. {_AGAIN}")
    infos = [_tensor(reader, start, name, entry) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    _check_layout(reader, start, infos)
    return WeightSource(
        path=path,
        container="safetensors",
        tensors={info.name: info for info in infos},
        metadata=metadata,
        readers=(reader,),
    )


def _header(reader: ByteReader) -> tuple[dict[str, Any], int]:
    """The parsed header and where the data start."""
    if reader.size < 8:
        raise FormatError(
            f"{reader.name}: {reader.size} bytes are too few for safetensors, expected at least 8. "
            + _AGAIN
        )
    n_bytes = int.from_bytes(reader.read(0, 8).tobytes(), "little")
    if n_bytes > HEADER_LIMIT:
        raise FormatError(
            f"{reader.name}: the header claims {n_bytes} bytes; {HEADER_LIMIT} are allowed. This "
            f"is not a safetensors file, or it is damaged. {_AGAIN}"
        )
    if 8 + n_bytes > reader.size:
        raise FormatError(
            f"{reader.name}: the header claims {n_bytes} bytes; {reader.size - 8} bytes follow. "
            f"The file is cut off or damaged. {_AGAIN}"
        )
    return _json_object(reader.name, reader.read(8, n_bytes).tobytes()), 8 + n_bytes


def _json_object(file: str, data: bytes) -> dict[str, Any]:
    """`data` as a JSON object: UTF-8, no key twice, no NaN."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise FormatError(f"{file}: {quoted(twice)} appears twice in the JSON. {_AGAIN}")
        "".join(result).encode()  # a lone surrogate in a name is not text
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        parsed = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]
        raise FormatError(f"{file}: the JSON cannot be read ({reason}). {_AGAIN}") from error
    if type(parsed) is not dict:
        raise FormatError(f"{file}: the JSON is no object but {type(parsed).__name__}. {_AGAIN}")
    return parsed


def _tensor(reader: ByteReader, start: int, name: str, entry: object) -> TensorInfo:
    """One checked header entry; that its bytes lie in the file is for `_check_layout`."""
    where = f"{reader.name}: tensor {quoted(name)}"
    if type(entry) is not dict or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise FormatError(f"{where} lacks dtype, shape or data_offsets. {_AGAIN}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in _DTYPES:
        raise FormatError(
            f"{where} is {quoted(dtype)}, which zquant cannot read. Readable: {READABLE_FLOATS}. "
            "Use the original bfloat16 or float32 weights, or a GGUF file."
        )
    if not _is_counts(shape) or len(shape) > MAX_DIMS:
        raise FormatError(f"{where} has the shape {_cut(shape)}; expected counts. {_AGAIN}")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(
            f"{where} has the data_offsets {_cut(offsets)}; expected [begin, end]. {_AGAIN}"
        )
    qtype = _DTYPES[dtype]
    nbytes = prod(shape) * qtype.qblock_bytes
    if nbytes != offsets[1] - offsets[0]:
        raise FormatError(
            f"{where} holds {_big(offsets[1] - offsets[0])} bytes; {dtype} {_cut(shape)} needs "
            f"{_big(nbytes)}. {_AGAIN}"
        )
    return TensorInfo(
        name=name,
        qtype=qtype,
        shape=tuple(shape),
        reader=reader,
        offset=start + offsets[0],
        nbytes=nbytes,
    )


def _is_counts(value: object) -> bool:
    """Whether `value` is a list of integers >= 0; a bool is no integer here."""
    return type(value) is list and all(type(v) is int and v >= 0 for v in value)


def _cut(value: object) -> str:
    return repr(value)[:80]


def _big(number: int) -> str:
    """An integer from a hostile file: Python refuses to print thousands of digits."""
    return str(number) if number < 2**64 else "more than 2^64"


def _check_layout(reader: ByteReader, start: int, infos: Sequence[TensorInfo]) -> None:
    """Tensors lie one after the other, from the header to the end of the file."""
    end = max((info.offset + info.nbytes for info in infos), default=start)
    if end > reader.size:
        raise FormatError(
            f"{reader.name}: the file is cut off: expected {_size(end)}, found "
            f"{_size(reader.size)}. {_AGAIN}"
        )
    at = start
    for info in infos:
        if info.offset != at:
            what = "overlaps the tensor before it" if info.offset < at else "follows a hole"
            raise FormatError(
                f"{reader.name}: tensor {quoted(info.name)} begins at {info.offset - start} and "
                f"{what}; expected {at - start}. {_AGAIN}"
            )
        at += info.nbytes
    if at != reader.size:
        raise FormatError(
            f"{reader.name}: {reader.size - at} bytes follow the last tensor; expected "
            f"{_size(at)}, found {_size(reader.size)}. {_AGAIN}"
        )


def _size(n_bytes: int) -> str:
    if n_bytes >= 2**64:
        return _big(n_bytes)
    return f"{format_bytes(n_bytes)} ({n_bytes} bytes)"


def _index_in(folder: AnyPath) -> AnyPath:
    found: list[AnyPath] = sorted([*folder.glob("*.safetensors.index.json")], key=str)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FormatError(
            f"{folder}: expected one *.safetensors.index.json, found {names}. Give the "
            "index itself."
        )
    return found[0]


def _weight_map(index: AnyPath) -> dict[str, str]:
    """Tensor name -> shard file name, every file name checked to be a plain one."""
    reader = open_file(index)
    if reader.size > HEADER_LIMIT:
        raise FormatError(f"{index}: {_size(reader.size)} are too many for an index. {_AGAIN}")
    weight_map = _json_object(reader.name, reader.read(0, reader.size).tobytes()).get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise FormatError(f"{index}: 'weight_map' is missing or empty. {_AGAIN}")
    for name, shard in weight_map.items():
        if type(shard) is not str or not _is_plain(shard):
            raise FormatError(
                f"{index}: tensor {quoted(name)} is said to be in {quoted(shard)}; expected the "
                f"name of a file in the same folder. {_AGAIN}"
            )
    return weight_map


def _is_plain(name: str) -> bool:
    """Whether `name` is a file name and nothing else, on Linux and on Windows."""
    forbidden = not name.isprintable() or name in ("", ".", "..") or len(name) > 255
    return not forbidden and PurePosixPath(name).name == name == PureWindowsPath(name).name


def _check_inside(index: AnyPath, shard: str) -> None:
    """Refuse a link that leaves the folder, unless into the Hugging Face cache's own blobs."""
    if not isinstance(index, Path):
        return  # a server has no links that we could see
    folder = index.parent.resolve()
    target = (index.parent / shard).resolve()
    allowed = [folder]
    if "snapshots" in folder.parts:
        at = len(folder.parts) - 1 - folder.parts[::-1].index("snapshots")
        allowed.append(Path(*folder.parts[:at]) / "blobs")
    if target.parent not in allowed:
        raise FormatError(
            f"{index}: shard {quoted(shard)} is a link out of the folder, to {target}. Copy the "
            "file into the folder."
        )


def _check_shards(
    index: AnyPath, weight_map: Mapping[str, str], opened: Mapping[str, WeightSource]
) -> None:
    """Index and shards name the same tensors, each in the same shard."""
    for shard, source in opened.items():
        for name in source.tensors:
            if weight_map.get(name) != shard:
                raise FormatError(
                    f"{index}: tensor {quoted(name)} is in {shard}, but the index says "
                    f"{quoted(weight_map.get(name, 'nothing'))}. {_MIXED}"
                )
    absent = [
        (name, shard) for name, shard in weight_map.items() if name not in opened[shard].tensors
    ]
    if absent:
        name, shard = absent[0]
        raise FormatError(
            f"{index}: {len(absent)} of {len(weight_map)} tensors missing (first: {quoted(name)} "
            f"in {shard}). {_MIXED}"
        )
