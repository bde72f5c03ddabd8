"""A large file written piece by piece that survives any interruption.

Pieces go to `<path>.part`; `<path>.part.journal` gets a JSON line for each: its size, the running
sha256 of everything written so far, and a note of the caller's. The first line is a fingerprint of
the work, the last says that the file is whole. Resuming re-reads the part, keeps pieces for as long
as the sums agree, cuts the rest off and goes on, so a resumed file is byte-identical to one written
in one go, whether the process was stopped, killed or lost its power. The file takes its final name
only in `publish`.
"""

import errno
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from zquant.errors import PlanError, ZQuantError

__all__ = ["ResumableFile"]

READ_BYTES = 2**22
SEALED = "sealed"  # last line of the journal of a whole file


class ResumableFile:
    """One output file in the making.

    Attributes:
        notes: the caller's note of every piece that is already written, in order.
        size: bytes written.
        sha256: hex digest of the bytes written.
    """

    def __init__(self, path: Path, fingerprint: str, *, resume: bool) -> None:
        """Start anew, or after the last sound piece of an interrupted run with this fingerprint.

        Raises:
            PlanError: the disk is full.
            ZQuantError: the folder cannot be written, or the part belongs to other work.
        """
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.journal = path.with_name(path.name + ".part.journal")
        self.notes: list[Any] = []
        self.size = 0
        self._hash = hashlib.sha256()
        self._file: BinaryIO | None = None
        self._log: BinaryIO | None = None
        try:
            lines = _sound_lines(self.journal) if resume else []
            if lines:
                self._recover(fingerprint, lines)
            else:
                self._start(fingerprint)
        except OSError as error:
            self.close()
            raise _explained(self.part, error) from error

    @property
    def sha256(self) -> str:
        """Hex digest of the bytes written."""
        return self._hash.hexdigest()

    def append(self, data: Any, note: Any, *, last: bool = True) -> None:
        """Write bytes; with `last`, they end a piece and `note` (JSON) goes to the journal.

        Raises:
            PlanError: the disk is full; the part stays and can be resumed.
        """
        assert self._file is not None
        try:
            self._file.write(data)
            self._hash.update(data)
            self.size += len(data)
            if last:
                self._file.flush()
                self._write_line({"size": self.size, "sha256": self.sha256, "note": note})
                self.notes.append(note)
        except OSError as error:
            raise _explained(self.part, error) from error

    def seal(self) -> None:
        """Everything is written: force it to the disk."""
        if self._file is None or self._log is None:
            return  # an earlier run has sealed and published it
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._write_line(SEALED)
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

    def _start(self, fingerprint: str) -> None:
        # the journal first: killed after this line, nothing vouches for an older part
        self._log = self.journal.open("wb")
        self._file = self.part.open("wb")
        self._write_line(fingerprint)

    def _write_line(self, value: Any) -> None:
        assert self._log is not None
        self._log.write(json.dumps(value).encode() + b"\n")
        self._log.flush()

    def _recover(self, fingerprint: str, lines: list[tuple[Any, int]]) -> None:
        """Keep the longest sound beginning of an earlier run."""
        if lines[0][0] != fingerprint:
            raise ZQuantError(
                f"{self.part}: made from another source, with other options or by another version; "
                f"it cannot be resumed. Run without --resume to start over."
            )
        pieces = [(value, end) for value, end in lines[1:] if _is_piece(value)]
        if not self.part.exists() and lines[-1][0] == SEALED and self.path.exists():
            # killed between taking the final name and forgetting the journal: the work is done
            if self._verify(self.path, pieces) == len(pieces):
                return
            self._reset()
        self.part.touch()
        kept = self._verify(self.part, pieces)
        self._log = _cut(self.journal, pieces[kept - 1][1] if kept else lines[0][1])
        self._file = _cut(self.part, self.size)

    def _reset(self) -> None:
        self.notes, self.size, self._hash = [], 0, hashlib.sha256()

    def _verify(self, written: Path, pieces: list[tuple[Any, int]]) -> int:
        """How many pieces are in `written`; leaves notes, size and hash after the last of them."""
        with written.open("rb") as file:
            for piece, _ in pieces:
                running, left = self._hash.copy(), piece["size"] - self.size
                while left > 0 and (data := file.read(min(left, READ_BYTES))):
                    running.update(data)
                    left -= len(data)
                if left or running.hexdigest() != piece["sha256"]:
                    break
                self._hash, self.size = running, piece["size"]
                self.notes.append(piece["note"])
        return len(self.notes)


def _cut(path: Path, size: int) -> BinaryIO:
    """The file at `path` cut to `size` bytes, to be continued there."""
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file


def _is_piece(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and type(value.get("size")) is int
        and {"sha256", "note"} <= set(value)
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
