"""A folder that one process at a time works in: whoever holds the lock of a file there.

The system lets go of a lock when its process dies, however that happens; the file may stay, and
means nothing. Its text is the id of the process that holds it.
"""

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from zquant.errors import ZQuantError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["take_lock", "unlock"]

_TRIES = 10  # each fails only if another process ends its work at that very moment
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # of file systems that keep nobody out
_LOCKED_BYTE = 2**30  # Windows hides locked bytes from other processes, so not those of the text


def take_lock(path: Path, remedy: str, prepare: Callable[[], None] = lambda: None) -> int:
    """A handle that holds the lock of the file at `path`, which is made.

    Args:
        path: a file in the folder to work in.
        remedy: what else to do than to wait, for the message.
        prepare: called before every try; makes the folder if others remove it.

    Raises:
        ZQuantError: another process holds it.
        OSError: the file cannot be made or locked.
    """
    for _ in range(_TRIES):
        prepare()
        # another process that ends its work removes the file: then once more
        with suppress(FileNotFoundError):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            try:
                if not _try_lock(handle):
                    raise ZQuantError(
                        f"{path.parent}: {_owner(handle)} works in this folder. Wait until it has "
                        f"ended, or {remedy}."
                    )
                if os.path.samestat(os.fstat(handle), path.stat()):
                    os.ftruncate(handle, 0)
                    os.lseek(handle, 0, os.SEEK_SET)
                    os.write(handle, b"%d\n" % os.getpid())
                    return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)
    raise ZQuantError(
        f"{path.parent}: other processes come and go in it. Wait until they have ended, "
        f"or {remedy}."
    )


def unlock(handle: int, path: Path) -> None:
    """Remove the lock, while we hold it where that is possible."""
    if sys.platform == "win32":
        os.close(handle)
    with suppress(OSError):
        path.unlink()
    if sys.platform != "win32":
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        if sys.platform == "win32":
            os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _owner(handle: int) -> str:
    """The process that holds the lock."""
    os.lseek(handle, 0, os.SEEK_SET)
    text = os.read(handle, 20).strip()
    return f"process {int(text)}" if text.isdigit() else "another process"
