"""A large file written piece by piece that survives any interruption.

Pieces go to `<path>.part`; `<path>.part.journal` gets a JSON line for each: its size, the running
sha256 of everything written so far, and a note of the caller's. The first line is a fingerprint of
the work. Resuming re-reads the part, keeps pieces for as long as the sums agree, cuts the rest off
and goes on, so a resumed file is byte-identical to one written in one go, whether the process was
stopped, killed or lost its power. The file takes its final name only in `publish`.
"""

import errno
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from zquant.errors import PlanError, ZQuantError

__all__ = ["ResumableFile"]

READ_BYTES = 2**22


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
        self._log: TextIO | None = None
        try:
            if resume and self.journal.exists():
                self._recover(fingerprint)
            else:
                self._file = self.part.open("wb")
                self._log = self.journal.open("w", encoding="utf-8")
                self._write_line(fingerprint)
        except OSError as error:
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
        try:
            if self._file is not None:
                self._file.flush()
                os.fsync(self._file.fileno())
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
                file.close()
        self._file = self._log = None

    def _write_line(self, value: Any) -> None:
        assert self._log is not None
        self._log.write(json.dumps(value) + "\n")
        self._log.flush()

    def _recover(self, fingerprint: str) -> None:
        """Keep the longest sound beginning of an earlier run."""
        lines = _sound_lines(self.journal)
        if not lines or lines[0] != fingerprint:
            raise ZQuantError(
                f"{self.part}: made from another source, with other options or by another version; "
                f"it cannot be resumed. Run without --resume to start over."
            )
        # killed between taking the final name and forgetting the journal: the work is done
        written = self.part if self.part.exists() else self.path
        kept = self._verify(written, lines[1:]) if written.exists() else []
        with self.journal.open("w", encoding="utf-8") as log:
            log.writelines(json.dumps(line) + "\n" for line in [fingerprint, *kept])
        self.notes = [line["note"] for line in kept]
        if written is self.path and kept and self.size == written.stat().st_size:
            return  # nothing left to write; append is never called
        self._file = self.part.open("r+b" if self.part.exists() else "w+b")
        self._file.truncate(self.size)
        self._file.seek(self.size)
        self._log = self.journal.open("a", encoding="utf-8")

    def _verify(self, written: Path, lines: list[Any]) -> list[Any]:
        """Journal lines whose bytes are in `written`; leaves size and hash after the last one."""
        kept = []
        with written.open("rb") as file:
            for line in lines:
                running, left = self._hash.copy(), line["size"] - self.size
                while left > 0 and (data := file.read(min(left, READ_BYTES))):
                    running.update(data)
                    left -= len(data)
                if left or running.hexdigest() != line["sha256"]:
                    break
                self._hash, self.size = running, line["size"]
                kept.append(line)
        return kept


def _sound_lines(journal: Path) -> list[Any]:
    """Complete lines of a journal whose last line may be torn."""
    lines = []
    texts = journal.read_text(encoding="utf-8", errors="replace").split("\n")
    with suppress(ValueError):
        for text in texts:
            lines.append(json.loads(text))  # noqa: PERF401 # those before a torn line count
    return lines


def _explained(path: Path, error: OSError) -> ZQuantError:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return PlanError(
            f"{path}: the disk is full. Free some space and run again with --resume, "
            f"or choose another folder."
        )
    reason = error.strerror or str(error)
    return ZQuantError(f"{path}: cannot be written ({reason}). Choose a folder you may write to.")
