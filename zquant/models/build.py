"""Meta-device module + named tensors -> loaded module.

A packed weight keeps its bytes (on the CPU: the mapped file itself). Everything else, norms,
biases, pad tokens and the autoencoder's convolutions, is expanded once to a float dtype. Loading is
strict: a missing, unexpected or misshapen tensor is an error.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from zquant.errors import CheckpointError
from zquant.layers.linear import QuantEmbedding, QuantLinear
from zquant.quant.qtypes import QType
from zquant.quant.scaled import Scaling, dequantize_scaled

__all__ = ["Stored", "check_names", "expand", "load", "on_meta", "packed"]

M = TypeVar("M", bound=nn.Module)


class Stored(Protocol):
    """A stored tensor, as `zquant.formats.names.Part` offers it."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102 # torch order
    @property
    def qtype(self) -> QType: ...  # noqa: D102
    @property
    def scaling(self) -> Scaling | None: ...  # noqa: D102

    def raw(self) -> npt.NDArray[np.uint8]: ...  # noqa: D102 # [nbytes]


def on_meta(make: Callable[[], M]) -> M:
    """`make()` without memory for its weights."""
    with torch.device("meta"):
        return make()


def packed(part: Stored) -> Tensor:
    """The stored bytes of a matrix as uint8 `[N, row_bytes]`, not copied."""
    return torch.from_numpy(part.raw()).view(part.shape[0], part.qtype.row_bytes(part.shape[-1]))


def expand(part: Stored, dtype: torch.dtype) -> Tensor:
    """The stored tensor in its own shape and `dtype`."""
    n_last = part.shape[-1] if part.shape[-1] % part.qtype.qblock == 0 else part.qtype.qblock
    rows = torch.from_numpy(part.raw()).view(-1, part.qtype.row_bytes(n_last))
    return dequantize_scaled(rows, part.qtype, dtype, part.scaling).view(part.shape)


def load(
    module: M,
    parts: Mapping[str, Stored],
    *,
    label: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    unused: Iterable[str] = (),
    later: Callable[[str], bool] = lambda _: False,
) -> M:
    """Fill a module that is on the meta device.

    Args:
        module: of `zquant.models`, on the meta device.
        parts: official tensor name -> stored tensor.
        label: the file, for messages.
        device: where the weights go; an embedding table stays on the CPU.
        dtype: of everything that is not a packed linear weight.
        unused: prefixes of names that may be present and are not needed.
        later: whether the linear weight of that name stays on the meta device, known by its qtype
            and placed by `zquant.memory`.

    Raises:
        CheckpointError: tensors are missing, unexpected or of the wrong shape.
    """
    check_names(module, parts, label, unused=unused)
    for path, owner in module.named_modules():
        for leaf in [leaf for leaf, _ in owner.named_parameters(recurse=False)]:
            name = f"{path}.{leaf}" if path else leaf
            part, home = parts[name], "cpu" if isinstance(owner, QuantEmbedding) else device
            scaling = part.scaling and part.scaling.to(home)
            if leaf == "weight" and isinstance(owner, QuantLinear) and later(name):
                row_bytes = part.qtype.row_bytes(part.shape[-1])
                away = torch.empty(part.shape[0], row_bytes, dtype=torch.uint8, device="meta")
                owner.load(away, part.qtype, scaling)
            elif leaf == "weight" and isinstance(owner, (QuantLinear, QuantEmbedding)):
                owner.load(packed(part).to(home), part.qtype, scaling)
            else:
                value = expand(part, dtype).to(device)
                setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
    return module.eval()


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> torch shape of every tensor the module wants."""
    shapes = {}
    for path, owner in module.named_modules():
        for leaf, value in owner.named_parameters(recurse=False):
            packs = leaf == "weight" and isinstance(owner, (QuantLinear, QuantEmbedding))
            shape = (owner.out_features, owner.in_features) if packs else tuple(value.shape)
            shapes[f"{path}.{leaf}" if path else leaf] = shape
    return shapes


def check_names(
    module: nn.Module, parts: Mapping[str, Stored], label: str, *, unused: Iterable[str] = ()
) -> None:
    """Compare the names and shapes of `parts` with what `module` wants; arguments as `load`.

    Raises:
        CheckpointError: tensors are missing, unexpected or of the wrong shape.
    """
    unused = tuple(unused)
    wanted = _shapes(module)
    missing = sorted(wanted.keys() - parts.keys())
    if missing:
        raise CheckpointError(
            f"{label}: {len(missing)} of {len(wanted)} tensors missing (first: {missing[0]!r}). "
            f"The file may be incomplete or belong to another model; get or convert it again."
        )
    extra = [n for n in sorted(parts.keys() - wanted.keys()) if not n.startswith(unused or ("\0",))]
    if extra:
        raise CheckpointError(
            f"{label}: {len(extra)} unexpected tensors (first: {extra[0]!r}). "
            f"This is another model, or an adapter that must be given as such."
        )
    for name, shape in wanted.items():
        if tuple(parts[name].shape) != shape:
            raise CheckpointError(
                f"{label}: tensor {name!r} has shape {list(parts[name].shape)}; "
                f"expected {list(shape)}. The file belongs to another model."
            )
