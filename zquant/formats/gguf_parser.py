"""Walk through a GGUF header: prologue, metadata pairs, tensor entries.

Every length and count is checked before it is used, so that a hostile header costs neither
memory nor time. What the numbers mean for the file (offsets, sizes, types) is `gguf_file.py`'s
to check. String arrays are measured here and decoded when asked for: a tokenizer has 300,000
strings, and most readers want none of them.

Source: the GGUF specification of ggml, versions 2 and 3, little-endian.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

from zquant.errors import FormatError
from zquant.formats.source import ByteReader, quoted

__all__ = ["MAX_DIMS", "Entry", "Header", "StringArray"]

HEADER_LIMIT = 100_000_000  # bytes; a header with a large tokenizer has 10 MB
MAX_COUNT = 65536  # tensors, and pairs
MAX_NAME = 65536  # bytes of a key or tensor name
MAX_ELEMENTS = 2**22  # of all arrays together
MAX_DEPTH = 4  # arrays in arrays
MAX_DIMS = 4

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _BOOL = 8, 9, 7
_AGAIN = "The file is damaged; download it again."


class StringArray(Sequence[str]):
    """A GGUF array of strings, decoded at first use.

    Raises:
        FormatError: at first use, when a string is not UTF-8.
    """

    def __init__(self, file: str, packed: memoryview, count: int) -> None:
        self._file, self._packed, self._count = file, packed, count
        self._strings: list[str] | None = None

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if self._strings is None:
            self._strings = self._decoded()
        return self._strings[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self[:] == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"StringArray of {self._count}"

    def _decoded(self) -> list[str]:
        strings, at = [], 0
        for _ in range(self._count):
            begin = at + 8
            at = begin + _U64.unpack_from(self._packed, at)[0]
            strings.append(_decode(self._file, self._packed[begin:at]))
        return strings


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor as the header describes it, not yet checked against the file."""

    name: str
    dims: tuple[int, ...]
    type_id: int
    offset: int


