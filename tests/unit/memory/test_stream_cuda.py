"""The calls of the block stream to CUDA, on a GPU that is played."""

import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.unit.memory.stream_testing import FileBlock, blocks, check_lap, deadline, n_threads
from zquant.memory.lanes import CudaLanes
from zquant.memory.stream import BlockStream, StreamShape

__all__ = ["blocks", "deadline"]  # fixtures


class Cuda:
    """Plays `torch.cuda` on the CPU: copies are done at once, calls are written down."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.codes: list[int | Exception] = []  # of the next registrations; 0 after them
        self.n_events = self.n_errors = 0
        self.devices: set[tuple[str, str]] = set()
        self.registered: set[int] = set()
        self.runtime = SimpleNamespace(
            cudaHostRegister=self.register,
            cudaHostUnregister=self.unregister,
            cudaGetErrorString=lambda code: f"error {code}",
            cudaGetLastError=self.forget,
        )

    def queue(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, wait_event=lambda e: self.log.append(f"{name}: wait {e.name}")
        )

    def event(self, *, enable_timing: bool, blocking: bool) -> SimpleNamespace:
        assert (enable_timing, blocking) == (False, True)
        name = str(self.n_events)
        self.n_events += 1
        return SimpleNamespace(
            name=name,
            record=lambda queue: self.log.append(f"{queue.name}: record {name}"),
            synchronize=lambda: self.log.append(f"synchronize {name}"),
        )

    @contextmanager
    def on_stream(self, queue: SimpleNamespace) -> Iterator[None]:
        self.log.append(f"{queue.name}: copy")
        yield

    def set_device(self, device: object) -> None:
        self.devices.add((threading.current_thread().name, str(device)))

    def register(self, address: int, n_bytes: int, flags: int) -> int:
        assert (address % mmap.PAGESIZE, flags) == (0, 1)  # cudaHostRegisterPortable
        assert n_bytes > 0
        code = self.codes.pop(0) if self.codes else 0
        self.n_errors += code != 0
        if isinstance(code, Exception):
            raise code
        if not code:
            self.registered.add(address)
        return code

    def unregister(self, address: int) -> int:
        self.log.append("unregister")
        self.registered.remove(address)
        return 0

    def forget(self) -> int:
        self.n_errors = 0
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """A GPU whose memory is the CPU's."""
    fake = Cuda()
    for name, value in {
        "Stream": lambda _: fake.queue("copy"),
        "Event": fake.event,
        "stream": fake.on_stream,
        "current_stream": lambda _: fake.queue("compute"),
        "set_device": fake.set_device,
        "cudart": lambda: fake.runtime,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return fake


def cuda_stream(
    blocks: list[FileBlock], n_ring: int = 2, kept: tuple[int, ...] = ()
) -> BlockStream:
    shape = StreamShape(n_slots=2, n_ring=n_ring, kept=frozenset(kept))
    return BlockStream(blocks, shape, CudaLanes(torch.device("cpu")))


def test_cuda_calls_come_in_the_order_that_keeps_memory_safe(
    blocks: list[FileBlock], cuda: Cuda
) -> None:
    with torch.inference_mode():
        stream = cuda_stream(blocks[:2], n_ring=1)
        check_lap(stream, blocks[:2])
        stream.close()
    # events: slot 0 free, full: 0, 1; slot 1: 2, 3; the ring's buffer: 4
    of_compute = [line for line in cuda.log if line.startswith("compute")]
    assert of_compute == [
        *("compute: record 0", "compute: record 2"),  # memory that others may still use
        *("compute: wait 1", "compute: record 0"),
        *("compute: wait 3", "compute: record 2"),
    ]
    of_copies = [line for line in cuda.log if line.startswith("copy")]
    first = ["copy: wait 0", "copy: copy", "copy: record 1", "copy: record 4"]
    second = ["copy: wait 2", "copy: copy", "copy: record 3", "copy: record 4"]
    assert of_copies[:8] == first + second
    assert cuda.log.index("copy: record 1") < cuda.log.index("compute: wait 1")
    assert cuda.log[-2:] == ["synchronize 4", "unregister"]
    assert cuda.log.count("synchronize 4") >= 3
    assert cuda.devices == {("zquant reader", "cpu"), ("zquant copier", "cpu")}


def test_a_thread_that_cannot_use_the_device_fails_the_next_use(
    blocks: list[FileBlock], cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    stream = cuda_stream(blocks)
    with pytest.raises(RuntimeError, match="illegal memory access"), stream.using(0):
        pass
    stream.close()


@pytest.mark.parametrize("kept", [(), (1, 2), (0, 1, 2, 3, 4)], ids=str)
def test_blocks_copied_through_ring_and_kept_buffers_are_right(
    blocks: list[FileBlock], cuda: Cuda, kept: Sequence[int]
) -> None:
    stream = cuda_stream(blocks, kept=kept)
    n_buffers = len(kept) + (2 if len(kept) < 5 else 0)
    assert len(cuda.registered) == n_buffers
    for _ in range(20):
        check_lap(stream, blocks)
    stream.close()
    report = stream.report
    assert all(blocks[i].n_reads == 1 for i in kept)
    assert report.bytes_copied >= 20 * sum(b.n_bytes for b in blocks)
    assert (report.pinned, report.reason) == (True, "")
    assert cuda.registered == set()
    assert n_threads() == 0


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (2, "error 2"),
        (RuntimeError("CUDA error: no memory\nmore"), "CUDA error: no memory"),
    ],
    ids=["code", "exception"],
)
def test_memory_that_cannot_be_pinned_is_used_as_it_is_and_the_reason_is_kept(
    blocks: list[FileBlock], cuda: Cuda, failure: int | Exception, text: str
) -> None:
    cuda.codes = [0, failure]
    stream = cuda_stream(blocks, kept=(0, 1))
    check_lap(stream, blocks)
    assert cuda.n_errors == 0, "the error is left for the next kernel"
    assert len(cuda.registered) == 1, "after a refusal nothing more is asked for"
    stream.close()
    assert cuda.registered == set()
    report = stream.report
    assert not report.pinned
    assert report.reason == f"cudaHostRegister of 8.2 KiB failed: {text}"


def test_without_cuda_get_last_error_a_kernel_takes_the_error(
    blocks: list[FileBlock], cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(*args: object, **kwargs: object) -> Tensor:
        n_errors, cuda.n_errors = cuda.n_errors, 0
        raise RuntimeError(f"{n_errors} errors before this launch")

    del cuda.runtime.cudaGetLastError
    monkeypatch.setattr(torch, "ones", launch)
    cuda.codes = [2]
    stream = cuda_stream(blocks)
    assert cuda.n_errors == 0
    stream.close()


def test_what_was_registered_is_given_back_when_memory_runs_out(
    blocks: list[FileBlock], cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = CudaLanes.buffer

    def buffer(lanes: CudaLanes, n_bytes: int) -> Tensor:
        if len(cuda.registered) == 2:
            raise MemoryError
        return allocate(lanes, n_bytes)

    monkeypatch.setattr(CudaLanes, "buffer", buffer)
    with pytest.raises(MemoryError):
        cuda_stream(blocks, kept=(0, 1))
    assert cuda.registered == set()
    assert n_threads() == 0
