"""Read every byte of a file once: checksums, and weights that are no numbers.

A pool decodes what is read, so that a scale that is NaN or infinite shows in its weights; checksums
are made in the order of the file. A bounded number of pieces is in memory, whatever the file.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from zquant.convert.workers import run_in_order
from zquant.formats.source import ByteReader, TensorInfo, WeightSource, quoted
from zquant.quant.codec import dequantize

__all__ = ["Progress", "Scan", "scan"]

Progress = Callable[[str, int, int], None]  # what is read, bytes done, bytes in all

PIECE_WEIGHTS = 2**20  # a multiple of every qblock
PIECE_BYTES = 2**22  # of what is no tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What a whole file gave.

    `sha256` is of every file of the source, by name; `crc32` of the stored bytes of every tensor;
    `spoilt` says of a tensor which weight is no number.
    """

    sha256: dict[str, str]
    crc32: dict[str, int]
    spoilt: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of a file: of one tensor from byte `begin` of it on, or of none."""

    reader: ByteReader
    info: TensorInfo | None
    begin: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class _Read:
    """A piece's bytes, and where its first weight is that is no number."""

    data: npt.NDArray[np.uint8]
    spoilt: str


def scan(source: WeightSource, pool: Executor, window: int, progress: Progress) -> Scan:
    """Read all files of `source`.

    Args:
        source: a file or a sharded folder.
        pool: threads that read and decode.
        window: pieces that may be in memory.
        progress: is told the file, and its bytes.

    Raises:
        FormatError: a file became shorter.
    """
    found = Scan(sha256={}, crc32=dict.fromkeys(source.tensors, 0), spoilt={})
    for reader in source.readers:
        digest = hashlib.sha256()
        pieces = _pieces(reader, [i for i in source.tensors.values() if i.reader is reader])
        with closing(run_in_order(pool, _look, pieces, window)) as results:
            for piece, read in results:
                digest.update(read.data.data)
                if piece.info is not None:
                    name = piece.info.name
                    found.crc32[name] = zlib.crc32(read.data.data, found.crc32[name])
                    if read.spoilt:
                        found.spoilt.setdefault(name, read.spoilt)
                progress(reader.name, piece.offset + piece.size, reader.size)
        found.sha256[reader.name] = digest.hexdigest()
    return found


def _pieces(reader: ByteReader, infos: list[TensorInfo]) -> Iterator[_Piece]:
    """All bytes of a file in order: header, tensors, what is between them and after them."""
    at = 0
    for info in sorted(infos, key=lambda info: info.offset):
        yield from _gap(reader, at, info.offset)
        step = PIECE_WEIGHTS // info.qtype.qblock * info.qtype.qblock_bytes
        for begin in range(0, info.nbytes, step):
            size = min(step, info.nbytes - begin)
            yield _Piece(reader, info, begin, info.offset + begin, size)
        at = info.offset + info.nbytes
    yield from _gap(reader, at, reader.size)


def _gap(reader: ByteReader, start: int, stop: int) -> Iterator[_Piece]:
    for at in range(start, stop, PIECE_BYTES):
        yield _Piece(reader, None, 0, at, min(PIECE_BYTES, stop - at))


def _look(piece: _Piece) -> _Read:
    data = np.empty(piece.size, np.uint8)
    piece.reader.read_into(piece.offset, data)
    info = piece.info
    if info is None or not info.qtype.is_weight:
        return _Read(data, "")
    # qblocks do not cross rows, so each may be decoded as a row of its own
    rows = torch.from_numpy(data).view(-1, info.qtype.qblock_bytes)
    weights = dequantize(rows, info.qtype, torch.float32).view(-1)
    low, high = torch.aminmax(weights)
    if torch.isfinite(low) and torch.isfinite(high):
        return _Read(data, "")
    first = int(torch.nonzero(~torch.isfinite(weights))[0])
    at = piece.begin // info.qtype.qblock_bytes * info.qtype.qblock + first
    row, column = divmod(at, info.shape[-1] if info.shape else 1)
    value = weights[first].item()
    return _Read(data, f"{quoted(info.name)} holds {value} (row {row}, column {column})")
