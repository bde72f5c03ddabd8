"""What a job of many pictures has done so far, kept beside them so that a killed job can go on.

    OUT/.zquant-job/
        lock                held by the process that works here; its text is that process's id
        done.jsonl          ["<item id>", "<file name>"] for every picture that is complete
        <item id>.latents   .npy, float32 [C, H, W] | steps done, u32 | sha256 of the id and these

An item's id is a hash of everything that decides its picture, so changed settings make other items.
Files are replaced whole, except for done.jsonl, which grows: a line that was cut short counts for
nothing and spoils no other. Whatever is damaged or missing is work to be done again, never a wrong
picture. Names in these files are compared, never opened. Embeddings are not kept here.
"""

import errno
import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zquant.errors import FormatError, PlanError, ZQuantError
from zquant.formats.locked import take_lock, unlock
from zquant.formats.part_file import part_file
from zquant.formats.sealed import read_regular, seal, unseal

__all__ = ["JobFolder", "JobItem", "item_id"]

STATE_FOLDER = ".zquant-job"
DONE_FILE = "done.jsonl"
LOCK_FILE = "lock"
MAX_DONE_BYTES = 2**28
MAX_STEPS_DONE = 2**32 - 1
MAX_LATENTS_BYTES = 2**28  # four times those of 8192x8192

_ID = re.compile(r"[0-9a-f]{64}")
_DONE = re.compile(re.escape(DONE_FILE))
_LATENTS = re.compile(r"[0-9a-f]{64}\.latents")
_PART = re.compile(r"([0-9a-f]{64}\.latents|done\.jsonl)\.part")
_STEPS = struct.Struct("<I")


