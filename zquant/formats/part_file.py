"""Write a file so that it is either complete or absent.

Everything goes to `<path>.part`, is flushed to the disk, and only then takes its final name; a
failure removes the part. An existing file at `path` stays as it is until that moment.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from zquant.errors import FormatError, PlanError

__all__ = ["part_file"]


_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


@contextmanager
def part_file(path: Path) -> Iterator[BinaryIO]:
    """A new binary file that replaces `path` when the `with` block ends well.

    Raises:
        PlanError: the disk is full.
        FormatError: the file cannot be written for another reason.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        if error.errno in _FULL:
            raise PlanError(
                f"{part}: the disk is full. Free space or choose another folder."
            ) from error
        reason = error.strerror or error
        raise FormatError(
            f"{part}: cannot be written ({reason}). Choose another folder."
        ) from error
    finally:
        part.unlink(missing_ok=True)
