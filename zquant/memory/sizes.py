"""What the weights of a model take, from the headers of its files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from zquant.formats.names import Part
from zquant.layers.linear import QuantEmbedding, QuantLinear
from zquant.memory.layout import layout_of
from zquant.models.build import Stored
from zquant.models.checkpoint import Checkpoint
from zquant.models.dit import DiT
from zquant.models.text_encoder import TextEncoder

__all__ = ["ADALN", "ModelSizes", "NetworkSizes", "cycle_of", "model_sizes", "visitors_of"]

ADALN = "adaLN_modulation"


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSizes:
    """Bytes of one network's weights.

    Attributes:
        blocks: packed, of every block in the order they run: resident or streamed.
        n_weights: of the same blocks, numbers instead of bytes.
        visitor: the largest of what is brought for one use and dropped.
        fixed: everything else, always resident.
    """

    blocks: tuple[int, ...]
    n_weights: tuple[int, ...]
    visitor: int
    fixed: int

    @property
    def slot(self) -> int:
        """Bytes of a slot that holds any block."""
        return max(self.blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """Bytes of the streamed networks of a model, and bits per weight of its DiT."""

    text_encoder: NetworkSizes
    dit: NetworkSizes
    dit_bpw: float


def cycle_of(network: nn.Module) -> list[str]:
    """Names of the blocks that run one after the other, again and again."""
    if isinstance(network, DiT):
        return network.step_blocks
    assert isinstance(network, TextEncoder)
    return [f"model.layers.{i}" for i in range(len(network.model.layers))]


def visitors_of(network: nn.Module) -> list[str]:
    """Names of what runs once per prompt or schedule: it never stays."""
    if not isinstance(network, DiT):
        return []
    context = [name for name, _ in network.blocks() if name.startswith("context_refiner")]
    return context + [f"{name}.{ADALN}" for name in network.step_blocks]


def model_sizes(checkpoint: Checkpoint) -> ModelSizes:
    """Sizes of both streamed networks of an opened model."""
    dit = checkpoint.parts["dit"]
    n_bytes = sum(part.nbytes for part in dit.values())
    n_weights = sum(_numel(part.shape) for part in dit.values())
    return ModelSizes(
        text_encoder=_network(checkpoint, "text_encoder"),
        dit=_network(checkpoint, "dit"),
        dit_bpw=8 * n_bytes / n_weights,
    )


def _network(checkpoint: Checkpoint, component: str) -> NetworkSizes:
    network, parts = checkpoint.blank(component), checkpoint.parts[component]
    blocks = [layout_of(network, name, parts, without=ADALN) for name in cycle_of(network)]
    visitors = [layout_of(network, name, parts) for name in visitors_of(network)]
    moving = {id(entry.linear) for each in (*blocks, *visitors) for entry in each.entries}
    return NetworkSizes(
        blocks=tuple(block.n_bytes for block in blocks),
        n_weights=tuple(sum(_numel(e.part.shape) for e in b.entries) for b in blocks),
        visitor=max((each.n_bytes for each in visitors), default=0),
        fixed=_fixed(network, parts, moving),
    )


def _fixed(network: nn.Module, parts: Mapping[str, Part], moving: set[int]) -> int:
    """Bytes on the device of what `zquant.models.build.load` puts there at once."""
    total = 0
    for path, owner in network.named_modules():
        for leaf, value in owner.named_parameters(recurse=False):
            packs = leaf == "weight" and isinstance(owner, QuantLinear)
            if packs and id(owner) in moving:
                total += 4 * value.shape[0]  # the int8 scales of its rows stay
            elif packs:
                part: Stored = parts[f"{path}.{leaf}"]
                total += part.shape[0] * part.qtype.row_bytes(part.shape[-1])
            elif not isinstance(owner, QuantEmbedding):
                total += value.numel() * torch.float32.itemsize
    return total


def _numel(shape: Sequence[int]) -> int:
    n = 1
    for dim in shape:
        n *= dim
    return n