def item_id(recipe: Mapping[str, Any]) -> str:
    """Hex sha256 of everything that decides a picture, whatever the order of its keys.

    Raises:
        ValueError: a value is not JSON, or not finite.
    """
    try:
        # floats are written with as many digits as tell them from any other
        text = json.dumps(dict(recipe), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a recipe is made of JSON values ({error})") from error
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobItem:
    """One picture: `id` as made by `item_id`, `target` a file directly in the job's folder."""

    id: str
    target: Path

    def __post_init__(self) -> None:
        _check_id(self.id)


class JobFolder:
    """The state of one job; at most one process has it.

    Order of calls: `begin`, then per item `latents`, `save_latents` and `finish`, then `end`;
    `close` in any case.
    """

    def __init__(self, out: Path, *, resume: bool) -> None:
        """Take possession of `out`, which is made if its parent exists.

        Raises:
            ZQuantError: another process works there, an unfinished job is there without `resume`,
                or the folder cannot be used.
        """
        self.out = out
        self._folder = out / STATE_FOLDER
        self._items: dict[str, list[JobItem]] = {}  # by id
        self._lock: int | None = None
        if not out.absolute().parent.is_dir():
            raise ZQuantError(f"folder '{out.absolute().parent}' does not exist; create it first")
        try:
            out.mkdir(exist_ok=True)
            make = partial(_make, self._folder)
            self._lock = take_lock(self._folder / LOCK_FILE, "choose another --out", make)
            self._done = self._records()  # file name -> item id
            if not resume and (self._done or self._files(_LATENTS)):
                raise ZQuantError(
                    f"{self._folder}: an unfinished job is here ({len(self._done)} pictures done). "
                    f"Go on with --resume; to start anew, remove this folder or choose another "
                    f"--out."
                )
            self._remove(_PART)  # of a process that was killed
        except OSError as error:
            self.close()
            raise ZQuantError(
                f"{error.filename or self._folder}: cannot be used ({error.strerror or error}). "
                f"Choose another --out."
            ) from error
        except BaseException:
            self.close()
            raise

    def begin(self, items: Sequence[JobItem]) -> None:
        """Say what the job consists of; what an earlier run did of it counts.

        Raises:
            ValueError: a target is twice, or not in the folder.
            ZQuantError: the state cannot be written.
        """
        wanted = {item.target.name: item.id for item in items}
        parents = {item.target.parent for item in items}
        outside = [parent for parent in parents if parent.resolve() != self.out.resolve()]
        if outside or len(wanted) != len(items):
            what = f"one is in '{outside[0]}'" if outside else "one is there twice"
            raise ValueError(f"every target is a file of its own in '{self.out}'; {what}")
        self._items = {}
        for item in items:
            self._items.setdefault(item.id, []).append(item)
        # a picture that will be replaced by another is forgotten before, so that being killed
        # in between and going back to the old settings does not take one for the other
        self._done = {n: i for n, i in self._done.items() if wanted.get(n, i) == i}
        lines = b"".join(_line(name, id_) for name, id_ in self._done.items())
        self._replace(DONE_FILE, lines)

    def is_done(self, item: JobItem) -> bool:
        """Whether this job has written the item's picture, and it is still there."""
        return self._done.get(item.target.name) == item.id and item.target.is_file()

    def latents(self, item_id: str) -> tuple[int, Tensor] | None:
        """Steps done and float32 `[C, H, W]` as they were saved; None if none can be trusted."""
        path = self._folder / f"{_check_id(item_id)}.latents"
        try:
            data = read_regular(path, MAX_LATENTS_BYTES)
        except OSError:
            return None
        found = None if data is None else unseal(data, item_id, note_bytes=_STEPS.size)
        if found is None or found[0].ndim != 3:
            return None
        return _STEPS.unpack(found[1])[0], found[0]

    def save_latents(self, item_id: str, steps_done: int, latents: Tensor) -> None:
        """Keep float32 `[C, H, W]` after `steps_done` steps, in place of earlier ones.

        Raises:
            PlanError: the disk is full; the earlier ones stay.
            ZQuantError: they cannot be written for another reason.
            ValueError: an argument is not that.
        """
        _check_id(item_id)
        if latents.dtype != torch.float32 or latents.ndim != 3 or not latents.numel():
            raise ValueError(
                f"latents are float32 [C, H, W]; got {latents.dtype} {list(latents.shape)}"
            )
        if not 0 <= steps_done <= MAX_STEPS_DONE:
            raise ValueError(f"steps_done is {steps_done}; it is from 0 to {MAX_STEPS_DONE}")
        data = seal(latents, item_id, _STEPS.pack(steps_done))
        if len(data) > MAX_LATENTS_BYTES:
            raise ValueError(f"latents of {len(data)} bytes; at most {MAX_LATENTS_BYTES} are kept")
        self._replace(f"{item_id}.latents", data)

    def finish(self, item: JobItem) -> None:
        """The item's picture is complete: remember that, and forget its latents.

        Raises:
            ZQuantError: it cannot be written; the latents stay.
        """
        assert self._lock is not None
        name = item.target.name
        with _can_go_on():
            _append(self._folder / DONE_FILE, _line(name, item.id))
        self._done[name] = item.id
        # two prompts may be the same, and decide the same picture
        if all(self.is_done(other) for other in self._items.get(item.id, [])):
            with suppress(OSError):  # `end` tries again
                (self._folder / f"{item.id}.latents").unlink()

    def end(self) -> None:
        """Let go of the folder; if every item is done, without a trace of the job."""
        if self._lock is None:
            return
        if not all(self.is_done(item) for items in self._items.values() for item in items):
            self.close()
            return
        self._remove(_LATENTS)
        self._remove(_PART)
        self._remove(_DONE)  # last: without it the job would be done again
        lock, self._lock = self._lock, None
        unlock(lock, self._folder / LOCK_FILE)
        with suppress(OSError):  # somebody else's file is in it, or another process
            self._folder.rmdir()

    def close(self) -> None:
        """Let go of the folder; the job can be resumed."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _records(self) -> dict[str, str]:
        """What done.jsonl says; a later line replaces an earlier one about the same picture."""
        try:
            data = read_regular(self._folder / DONE_FILE, MAX_DONE_BYTES) or b""
        except FileNotFoundError:
            return {}
        done = {}
        for line in data.split(b"\n"):
            with suppress(ValueError, RecursionError):
                match json.loads(line):
                    case [str(id_), str(name)] if _ID.fullmatch(id_):
                        done[name] = id_
        return done

    def _files(self, pattern: re.Pattern[str]) -> list[Path]:
        return [path for path in self._folder.iterdir() if pattern.fullmatch(path.name)]

    def _remove(self, pattern: re.Pattern[str]) -> None:
        for path in self._files(pattern):
            with suppress(OSError):
                path.unlink()

    def _replace(self, name: str, data: bytes) -> None:
        assert self._lock is not None
        with _can_go_on(), part_file(self._folder / name) as file:
            file.write(data)


def _check_id(value: str) -> str:
    if not _ID.fullmatch(value):
        raise ValueError(f"item id {value!r:.80} is not one that item_id makes")
    return value


def _line(name: str, id_: str) -> bytes:
    # the line end comes first: it also ends a line that was cut short
    return b"\n" + json.dumps([id_, name]).encode()


@contextmanager
def _can_go_on() -> Iterator[None]:
    """An error inside also says that nothing is lost."""
    try:
        yield
    except ZQuantError as error:
        raise type(error)(f"{error} What is done is kept; go on with --resume.") from error


def _append(path: Path, data: bytes) -> None:
    try:
        with path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise PlanError(f"{path}: the disk is full. Free space.") from error
        raise FormatError(f"{path}: cannot be written ({error.strerror or error}).") from error


def _make(folder: Path) -> None:
    # not exist_ok, which fails if the folder is removed at that moment
    with suppress(FileExistsError):
        folder.mkdir()
    if folder.is_symlink() or folder.is_file():
        raise ZQuantError(f"{folder}: is a link or a file; expected a folder. Remove it.")
