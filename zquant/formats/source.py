"""Named tensors in files, read lazily: headers first, bytes only when asked for.

A `WeightSource` knows every tensor's storage type, shape and place; `raw` hands out bytes without
copying when the file is local. Bytes come through a `ByteReader`: a `LocalFile`, or a `RemoteFile`
that reads ranges over HTTP (`remote_file.py`).
"""

import mmap
import os
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from zquant.errors import FormatError
from zquant.formats.remote import AnyPath
from zquant.quant.qtypes import QTYPES, QType

__all__ = [
    "READABLE",
    "ByteReader",
    "HeaderPlan",
    "LocalFile",
    "TensorInfo",
    "WeightSource",
    "open_file",
    "quoted",
]

Bytes = npt.NDArray[np.uint8]

READABLE = ", ".join(QTYPES)
# Windows promises memory for a whole copy-on-write view, written to or not: a file that is larger
# than free RAM and the paging file could not be opened
ACCESS = mmap.ACCESS_READ if os.name == "nt" else mmap.ACCESS_COPY
NOT_WRITABLE = "The given NumPy array is not writable"


def quoted(text: object) -> str:
    """`text` for a message: escaped, because files are not trusted, and cut to 80 characters."""
    full = str(text)
    return repr(full if len(full) <= 80 else full[:77] + "...")


class ByteReader(Protocol):
    """Random access to the bytes of one file, local or remote."""

    name: str
    size: int
    stamp: list[str | int]  # changes when the content does: name, size and time of change

    def read(self, offset: int, size: int) -> Bytes:
        """`size` bytes from `offset` as uint8 `[size]`; a view where the file is mapped."""

    def read_into(self, offset: int, out: Bytes) -> None:
        """Fill `out` from `offset`, leaving nothing else in memory: for data needed once."""

    def forget(self) -> None:
        """Drop what is held in memory; later reads fetch again."""

    def close(self) -> None:
        """Give the file back; views that were handed out stay valid."""


class LocalFile:
    """A file on disk, mapped. Nobody writes into views; on Windows they are read-only arrays.

    Elsewhere they are copy-on-write: torch takes them without a word, and the file stays.

    Raises:
        FormatError: the file cannot be opened or is empty.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = str(path)
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self._release = weakref.finalize(self, os.close, self._fd)
            status = os.fstat(self._fd)
            self.size = status.st_size
            self.stamp: list[str | int] = [Path(path).name, self.size, status.st_mtime_ns]
            if self.size == 0:
                raise FormatError(f"{self.name}: the file is empty. Download or convert it again.")
            self._map: mmap.mmap | None = mmap.mmap(self._fd, 0, access=ACCESS)
        except OSError as error:
            raise FormatError(f"{self.name}: cannot be opened ({error.strerror}).") from error
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        if not self._bytes.flags.writeable:
            # torch's tensors cannot be read-only, and it says so once; ours are only read
            warnings.filterwarnings("ignore", NOT_WRITABLE, UserWarning)

    def __reduce__(self) -> tuple[type["LocalFile"], tuple[str]]:
        """Another process gets the file by opening it."""
        return LocalFile, (self.name,)

    def read(self, offset: int, size: int) -> Bytes:
        """A view of `size` bytes from `offset`."""
        assert 0 <= offset <= offset + size <= self.size
        return self._bytes[offset : offset + size]

    def read_into(self, offset: int, out: Bytes) -> None:
        """Fill `out` without mapping pages, which costs several times the copy."""
        if not hasattr(os, "preadv"):
            out[:] = self.read(offset, len(out))
            return
        done = 0
        while done < len(out):
            n_read = os.preadv(self._fd, [out.data[done:]], offset + done)
            if n_read == 0:
                raise FormatError(
                    f"{self.name}: became shorter while it was read; expected {self.size} bytes. "
                    f"Let the download finish, then start again."
                )
            done += n_read

    def forget(self) -> None:
        """Drop the mapped pages from this process; the system may keep them cached."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of the mapping; it ends when the last view is gone."""
        self._bytes = np.empty(0, np.uint8)
        self._map = None
        self._release()


def open_file(path: AnyPath) -> ByteReader:
    """The bytes at `path`, wherever it is.

    Raises:
        FormatError: the file cannot be opened or is empty.
        ZQuantError: the server that has it does not give it.
    """
    return LocalFile(path) if isinstance(path, Path) else path.open_file()


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies and how it is stored.

    `shape` is in torch order (`[out, in]` for a linear weight); `offset` counts from the start of
    the reader's file; the data are row-major and contiguous. `scale` is the tensor that multiplies
    the decoded rows, one number or one per row; `rotation` is the size of the groups of columns
    that are stored rotated (`zquant.quant.scaled`), 0 for none.
    """

    name: str
    qtype: QType
    shape: tuple[int, ...]
    reader: ByteReader = field(repr=False, compare=False)
    offset: int
    nbytes: int
    scale: "TensorInfo | None" = None
    rotation: int = 0

    @property
    def n_weights(self) -> int:
        """Number of elements."""
        n = 1
        for dim in self.shape:
            n *= dim
        return n


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSource:
    """All tensors of one file or one sharded folder, in file order.

    `metadata` holds the file's key-value pairs (GGUF values, safetensors `__metadata__`).
    """

    path: AnyPath
    container: str  # "gguf" or "safetensors"
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Any]
    readers: tuple[ByteReader, ...]

    @property
    def n_bytes(self) -> int:
        """Stored bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def raw(self, name: str) -> Bytes:
        """Stored bytes of tensor `name`, uint8 `[nbytes]`."""
        info = self.tensors[name]
        return info.reader.read(info.offset, info.nbytes)

    def forget(self) -> None:
        """Drop mapped pages; see `ByteReader.forget`."""
        for reader in self.readers:
            reader.forget()

    def close(self) -> None:
        """Close every file; views that were handed out stay valid."""
        for reader in self.readers:
            reader.close()


@dataclass(frozen=True, slots=True)
class HeaderPlan:
    """Everything of a file to write but its tensor data.

    `offsets` count from the start of the file, one for each tensor; gaps before them and up to
    `total_size` are zeros.
    """

    header: bytes
    offsets: list[int]
    total_size: int
