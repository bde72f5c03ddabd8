"""Read and write importance files ("imatrix"): how strongly each input of a matrix is driven.

    importance[k] = mean over tokens of x[k]^2 = squares[k] / count

GGUF, without an architecture: `general.type` "imatrix", `imatrix.datasets` (strings),
`imatrix.chunk_count` and `imatrix.chunk_size`; for every matrix `<name>.in_sum2` F32 `[1, K]`, the
squares, and `<name>.counts` F32 `[1, 1]`. Other tensors are passed over.

The older `.dat`, little-endian, read only: i32 number of matrices; for each i32 length and name,
i32 calls, i32 K, f32 `[K]` squares, whose count are the calls. Then, if at all, i32 chunks and
i32 length and name of the dataset.

A matrix that saw no token has no entry. Matrices of a mixture of experts are refused.

Source: llama.cpp `tools/imatrix` and `common/imatrix-loader`, as facts.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zquant.errors import FormatError
from zquant.formats.gguf_file import gguf_header, open_gguf
from zquant.formats.part_file import part_file
from zquant.formats.source import WeightSource, quoted
from zquant.quant.qtypes import QTYPES

__all__ = ["Imatrix", "InputSums", "read_imatrix", "write_imatrix"]

TYPE = "imatrix"
SQUARES, COUNTS = ".in_sum2", ".counts"
MAX_LEGACY_BYTES = 2**30  # one of a model of 70 G weights has 50 MB
MAX_NAME = 65536

_AGAIN = "The file is damaged; download it again, or make one with zquant calibrate."


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InputSums:
    """What a matrix was given: float64 sums `[K]` of squared inputs over `count` > 0 tokens."""

    squares: npt.NDArray[np.float64]
    count: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Imatrix:
    """Sums of many matrices by their name in a GGUF file, and what they were measured on.

    `n_chunks` runs of `chunk_size` tokens each; 0 where the file does not say.
    """

    entries: Mapping[str, InputSums]
    datasets: tuple[str, ...] = ()
    n_chunks: int = 0
    chunk_size: int = 0


def read_imatrix(path: Path) -> Imatrix:
    """One importance file of either form.

    Raises:
        FormatError: the file is damaged, or is something else.
    """
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
    except OSError as error:
        raise FormatError(
            f"{path}: cannot be opened ({error.strerror}). Check the path of the imatrix."
        ) from error
    found = _read_gguf(path) if is_gguf else _Legacy(path).read()
    if not found.entries:
        raise FormatError(f"{path}: has no matrices with data. Make one with zquant calibrate.")
    return found


def write_imatrix(path: Path, imatrix: Imatrix) -> None:
    """Write a GGUF; `path` appears when it is complete.

    Raises:
        ValueError: no dataset, or numbers that float32 cannot hold.
        FormatError: the file cannot be written.
    """
    names = sorted(imatrix.entries)
    numbers = []
    with np.errstate(over="ignore"):
        for name in names:
            sums = imatrix.entries[name]
            numbers += [sums.squares.astype("<f4"), np.array([sums.count], "<f4")]
            if not all(np.isfinite(each).all() for each in numbers[-2:]):
                raise ValueError(f"the sums of {name!r} are not finite in float32")
    f32 = QTYPES["F32"]
    listed = [
        (f"{name}{suffix}", f32, (1, len(values)))
        for (name, suffix), values in zip(
            ((name, suffix) for name in names for suffix in (SQUARES, COUNTS)), numbers, strict=True
        )
    ]
    pairs = {
        "general.type": TYPE,
        "imatrix.datasets": list(imatrix.datasets),
        "imatrix.chunk_count": imatrix.n_chunks,
        "imatrix.chunk_size": imatrix.chunk_size,
    }
    header = gguf_header(None, pairs, listed)
    with part_file(path) as file:
        file.write(header.header)
        for offset, values in zip(header.offsets, numbers, strict=True):
            file.write(bytes(offset - file.tell()))
            file.write(values.tobytes())
        file.write(bytes(header.total_size - file.tell()))


def _read_gguf(path: Path) -> Imatrix:
    source = open_gguf(path)
    try:
        kind = source.metadata.get("general.type")
        if kind != TYPE:
            raise FormatError(
                f"{path}: general.type is {quoted(kind)}; expected {TYPE!r}. It is not an "
                f"importance file; make one with zquant calibrate."
            )
        entries = {}
        for tensor in source.tensors:
            name = tensor.removesuffix(SQUARES).removesuffix(COUNTS)
            if name == tensor or name in entries:
                continue
            sums = _entry(source, name)
            if sums is not None:
                entries[name] = sums
        datasets = source.metadata.get("imatrix.datasets", [])
        return Imatrix(
            entries=entries,
            datasets=tuple(str(each) for each in datasets) if _is_list(datasets) else (),
            n_chunks=_number(source.metadata, "imatrix.chunk_count"),
            chunk_size=_number(source.metadata, "imatrix.chunk_size"),
        )
    finally:
        source.close()


def _entry(source: WeightSource, name: str) -> InputSums | None:
    """The sums of one matrix; None if it saw no token."""
    where = f"{source.path}: matrix {quoted(name)}"
    squares, counts = _numbers(source, name + SQUARES), _numbers(source, name + COUNTS)
    if len(squares) != 1 or counts.size != 1:
        raise FormatError(
            f"{where} has sums {list(squares.shape)} and {counts.size} counts; expected [1, K] and "
            f"one count. A mixture of experts is another model: take the imatrix of this one."
        )
    return _checked(where, squares[0], float(counts.flat[0]))


def _numbers(source: WeightSource, name: str) -> npt.NDArray[np.float64]:
    """A tensor of numbers as rows, `[n, K]`."""
    info = source.tensors.get(name)
    if info is None or info.qtype.name != "F32":
        found = f"is {info.qtype}" if info else "is not there"
        raise FormatError(f"{source.path}: {quoted(name)} {found}; expected F32 numbers. {_AGAIN}")
    return _float64(source.raw(name).view("<f4")).reshape(-1, info.shape[-1])


def _float64(stored: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # some NaN warn; all are refused
        return stored.astype(np.float64)


def _checked(where: str, squares: npt.NDArray[np.float64], count: float) -> InputSums | None:
    """The sums, if they can be; None without tokens."""
    if not (np.isfinite(count) and (count == 0 or count >= 1)):
        raise FormatError(f"{where} counts {count:.6g} tokens; expected 0, or 1 or more. {_AGAIN}")
    bad = np.flatnonzero(~(np.isfinite(squares) & (squares >= 0)))
    if len(bad):
        raise FormatError(
            f"{where}: the sum of squares of input {bad[0]} is {squares[bad[0]]}; expected finite "
            f"numbers from 0. {_AGAIN}"
        )
    return InputSums(squares=squares, count=count) if count else None


def _is_list(value: Any) -> bool:
    return not isinstance(value, str) and hasattr(value, "__len__")


def _number(metadata: Mapping[str, Any], key: str) -> int:
    value = metadata.get(key, 0)
    return value if type(value) is int and value >= 0 else 0


class _Legacy:
    """Walks through a `.dat` file; every length is checked before it is used."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0
        size = path.stat().st_size
        if size > MAX_LEGACY_BYTES:
            raise FormatError(
                f"{path}: is no GGUF, and with {size} bytes too large for an importance file; "
                f"expected one made by zquant calibrate or llama-imatrix."
            )
        self.data = path.read_bytes()

    def read(self) -> Imatrix:
        """The whole file."""
        entries: dict[str, InputSums] = {}
        for _ in range(self._count("matrices", len(self.data))):
            name = self._text()
            if name in entries:
                raise FormatError(f"{self.path}: matrix {quoted(name)} is there twice. {_AGAIN}")
            calls = self._i32()
            n = self._count(f"inputs of {quoted(name)}", (len(self.data) - self.at) // 4)
            values = _float64(np.frombuffer(self.data, "<f4", n, self._take(4 * n)))
            # without calls the numbers are means already
            sums = _checked(f"{self.path}: matrix {quoted(name)}", values, float(max(calls, 1)))
            assert sums is not None
            entries[name] = sums
        if self.at == len(self.data):
            return Imatrix(entries=entries)
        n_chunks = max(0, self._i32())
        datasets = (self._text(),) if self.at < len(self.data) else ()
        return Imatrix(entries=entries, datasets=tuple(filter(None, datasets)), n_chunks=n_chunks)

    def _count(self, what: str, most: int) -> int:
        count = self._i32()
        if not 1 <= count <= most:
            raise FormatError(
                f"{self.path}: {count} {what} claimed before byte {self.at}; expected 1 to {most}. "
                f"It is neither a GGUF nor an older imatrix file; make one with zquant calibrate."
            )
        return count

    def _text(self) -> str:
        length = self._i32()
        if not 0 <= length <= MAX_NAME:
            raise FormatError(
                f"{self.path}: a name of {length} bytes before byte {self.at}; expected at most "
                f"{MAX_NAME}. {_AGAIN}"
            )
        begin = self._take(length)
        try:
            return self.data[begin : self.at].decode()
        except UnicodeDecodeError as error:
            raw = self.data[begin : begin + 40]
            raise FormatError(f"{self.path}: name {raw!r} is not UTF-8. {_AGAIN}") from error

    def _i32(self) -> int:
        return int(struct.unpack_from("<i", self.data, self._take(4))[0])

    def _take(self, size: int) -> int:
        """Step over `size` bytes that are there; returns where they begin."""
        begin, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise FormatError(
                f"{self.path}: needs {self.at} bytes, but has {len(self.data)}. The download may "
                f"be incomplete; download it again, or make one with zquant calibrate."
            )
        return begin