class Header:
    """Reads forward through the header; asks the reader for more bytes as they are needed."""

    def __init__(self, reader: ByteReader) -> None:
        self.file = reader.name
        self.at = 0
        self._reader = reader
        self._limit = min(reader.size, HEADER_LIMIT)
        self._data = memoryview(b"")
        self._n_pairs = 0
        self._elements_left = MAX_ELEMENTS

    def prologue(self) -> int:
        """Magic, version and counts; returns the number of tensors."""
        self._need(4)
        magic = bytes(self._data[:4])
        if magic != b"GGUF":
            raise FormatError(f"{self.file}: starts with {magic!r}, expected b'GGUF'. {_AGAIN}")
        self.at = 4
        version = self._u32()
        if version not in (2, 3):
            if version in (2 << 24, 3 << 24):
                raise FormatError(
                    f"{self.file}: the GGUF file is big-endian; zquant reads little-endian. "
                    "Convert the original again: zquant convert"
                )
            raise FormatError(
                f"{self.file}: GGUF version {version}, expected 2 or 3. Convert the original "
                "again: zquant convert"
            )
        n_tensors = self._count("tensors", MAX_COUNT)
        self._n_pairs = self._count("metadata pairs", MAX_COUNT)
        return n_tensors

    def pairs(self) -> dict[str, Any]:
        """The metadata."""
        metadata: dict[str, Any] = {}
        for _ in range(self._n_pairs):
            key = self._text(MAX_NAME)
            if key in metadata:
                raise FormatError(
                    f"{self.file}: metadata key {quoted(key)} is there twice. {_AGAIN}"
                )
            metadata[key] = self._value(self._u32(), 1)
        return metadata

    def entries(self, n_tensors: int) -> list[Entry]:
        """The tensor descriptions, names unique."""
        entries: dict[str, Entry] = {}
        for _ in range(n_tensors):
            name = self._text(MAX_NAME)
            if name in entries:
                raise FormatError(f"{self.file}: tensor {quoted(name)} is there twice. {_AGAIN}")
            n_dims = self._u32()
            if not 1 <= n_dims <= MAX_DIMS:
                raise FormatError(
                    f"{self.file}: tensor {quoted(name)} has {n_dims} dimensions, expected 1 to "
                    f"{MAX_DIMS}. {_AGAIN}"
                )
            dims = tuple(self._u64() for _ in range(n_dims))
            entries[name] = Entry(name, dims, self._u32(), self._u64())
        return list(entries.values())

    def _value(self, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self._text(HEADER_LIMIT)
        if kind == _ARRAY:
            return self._array(depth)
        return self._scalars(kind, 1)[0]

    def _array(self, depth: int) -> list[Any] | StringArray:
        if depth > MAX_DEPTH:
            raise FormatError(
                f"{self.file}: arrays nested more than {MAX_DEPTH} deep in the metadata. {_AGAIN}"
            )
        kind = self._u32()
        count = self._count("array elements", self._elements_left)
        self._elements_left -= count
        if kind == _STRING:
            return self._strings(count)
        if kind == _ARRAY:
            return [self._array(depth + 1) for _ in range(count)]
        return self._scalars(kind, count)

    def _scalars(self, kind: int, count: int) -> list[Any]:
        if kind not in _CODES:
            raise FormatError(f"{self.file}: unknown metadata type {kind}. {_AGAIN}")
        numbers = struct.Struct(f"<{count}{_CODES[kind]}")
        begin = self._take(numbers.size)
        if kind == _BOOL and any(byte > 1 for byte in self._data[begin : self.at]):
            raise FormatError(f"{self.file}: a bool in the metadata is not 0 or 1. {_AGAIN}")
        return list(numbers.unpack_from(self._data, begin))

    def _strings(self, count: int) -> StringArray:
        """Walks over `count` strings; the loop is tight because vocabularies are long."""
        begin = at = self.at
        have, length = len(self._data), _U64.unpack_from
        for _ in range(count):
            if at + 8 > have:
                self.at = at
                self._need(8)
                have = len(self._data)
            at += 8 + length(self._data, at)[0]
        self.at = at
        self._need(0)
        return StringArray(self.file, self._data[begin:at], count)

    def _text(self, longest: int) -> str:
        length = self._u64()
        if length > longest:
            raise FormatError(
                f"{self.file}: a string of {length} bytes before byte {self.at}; expected at most "
                f"{longest}. {_AGAIN}"
            )
        begin = self._take(length)
        return _decode(self.file, self._data[begin : self.at])

    def _count(self, what: str, most: int) -> int:
        count = self._u64()
        if count > most:
            raise FormatError(
                f"{self.file}: {count} {what} claimed before byte {self.at}; expected at most "
                f"{most}. {_AGAIN}"
            )
        return count

    def _u32(self) -> int:
        return int(_U32.unpack_from(self._data, self._take(4))[0])

    def _u64(self) -> int:
        return int(_U64.unpack_from(self._data, self._take(8))[0])

    def _take(self, size: int) -> int:
        """Step over `size` bytes, which are then in `_data`; returns where they begin."""
        self._need(size)
        begin = self.at
        self.at += size
        return begin

    def _need(self, size: int) -> None:
        end = self.at + size
        if end > self._limit:
            raise FormatError(
                f"{self.file}: the header needs {end} bytes, but the file has {self._reader.size} "
                f"and {HEADER_LIMIT} are allowed. {_AGAIN}"
            )
        if end > len(self._data):
            # a reader of ranges fetches little for a small header, and each byte at most twice
            wanted = min(self._limit, max(end, 2 * len(self._data), 2**16))
            self._data = self._reader.read(0, wanted).data


def _decode(file: str, raw: memoryview) -> str:
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{file}: {bytes(raw[:40])!r} is not UTF-8. {_AGAIN}") from error
