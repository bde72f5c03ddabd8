"""Paths on a server: the part of `pathlib.Path` that reading a model needs.

A `RemotePath` is a file or folder of a `RemoteTree`, which knows its files from a listing, or finds
them by asking for names that models have. Nothing is kept on disk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from zquant.errors import FormatError
from zquant.formats.remote_file import RemoteFile
from zquant.formats.remote_http import Entry

__all__ = ["AnyPath", "RemotePath", "RemoteTree"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteTree:
    """Files below one address.

    Attributes:
        label: the address for people, without passwords.
        entries: path inside -> file, of those known to exist.
        opened: files that were read, by path inside.
        absent: paths that were asked for in vain.
        find: asks for a path that is not in `entries`; a listing is complete and never asks.
    """

    label: str
    entries: dict[str, Entry]
    opened: dict[str, RemoteFile] = field(default_factory=dict, repr=False)
    absent: set[str] = field(default_factory=set, repr=False)
    find: Callable[[str], RemoteFile | None] = lambda _: None

    def has(self, inside: str) -> bool:
        """Whether there is such a file."""
        if inside in self.entries or inside in self.opened:
            return True
        found = None if inside in self.absent else self.find(inside)
        if found is None:
            self.absent.add(inside)
            return False
        self.opened[inside] = found
        return True

    def open(self, inside: str) -> RemoteFile:
        """The file; opened once, so that its header is read once."""
        if not self.has(inside):
            raise FormatError(f"{self.label}: has no file {inside!r}. Check the address.")
        if inside not in self.opened:
            self.opened[inside] = RemoteFile(self.entries[inside])
        return self.opened[inside]

    def names(self) -> Iterator[str]:
        """Paths inside of the files that are known."""
        yield from sorted({**self.entries, **self.opened})


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A file or folder on a server; `inside` is "" for the tree's root. See `pathlib.Path`."""

    tree: RemoteTree = field(repr=False)
    inside: str

    def __str__(self) -> str:
        return f"{self.tree.label}/{self.inside}" if self.inside else self.tree.label

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.tree, f"{self.inside}/{name}" if self.inside else name)

    @property
    def name(self) -> str:
        """Last part."""
        return PurePosixPath(str(self)).name

    @property
    def stem(self) -> str:
        """Name without its last suffix."""
        return PurePosixPath(str(self)).stem

    @property
    def suffix(self) -> str:
        """Last suffix of the name, with its dot."""
        return PurePosixPath(str(self)).suffix

    @property
    def parent(self) -> "RemotePath":
        """The folder it is in."""
        return RemotePath(self.tree, self.inside.rpartition("/")[0])

    def with_name(self, name: str) -> "RemotePath":
        """A neighbour."""
        return self.parent / name

    def is_file(self) -> bool:
        """Whether it is a file; asks the server where there is no listing."""
        return bool(self.inside) and self.tree.has(self.inside)

    def is_dir(self) -> bool:
        """Whether a known file is below it."""
        start = f"{self.inside}/" if self.inside else ""
        return any(name.startswith(start) for name in self.tree.names())

    def exists(self) -> bool:
        """Whether it is either."""
        return self.is_dir() or self.is_file()

    def iterdir(self) -> Iterator["RemotePath"]:
        """What is known directly below it."""
        start = f"{self.inside}/" if self.inside else ""
        below = (name[len(start) :] for name in self.tree.names() if name.startswith(start))
        for name in dict.fromkeys(rest.partition("/")[0] for rest in below):
            yield self / name

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """What is known directly below it under such a name."""
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))

    def read_text(self, encoding: str = "utf-8") -> str:
        """All of a small file."""
        return self.open_file().whole().decode(encoding)

    def open_file(self) -> RemoteFile:
        """The file, to be read by ranges."""
        return self.tree.open(self.inside)


AnyPath: TypeAlias = Path | RemotePath
