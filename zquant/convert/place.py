"""Where a conversion quantizes: on a GPU where kernels can run, otherwise on the CPU.

The bytes are the same. A search for scales takes a CPU minutes and a GPU seconds, so that reading
and writing are what remains.
"""

from dataclasses import dataclass

import torch
from zquant_kernels.runtime import why_not

from zquant.errors import DeviceError
from zquant.memory.device import probe

__all__ = ["Place", "choose_place"]


@dataclass(frozen=True, slots=True)
class Place:
    """`gpu` is None for the CPU; `name` and `reason` are for people, empty: nothing is faster."""

    gpu: torch.device | None
    name: str
    reason: str

    @property
    def summary(self) -> str:
        """Where and why in one line."""
        return f"quantizing on {self.name}" + (f" ({self.reason})" if self.reason else "")

    def without_gpu(self, reason: str) -> "Place":
        """The CPU instead of a GPU, and why."""
        return Place(None, "the CPU", reason) if self.gpu else self


def choose_place(device: str) -> Place:
    """Choose where to quantize.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:1".

    Raises:
        DeviceError: the device is unknown or absent, or kernels cannot run on it.
    """
    asked = "" if device == "auto" else "as asked"
    found = probe(device, "float32")
    why = why_not(found.torch_device)
    if found.is_cuda and not why:
        return Place(found.torch_device, found.name, asked)
    if found.is_cuda and asked:
        raise DeviceError(
            f"--device {device} cannot quantize: {why}. "
            f"Use --device cpu, which writes the same bytes more slowly."
        )
    return Place(None, "the CPU", asked or why)
