"""Latents in `.npy` files: float32 `[count, C, H, W]`, never a pickle."""

from pathlib import Path

import numpy as np
import torch
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
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise FormatError(f"{path}: not a readable .npy file ({error}).") from error
    if not isinstance(array, np.ndarray) or array.ndim != 4 or array.dtype.kind != "f":
        shape = getattr(array, "shape", None)
        raise FormatError(
            f"{path}: holds {shape}; expected floats [count, channels, height, width]."
        )
    return torch.from_numpy(array.astype(np.float32))


def save_latents(path: Path, latents: Tensor) -> None:
    """Write float32 latents; the file is complete or absent.

    Raises:
        FormatError: it cannot be written.
    """
    with part_file(path) as file:
        np.save(file, latents.float().cpu().numpy())
