"""A large file written piece by piece that survives any interruption.

    header | piece | zeros | piece | ...

Pieces go to `<path>.part`; `<path>.part.journal` gets a JSON line for each: where it lies, its
crc32, and a note of the caller's. The first line is a fingerprint of the work, the last says that
the file is whole. Resuming re-reads the part, keeps pieces for as long as the checksums agree, cuts
the rest off and goes on, so a resumed file is byte-identical to one written in one go, whether the
process was stopped, killed or lost its power. The file takes its final name only in `publish`.

The header may say what is known at the end only: it is written at the start to hold the place, and
once more, as long, in `seal`.
"""

import errno
import hashlib
import json
import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from zquant.errors import PlanError, ZQuantError

__all__ = ["ResumableFile", "bytes_kept", "sha256_of"]

READ_BYTES = 2**18
SEALED = "sealed"  # last line of the journal of a whole file


class ResumableFile:
    """One output file in the making.

    Attributes:
        notes: the caller's note of every piece that is already written, in order.
        checksums: the crc32 of every piece.
        size: bytes written.
    """

    def __init__(self, path: Path, fingerprint: str, header: bytes, *, resume: bool) -> None:
        """Start anew, or after the last sound piece of an interrupted run with this fingerprint.

        Raises:
            PlanError: the disk is full.
            ZQuantError: the folder cannot be written, or the part belongs to other work.
        """
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.journal = path.with_name(path.name + ".part.journal")
        self.notes: list[Any] = []
        self.checksums: list[int] = []
        self.size = len(header)
        self._header = header
        self._start = len(header)  # of the piece being written
        self._crc32 = 0
        self._file: BinaryIO | None = None
        self._log: BinaryIO | None = None
        try:
            lines = _sound_lines(self.journal) if resume else []
            if lines:
                self._recover(fingerprint, lines)
            else:
                self._begin(fingerprint)
        except OSError as error:
            self.close()
            raise _explained(self.part, error) from error

    @property
    def written(self) -> Path:
        """Where the bytes are: the part, or the file when it has its name already."""
        return self.part if self.part.exists() else self.path

    def append(self, data: Any, note: Any, *, last: bool = True) -> None:
        """Write bytes; with `last`, they end a piece and `note` (JSON) goes to the journal.

        Raises:
            PlanError: the disk is full; the part stays and can be resumed.
        """
        assert self._file is not None
        try:
            self._file.write(data)
            self._crc32 = zlib.crc32(data, self._crc32)
            self.size += len(data)
            if last:
                self._file.flush()
                ends = {"start": self._start, "size": self.size, "crc32": self._crc32}
                self._write_line({**ends, "note": note})
                self._keep(self._crc32, note)
        except OSError as error:
            raise _explained(self.part, error) from error

    def pad(self, size: int) -> None:
        """Write zeros up to `size`, between pieces or at the end; they belong to no piece.

        Raises:
            PlanError: the disk is full; the part stays and can be resumed.
        """
        assert self._start == self.size <= size
        try:
            if self._file is not None:
                self._file.write(bytes(size - self.size))
        except OSError as error:
            raise _explained(self.part, error) from error
        self._start = self.size = size

    def seal(self, header: bytes) -> None:
        """Everything is written but the final header: write it and force all to the disk."""
        assert len(header) == len(self._header)
        if self._file is None or self._log is None:
            return  # an earlier run has sealed and published it
        try:
            self._file.seek(0)
            self._file.write(header)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._write_line({SEALED: hashlib.sha256(header).hexdigest()})
            os.fsync(self._log.fileno())
        except OSError as error:
            raise _explained(self.part, error) from error
        self.close()

    def publish(self) -> None:
        """Give the sealed file its final name, replacing what was there."""
        if self.part.exists():
            self.part.replace(self.path)

    def clean_up(self) -> None:
        """Forget how the file was made."""
        self.journal.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the files; the part and its journal stay."""
        for file in (self._file, self._log):
            if file is not None:
                # a full disk says so again; what is lost here was never in the journal
                with suppress(OSError):
                    file.close()
        self._file = self._log = None

    def _begin(self, fingerprint: str) -> None:
        # the journal first: killed after this line, nothing vouches for an older part
        self._log = self.journal.open("wb")
        self._file = self.part.open("wb")
        self._file.write(self._header)
        self._write_line(fingerprint)

    def _write_line(self, value: Any) -> None:
        assert self._log is not None
        self._log.write(json.dumps(value).encode() + b"\n")
        self._log.flush()

    def _keep(self, crc32: int, note: Any) -> None:
        """A piece ends here."""
        self.notes.append(note)
        self.checksums.append(crc32)
        self._start, self._crc32 = self.size, 0

    def _recover(self, fingerprint: str, lines: list[tuple[Any, int]]) -> None:
        """Keep the longest sound beginning of an earlier run."""
        if lines[0][0] != fingerprint:
            raise ZQuantError(
                f"{self.part}: made from another source, with other options or by another version; "
                f"it cannot be resumed. To start anew, remove it and {self.journal.name}."
            )
        pieces = [(value, end) for value, end in lines[1:] if _is_piece(value)]
        sealed = lines[-1][0].get(SEALED) if isinstance(lines[-1][0], dict) else None
        if not self.part.exists() and sealed and self.path.exists():
            # killed between taking the final name and forgetting the journal: the work is done
            if self._verify(self.path, pieces, sealed) == len(pieces):
                return
            self._reset()
        self.part.touch()
        kept = self._verify(self.part, pieces)
        self._log = _cut(self.journal, pieces[kept - 1][1] if kept else lines[0][1])
        self._file = _cut(self.part, self.size)
        self._file.seek(0)
        self._file.write(self._header)
        self._file.seek(self.size)

    def _reset(self) -> None:
        self.notes, self.checksums = [], []
        self._start = self.size = len(self._header)

    def _verify(self, written: Path, pieces: list[tuple[Any, int]], sealed: str = "") -> int:
        """How many pieces are in `written`; leaves notes and size after the last of them.

        With the checksum of a final header, that must be there too.
        """
        with written.open("rb") as file:
            header = file.read(len(self._header))
            if sealed and hashlib.sha256(header).hexdigest() != sealed:
                return 0
            file.seek(len(self._header))
            for piece, _ in pieces:
                n_zeros = piece["start"] - self.size
                if n_zeros < 0 or file.read(n_zeros) != bytes(n_zeros):
                    break
                crc32, left = 0, piece["size"] - piece["start"]
                while left > 0 and (data := file.read(min(left, READ_BYTES))):
                    crc32 = zlib.crc32(data, crc32)
                    left -= len(data)
                if left or crc32 != piece["crc32"]:
                    break
                self.size = piece["size"]
                self._keep(crc32, piece["note"])
        return len(self.notes)


def sha256_of(path: Path) -> str:
    """Hex digest of a file; a header that is written last is why this takes a pass of its own.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def bytes_kept(path: Path) -> int:
    """How much of the file at `path` an interrupted run has written, by its journal.

    0 where nothing could be resumed.
    """
    part = path.with_name(path.name + ".part")
    values = [value for value, _ in _sound_lines(part.with_name(part.name + ".journal"))]
    pieces = [value for value in values if _is_piece(value)]
    # a sealed file without a part has its name already
    is_published = bool(values) and isinstance(values[-1], dict) and SEALED in values[-1]
    written = path if is_published and not part.exists() else part
    if not pieces or not written.is_file():
        return 0
    return min(int(pieces[-1]["size"]), written.stat().st_size)


def _cut(path: Path, size: int) -> BinaryIO:
    """The file at `path` cut to `size` bytes, to be continued there."""
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file


def _is_piece(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(type(value.get(key)) is int for key in ("start", "size", "crc32"))
        and "note" in value
    )


def _sound_lines(journal: Path) -> list[tuple[Any, int]]:
    """Complete lines of a journal, whose last may be torn, each with where it ends."""
    if not journal.exists():
        return []
    lines, end = [], 0
    for text in journal.read_bytes().split(b"\n")[:-1]:
        try:
            value = json.loads(text)
        except ValueError:
            break
        end += len(text) + 1
        lines.append((value, end))
    return lines


def _explained(path: Path, error: OSError) -> ZQuantError:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return PlanError(
            f"{path}: the disk is full. Free some space and run again with --resume, "
            f"or choose another folder."
        )
    reason = error.strerror or str(error)
    return ZQuantError(f"{path}: cannot be written ({reason}). Choose a folder you may write to.")
