"""The ceiling, which comes before the measurement: rates of a device, and the least of a step.

    products_s = multiplications of a step / rate of a product as large as the model's
    weights_s  = stored bytes of its blocks / rate of the device's memory
    moving_s   = stored bytes of streamed blocks / rate of the link, or of the file for those that
                 are not kept in pinned RAM, whichever takes longer
    roofline_s = the largest of the three

Each rate is the best of several, as noise must not lower a ceiling. Not in it: expanding quantized
weights (`expand_s`, beside it), norms, and what else is done element by element.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from zquant.formats.names import Part
from zquant.memory.activations import Picture
from zquant.memory.device import Device
from zquant.memory.plan import MemoryPlan
from zquant.memory.sizes import NetworkSizes
from zquant.models.config import DiTConfig

__all__ = [
    "Products",
    "Rates",
    "best_seconds",
    "overlap",
    "products_of",
    "rates_of",
    "roofline",
    "unwaited",
]

MIB = 2**20
COPIED = 128 * MIB  # more than caches hold
READ = 128 * MIB
SECONDS = 0.3  # of every measurement
PRODUCT_SECONDS = 0.15  # of one product on a CPU; it needs no more rows to reach its rate
FEW_ROWS = 64
AT_LEAST = 3  # repetitions


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the device and the model's file move, in bytes per second.

    Attributes:
        memory_bytes_s: of the device's memory; a copy counts as read and written.
        link_bytes_s: pinned copies to the device; 0 without a GPU, or where nothing can be pinned.
        file_bytes_s: of the DiT's file, from the disk or from what the system keeps of it.
    """

    memory_bytes_s: float
    link_bytes_s: float
    file_bytes_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """Operations per second of products `[rows, dim] x [dim, hidden_dim]`.

    Attributes:
        rows: the tokens of the picture; fewer on a CPU that takes long for them.
        flop_s: in the compute dtype.
        int8_op_s: of int8 numbers; None where blocks compute exactly or torch cannot.
        int8_reason: why torch cannot.
    """

    rows: int
    flop_s: float
    int8_op_s: float | None
    int8_reason: str = ""


def best_seconds(
    work: Callable[[], object],
    *,
    wait: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    seconds: float = SECONDS,
) -> float:
    """Of the fastest run of `work`, after one that does not count; `wait` is for its end."""
    work()
    wait()
    times: list[float] = []
    end = clock() + seconds
    while len(times) < AT_LEAST or clock() < end:
        start = clock()
        work()
        wait()
        times.append(clock() - start)
    return max(1e-9, min(times))


