"""The device as the block stream sees it: memory, two queues, and threads that wait for events.

    compute queue   what the model enqueues; the caller's current CUDA stream
    copy queue      one flat copy per block, host to device, in a CUDA stream of its own
    event           a mark recorded on a queue; a wait for an event that was never recorded is none

`HostLanes` has no copy queue: blocks are read straight into the memory that compute uses, and the
compute queue is the calling thread itself. Which block goes where and when is decided in
`zquant.memory.stream`.
"""

import mmap
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zquant.units import format_bytes

__all__ = ["CudaLanes", "Event", "HostLanes", "Lanes", "Queue", "StreamedBlock"]

cuda: Any = torch.cuda  # it has no types
Event: TypeAlias = Any  # torch.cuda.Event; None on a CPU
Queue: TypeAlias = Literal["copy", "compute"]

PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU, not the current one alone


class StreamedBlock(Protocol):
    """A block as a file has it: `n_bytes` of a flat buffer, a multiple of 256."""

    @property
    def name(self) -> str:
        """The block in the checkpoint."""

    @property
    def n_bytes(self) -> int:
        """Size of its flat buffer."""

    def read_into(self, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out [n_bytes]`; returns when it is full."""


class Lanes(Protocol):
    """Everything that the block stream asks of a device. Memory is uint8, one-dimensional.

    Attributes:
        direct: blocks are read straight into slots; there are no buffers and no copies.
        reason: why some buffers are not pinned; empty when all are.
    """

    direct: bool
    reason: str

    def slot(self, n_bytes: int) -> Tensor:
        """Memory for compute; work enqueued earlier may still be using it."""

    def buffer(self, n_bytes: int) -> Tensor:
        """Host memory to copy from, pinned where possible."""

    def event(self) -> Event:
        """An event that was never recorded."""

    def record(self, queue: Queue, event: Event) -> None:
        """Mark what is in `queue` now; replaces an earlier mark."""

    def wait(self, queue: Queue, event: Event) -> None:
        """Let what is enqueued from here on wait for `event` as it is recorded now."""

    def synchronize(self, event: Event) -> None:
        """Block the calling thread until the queue has reached `event`."""

    def copy(self, slot: Tensor, buffer: Tensor, n_bytes: int) -> None:
        """Enqueue one copy; with memory that is not pinned it may block the calling thread."""

    def read(self, block: StreamedBlock, memory: Tensor) -> None:
        """Read `block` into the first bytes of host `memory`."""

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Run `work`, which does not raise, in a thread."""

    def enter(self) -> None:
        """Called first by `work`: the thread will use the device."""

    def join(self) -> None:
        """Wait until every started thread has ended."""

    def until(self, *conditions: Callable[[], bool]) -> None:
        """Block the calling thread until one of `conditions` holds."""

    def notify(self) -> None:
        """What conditions look at has changed."""

    def now(self) -> float:
        """Seconds of a clock that only runs forward."""

    def close(self) -> None:
        """Give everything back; nothing is in progress any more."""


class _Threads:
    """The part of `Lanes` that is the same on every device: real threads, files and time."""

    reason = ""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def read(self, block: StreamedBlock, memory: Tensor) -> None:
        block.read_into(memory[: block.n_bytes].numpy())

    def start(self, name: str, work: Callable[[], None]) -> None:
        # a daemon: a stream that was never closed must not keep the process from ending
        thread = threading.Thread(target=work, name=f"zquant {name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def enter(self) -> None:
        """Nothing."""

    def join(self) -> None:
        while self._threads:
            self._threads[-1].join()
            self._threads.pop()

    def until(self, *conditions: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: any(holds() for holds in conditions))

    def notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def now(self) -> float:
        return time.perf_counter()


class HostLanes(_Threads):
    """A CPU: compute is done when the call returns, so that events have nothing to say."""

    direct = True
    reason = "a CPU computes from host memory"

    def slot(self, n_bytes: int) -> Tensor:
        """Host memory."""
        return _page_aligned(n_bytes)

    def buffer(self, n_bytes: int) -> Tensor:
        """Never called: there are no copies."""
        raise AssertionError(f"a buffer of {n_bytes} bytes for copies on a CPU")

    def event(self) -> Event:
        """Nothing."""
        return None

    def record(self, queue: Queue, event: Event) -> None:
        """Nothing."""

    def wait(self, queue: Queue, event: Event) -> None:
        """Nothing."""

    def synchronize(self, event: Event) -> None:
        """Nothing."""

    def copy(self, slot: Tensor, buffer: Tensor, n_bytes: int) -> None:
        """Never called."""
        raise AssertionError(f"a copy of {n_bytes} bytes on a CPU: {buffer.shape} to {slot.shape}")

    def close(self) -> None:
        """Nothing."""


class CudaLanes(_Threads):
    """A GPU: copies in a stream of their own, ordered with compute by events alone.

    Host buffers are registered with the driver one by one: torch's own pinned memory rounds every
    block up to a power of two. After the first refusal the rest stays pageable, for `reason`.

    Args:
        device: of the slots, e.g. `torch.device("cuda", 0)`.
    """

    direct = False

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._copies = cuda.Stream(device)
        self._registered: list[Tensor] = []

    def slot(self, n_bytes: int) -> Tensor:
        """Memory of the device, which the current stream's earlier work may still be using."""
        # an inference tensor could not be written by a thread that is not in inference mode
        with torch.inference_mode(False):
            return torch.empty(n_bytes, dtype=torch.uint8, device=self._device)

    def buffer(self, n_bytes: int) -> Tensor:
        """Registered host memory, or pageable memory and a `reason`."""
        memory = _page_aligned(n_bytes)
        if not self.reason:
            refusal = _register(memory)
            if refusal:
                self.reason = f"cudaHostRegister of {format_bytes(n_bytes)} failed: {refusal}"
                _forget_error(self._device)
            else:
                self._registered.append(memory)
        return memory

    def event(self) -> Event:
        """A CUDA event."""
        # blocking: a thread that waits sleeps and leaves its core to the one that launches kernels
        return cuda.Event(enable_timing=False, blocking=True)

    def record(self, queue: Queue, event: Event) -> None:
        """`cudaEventRecord`."""
        event.record(self._queue(queue))

    def wait(self, queue: Queue, event: Event) -> None:
        """`cudaStreamWaitEvent`."""
        self._queue(queue).wait_event(event)

    def synchronize(self, event: Event) -> None:
        """`cudaEventSynchronize`."""
        event.synchronize()

    def copy(self, slot: Tensor, buffer: Tensor, n_bytes: int) -> None:
        """`cudaMemcpyAsync` on the copy queue."""
        with cuda.stream(self._copies):
            slot[:n_bytes].copy_(buffer[:n_bytes], non_blocking=True)

    def enter(self) -> None:
        """`cudaSetDevice`: on GPU 0 the thread's first call would take memory for a context."""
        cuda.set_device(self._device)

    def close(self) -> None:
        """Unregister host memory."""
        while self._registered:
            cuda.cudart().cudaHostUnregister(self._registered.pop().data_ptr())

    def _queue(self, queue: Queue) -> Any:
        return self._copies if queue == "copy" else cuda.current_stream(self._device)


def _page_aligned(n_bytes: int) -> Tensor:
    """uint8 `[n_bytes]` of host memory that shares no page with anything else."""
    page = mmap.PAGESIZE
    memory = np.empty(-(-n_bytes // page) * page + page, np.uint8)
    start = -memory.ctypes.data % page
    with torch.inference_mode(False):
        return torch.from_numpy(memory[start : start + n_bytes])


def _register(memory: Tensor) -> str:
    """Pin `memory`; the driver's refusal in words, or nothing."""
    runtime = cuda.cudart()
    try:
        code = runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), PORTABLE)
        return str(runtime.cudaGetErrorString(code)) if int(code) else ""
    except RuntimeError as error:
        return str(error).partition("\n")[0]


def _forget_error(device: torch.device) -> None:
    """Keep the driver's last error from being reported by the next kernel, which is innocent."""
    forget = getattr(cuda.cudart(), "cudaGetLastError", None)
    if forget is not None:
        forget()
        return
    with suppress(RuntimeError):
        torch.ones(1, device=device)  # its launch takes the error
