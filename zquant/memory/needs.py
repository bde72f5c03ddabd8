"""What a plan is made of: the machine, the user's ceilings, and what a request needs."""

from collections.abc import Callable
from dataclasses import dataclass

from zquant.memory.activations import Picture

__all__ = ["Limits", "Machine", "Needs", "NetworkNeeds", "VAENeeds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the machine has, in bytes and per second.

    Attributes:
        is_gpu: the device has memory of its own.
        device_bytes: the process may use on the device, what it holds already included.
        outside: held on the device by the process, but not by tensors: a CUDA context and the
            workspaces of libraries, or on a CPU the program itself.
        ram_bytes: the process may use, what it holds already included.
        ram_held: by the process now.
        pinned_bytes: that may be page-locked.
        flops: floating-point operations per second of large products; 0 is unknown.
        expand_s: seconds to expand one weight on a CPU; 0 where it hides behind products.
        link_bytes_s: from host memory to the device; 0 is unknown.
        disk_bytes_s: from the file to host memory; 0 is unknown.
    """

    is_gpu: bool
    device_bytes: int
    outside: int
    ram_bytes: int
    ram_held: int
    pinned_bytes: int = 0
    flops: float = 0.0
    expand_s: float = 0.0
    link_bytes_s: float = 0.0
    disk_bytes_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Ceilings that the user set; None takes what the machine has.

    Attributes:
        budget_bytes: of the whole process on a GPU.
        ram_bytes: of the whole process in host memory.
    """

    budget_bytes: int | None = None
    ram_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkNeeds:
    """What one streamed network needs for a picture.

    Attributes:
        blocks: bytes of every block, in the order they run.
        expanded: the same in the compute dtype; empty where blocks are never kept so.
        fixed: bytes of weights that always stay.
        working: bytes of activations and scratch at the peak of a step.
        flops: of one pass.
        n_weights: that one pass expands.
        passes: over the network, for the whole request.
    """

    blocks: tuple[int, ...]
    expanded: tuple[int, ...] = ()
    fixed: int
    working: int
    flops: float
    n_weights: int
    passes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VAENeeds:
    """What decoding needs.

    Attributes:
        weights: bytes of the autoencoder.
        whole: bytes of activations when the picture is decoded in one piece.
        rows: `(room, stored) -> rows of a stripe` that fit in `room` bytes, or None; `stored` keeps
            whole feature maps on the device.
        striped: `(rows, stored) -> (device bytes, host bytes)` of activations.
        flops: of one picture.
    """

    weights: int
    whole: int
    rows: Callable[[int, bool], int | None]
    striped: Callable[[int, bool], tuple[int, int]]
    flops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a request needs of every phase."""

    picture: Picture
    text_encoder: NetworkNeeds
    dit: NetworkNeeds
    vae: VAENeeds
    held: int = 0  # bytes of latents of all pictures, in host memory until they are decoded
