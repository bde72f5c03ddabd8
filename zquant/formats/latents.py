"""Latents in `.npy` files: float32 `[count, C, H, W]`, never a pickle."""

import math
import os
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib import format as npy
from torch import Tensor

from zquant.errors import FormatError
from zquant.formats.part_file import part_file

__all__ = ["load_latents", "save_latents"]


def load_latents(path: Path) -> Tensor:
    """float32 `[count, C, H, W]`.

    Raises:
        FormatError: not a `.npy` file of four-dimensional floats.
    """
    try:
        with path.open("rb") as file:
            array = _read(file, path)
    except OSError as error:
        raise FormatError(f"{path}: cannot be opened ({error.strerror}).") from error
    return torch.from_numpy(array.astype(np.float32))


def _read(file: BinaryIO, path: Path) -> npt.NDArray[Any]:
    """The array, after its header was found to be that of latents whose data are all there."""
    try:
        version = npy.read_magic(file)
        reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, in_columns, dtype = reader(file)
    except (ValueError, EOFError, SyntaxError, TokenError) as error:
        raise FormatError(
            f"{path}: not a readable .npy file ({error!s:.200}). Give a file that --save-latents "
            f"or numpy.save wrote."
        ) from error
    if len(shape) != 4 or dtype.kind != "f" or in_columns or min(shape) < 1:
        raise FormatError(
            f"{path}: holds {dtype} {list(shape)}; expected float32 [count, channels, height / 8, "
            f"width / 8] in C order."
        )
    wanted, data = math.prod(shape) * dtype.itemsize, file.tell()
    found = file.seek(0, os.SEEK_END) - data
    if found != wanted:
        raise FormatError(
            f"{path}: has {found} bytes of data; {list(shape)} takes {wanted}. Copy it again."
        )
    file.seek(data)
    return np.frombuffer(file.read(wanted), dtype).reshape(shape)


def save_latents(path: Path, latents: Tensor) -> None:
    """Write float32 latents; the file is complete or absent.

    Raises:
        FormatError: it cannot be written.
    """
    with part_file(path) as file:
        np.save(file, latents.float().cpu().numpy())
