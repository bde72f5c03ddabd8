"""Arrays in files that are trusted only if not a bit has changed: .npy, and a checksum after it."""

import hashlib
import math
import stat
from io import BytesIO
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

__all__ = ["read_regular", "seal", "unseal"]

_DIGEST_BYTES = 32


def seal(array: Tensor, label: str, note: bytes = b"") -> bytes:
    """An array as the bytes of a file that `unseal` can trust.

        .npy | note | sha256 of the label and of all bytes before

    Args:
        array: float32, any shape, any device.
        label: what the array belongs to; not written.
        note: a few bytes of the caller's.
    """
    file = BytesIO()
    np.save(file, array.detach().cpu().contiguous().numpy().astype("<f4", copy=False))
    data = file.getvalue() + note
    return data + _digest(data, label)


def unseal(data: bytes, label: str, *, note_bytes: int = 0) -> tuple[Tensor, bytes] | None:
    """What `seal` was given for this label: a float32 array and a note; None if a bit differs."""
    end = len(data) - _DIGEST_BYTES
    if end < note_bytes or data[end:] != _digest(memoryview(data)[:end], label):
        return None
    file = BytesIO(data)
    try:
        npy.read_magic(file)
        shape, in_columns, dtype = npy.read_array_header_1_0(file)
    except (ValueError, EOFError, SyntaxError, TokenError):
        return None
    start, stop = file.tell(), end - note_bytes
    if dtype != np.dtype("<f4") or in_columns or min(shape, default=1) < 1:
        return None
    if math.prod(shape) * dtype.itemsize != stop - start:
        return None
    array = np.frombuffer(memoryview(data)[start:stop], dtype).reshape(shape)
    return torch.from_numpy(array.astype(np.float32)), data[stop:end]


def read_regular(path: Path, max_bytes: int) -> bytes | None:
    """The bytes of a regular file; None if it is a pipe, a link or the like, or larger.

    Raises:
        OSError: it cannot be read.
    """
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode) or info.st_size > max_bytes:
        return None
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    return data if len(data) <= max_bytes else None


def _digest(data: bytes | memoryview, label: str) -> bytes:
    digest = hashlib.sha256(label.encode() + b"\0")
    digest.update(data)
    return digest.digest()
