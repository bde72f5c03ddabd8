"""How the packed weights of one block lie in one flat buffer, so that one copy moves them all.

Every weight begins at a multiple of 256 bytes, in the order of the file. Norms and biases are not
among them: they are small, expanded once and always resident.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from zquant.formats.names import Part
from zquant.layers.linear import QuantLinear

__all__ = ["ALIGNMENT", "BlockLayout", "layout_of"]

ALIGNMENT = 256  # of a weight in its buffer; kernels and copies like it


@dataclass(frozen=True, slots=True)
class Entry:
    """A weight of the block: its linear inside the block's module, its bytes and their place."""

    linear: QuantLinear
    part: Part
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """The weights of one block, ready to be read and to be used from a buffer.

    Attributes:
        name: of the block in the checkpoint.
        entries: its weights in file order.
        n_bytes: of the buffer, a multiple of `ALIGNMENT`.
    """

    name: str
    entries: tuple[Entry, ...]
    n_bytes: int

    def read_into(self, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out [n_bytes]` from the file.

        Raises:
            FormatError: the file became shorter.
        """
        for entry in self.entries:
            entry.part.read_into(0, out[entry.offset : entry.offset + entry.part.nbytes])

    def place(self, flat: Tensor) -> None:
        """Let the linears use `flat`, uint8 `[at least n_bytes]`, filled by `read_into`."""
        for entry in self.entries:
            part = entry.part
            packed = flat[entry.offset : entry.offset + part.nbytes]
            entry.linear.place(packed.view(part.shape[0], -1))

    def remove(self) -> None:
        """Let go of the buffer: until the next `place` the linears have no weights."""
        for entry in self.entries:
            entry.linear.place(entry.linear.weight.to("meta"))


def layout_of(
    module: nn.Module, name: str, parts: Mapping[str, Part], *, without: str = ""
) -> BlockLayout:
    """The layout of block `name` of `module`.

    Args:
        module: a network whose linears know how they are stored.
        name: of a block, or of any other submodule.
        parts: official tensor name -> stored tensor.
        without: leave out linears whose name inside the block contains this text.
    """
    found = []
    for path, owner in module.get_submodule(name).named_modules():
        if isinstance(owner, QuantLinear) and not (without and without in path):
            found.append((owner, parts[f"{name}.{path}.weight" if path else f"{name}.weight"]))
    found.sort(key=lambda each: (each[1].info.reader.name, each[1].offset))
    entries, at = [], 0
    for linear, part in found:
        entries.append(Entry(linear, part, at))
        at += -(-part.nbytes // ALIGNMENT) * ALIGNMENT
    return BlockLayout(name=name, entries=tuple(entries), n_bytes=at)