def rates_of(device: Device, parts: Iterable[Part]) -> Rates:
    """Measured now; `parts` are the weights of the DiT."""
    where, wait = device.torch_device, _wait(device)
    source = torch.zeros(COPIED, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    memory = 2 * COPIED / best_seconds(lambda: target.copy_(source), wait=wait)
    link = 0.0
    if device.is_cuda:
        try:
            pinned = torch.zeros(COPIED, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:
            pinned = None
        if pinned is not None:
            seconds = best_seconds(lambda: target.copy_(pinned, non_blocking=True), wait=wait)
            link = COPIED / seconds
    return Rates(memory_bytes_s=memory, link_bytes_s=link, file_bytes_s=_file_bytes_s(parts))


def _wait(device: Device) -> Callable[[], object]:
    """For the end of what was enqueued."""
    if not device.is_cuda:
        return lambda: None
    return lambda: torch.cuda.synchronize(device.torch_device)


def _file_bytes_s(parts: Iterable[Part]) -> float:
    """Of the first parts, read one after the other."""
    pieces: list[tuple[Part, int]] = []
    left = READ
    for part in parts:
        if left > 0:
            pieces.append((part, min(left, part.nbytes)))
            left -= pieces[-1][1]
    buffer = np.empty(max(n for _, n in pieces), np.uint8)

    def read() -> None:
        for part, n_bytes in pieces:
            part.read_into(0, buffer[:n_bytes])

    return (READ - left) / best_seconds(read)


@torch.inference_mode()
def products_of(device: Device, config: DiTConfig, n_tokens: int) -> Products:
    """The rate of products with a weight of the feed-forward layers."""
    dtype, where, wait = device.compute_dtype, device.torch_device, _wait(device)
    n, k = config.hidden_dim, config.dim
    weight = torch.randn(k, device=where).to(dtype).repeat(n, 1)  # [N, K]
    rows = n_tokens
    if not device.is_cuda:
        few = torch.ones(FEW_ROWS, k, dtype=dtype)
        seconds = best_seconds(lambda: few @ weight.t(), seconds=0)
        rows = min(n_tokens, max(FEW_ROWS, int(FEW_ROWS * PRODUCT_SECONDS / seconds)))
    x = torch.randn(rows, k, device=where).to(dtype)
    work = 2.0 * rows * n * k
    flop_s = work / best_seconds(lambda: x @ weight.t(), wait=wait)
    if not device.compute.int8:
        return Products(rows=rows, flop_s=flop_s, int8_op_s=None)
    try:
        int8 = work / _int8_seconds(x, weight, wait)
    except RuntimeError as error:  # NotImplementedError is one
        reason = str(error).split("\n")[0]
        return Products(rows=rows, flop_s=flop_s, int8_op_s=None, int8_reason=reason)
    return Products(rows=rows, flop_s=flop_s, int8_op_s=int8)


def _int8_seconds(x: torch.Tensor, weight: torch.Tensor, wait: Callable[[], object]) -> float:
    """Of the same product of int8 numbers.

    Raises:
        RuntimeError: torch has none on this device.
    """
    few, many = x.to(torch.int8), weight.to(torch.int8)
    return best_seconds(lambda: torch._int_mm(few, many.t()), wait=wait)


def roofline(
    plan: MemoryPlan, sizes: NetworkSizes, config: DiTConfig, rates: Rates, products: Products
) -> dict[str, Any]:
    """The least seconds of a step of this plan, and what bounds it.

    Args:
        plan: of the picture.
        sizes: of the DiT.
        config: of the DiT.
        rates: of the machine.
        products: at this picture's size.
    """
    picture, passes = plan.picture, plan.picture.n_prompts
    linear, attention = _operations(picture, sizes.n_weights, config)
    exact, int8 = products.flop_s, products.int8_op_s or products.flop_s
    seconds = {
        "products": passes * (linear / int8 + attention / exact),
        "weights": passes * sum(sizes.blocks) / rates.memory_bytes_s,
        "moving": passes * _moving_s(plan, sizes, rates),
    }
    unexpanded = 1 - len(plan.dit.expanded) / len(sizes.blocks)
    return {
        "streamed_blocks": len(plan.dit.streamed),
        "product_rows": products.rows,
        "product_flop_s": products.flop_s,
        "product_int8_op_s": products.int8_op_s,
        "product_int8_reason": products.int8_reason,
        "step_flop": passes * (linear + attention),
        **{f"{name}_s": value for name, value in seconds.items()},
        "roofline_s": max(seconds.values()),
        "bound": max(seconds, key=lambda name: seconds[name]),
        "expand_s": passes * unexpanded * sum(sizes.n_weights) * plan.machine.expand_s,
    }


def _moving_s(plan: MemoryPlan, sizes: NetworkSizes, rates: Rates) -> float:
    """Of one pass: what the link carries, or what the file gives meanwhile."""
    blocks = [sizes.blocks[i] for i in sorted(plan.dit.streamed)]
    kept = plan.dit.shape.kept if plan.dit.shape else frozenset()
    from_file = sum(n_bytes for i, n_bytes in enumerate(blocks) if i not in kept)
    copied = sum(blocks) / rates.link_bytes_s if rates.link_bytes_s else 0.0
    return max(copied, from_file / rates.file_bytes_s)


def _operations(
    picture: Picture, n_weights: Sequence[int], config: DiTConfig
) -> tuple[float, float]:
    """Of one pass: those of the weights, and those of attention."""
    linear = attention = 0.0
    for i, n in enumerate(n_weights):
        # the noise refiner comes first and sees the image alone
        n_tokens = picture.n_image if i < config.n_refiner_layers else picture.n_tokens
        linear += 2.0 * n * n_tokens
        attention += 4.0 * config.dim * n_tokens**2
    return linear, attention


def overlap(step_s: float, compute_s: float, moving_s: float) -> float | None:
    """How much of the shorter of moving and computing costs nothing, at least: 0 to 1.

    `compute_s` is the ceiling's. Blocks compute no faster than that, and with more of it the
    result would be larger. None where nothing is moved.
    """
    shorter = min(compute_s, moving_s)
    if shorter <= 0:
        return None
    return _share(1 - (step_s - max(compute_s, moving_s)) / shorter)


def unwaited(waited_s: float, moving_s: float) -> float | None:
    """How much of moving nobody waited for: 0 to 1, None where nothing is moved.

    For a CPU, where the wait for a block is the wait for its bytes; a GPU's is on its queue.
    """
    return _share(1 - waited_s / moving_s) if moving_s > 0 else None


def _share(value: float) -> float:
    return min(1.0, max(0.0, value))
