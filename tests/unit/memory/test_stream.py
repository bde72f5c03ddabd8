"""The block stream with real threads and files on a CPU, and its CUDA calls on a fake GPU."""

import gc
import mmap
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from zquant.errors import FormatError
from zquant.memory.lanes import CudaLanes, HostLanes
from zquant.memory.stream import BlockStream, StreamShape


@dataclass
class FileBlock:
    """A part of a file."""

    path: Path
    offset: int
    n_bytes: int
    n_reads: int = 0
    before: Callable[[], None] = field(default=lambda: None)

    @property
    def name(self) -> str:
        return f"at {self.offset}"

    def read_into(self, out: npt.NDArray[np.uint8]) -> None:
        self.before()
        with self.path.open("rb") as file:
            file.seek(self.offset)
            if file.readinto(out.data) < self.n_bytes:
                raise FormatError(f"{self.path.name}: block {self.name} is cut off")
        self.n_reads += 1


@pytest.fixture(autouse=True)
def deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that waits in vain fails, instead of the run standing still."""
    wait_for = threading.Condition.wait_for

    def impatient(changed: threading.Condition, predicate: Callable[[], bool]) -> bool:
        assert wait_for(changed, predicate, timeout=20), "nobody came"
        return True

    monkeypatch.setattr(threading.Condition, "wait_for", impatient)


@pytest.fixture
def blocks(tmp_path: Path) -> list[FileBlock]:
    """Five blocks of different sizes."""
    sizes = [256 * n for n in (4, 1, 33, 2, 8)]
    data = np.random.default_rng(0).integers(0, 256, sum(sizes), np.uint8)
    (tmp_path / "blocks").write_bytes(data.tobytes())
    offsets = np.cumsum([0, *sizes]).tolist()
    return [FileBlock(tmp_path / "blocks", *each) for each in zip(offsets, sizes, strict=False)]


def content(block: FileBlock) -> bytes:
    return block.path.read_bytes()[block.offset : block.offset + block.n_bytes]


def check_lap(stream: BlockStream, blocks: list[FileBlock]) -> None:
    for index, block in enumerate(blocks):
        with stream.using(index) as slot:
            assert slot.shape == (max(b.n_bytes for b in blocks),)
            assert slot[: block.n_bytes].numpy().tobytes() == content(block)


def host_stream(blocks: list[FileBlock], n_slots: int = 2) -> BlockStream:
    shape = StreamShape(n_slots=n_slots, n_ring=0, kept=frozenset())
    return BlockStream(blocks, shape, HostLanes())


def use(stream: BlockStream, upto: int) -> None:
    for index in range(upto):
        with stream.using(index):
            pass


def n_threads() -> int:
    return sum(thread.name.startswith("zquant ") for thread in threading.enumerate())


# a CPU


@pytest.mark.parametrize("n_slots", [2, 3, 7])
def test_every_block_of_many_laps_is_right(blocks: list[FileBlock], n_slots: int) -> None:
    stream = host_stream(blocks, n_slots)
    for _ in range(40):
        check_lap(stream, blocks)
    stream.close()
    report = stream.report
    assert report.bytes_read == sum(b.n_reads * b.n_bytes for b in blocks)
    assert all(40 <= b.n_reads <= 42 for b in blocks)
    assert (report.bytes_copied, report.pinned) == (0, False)
    assert report.reason == "a CPU computes from host memory"
    assert report.waited_s > 0
    assert n_threads() == 0


def test_nothing_is_allocated_after_construction(blocks: list[FileBlock]) -> None:
    stream = host_stream(blocks)
    addresses = set()
    for turn in range(20):
        with stream.using(turn % 5) as slot:
            addresses.add(slot.data_ptr())
    stream.close()
    assert len(addresses) == 2
    assert all(address % 256 == 0 for address in addresses)


def test_inference_mode_of_the_model_does_not_reach_the_slots(blocks: list[FileBlock]) -> None:
    with torch.inference_mode():
        stream = host_stream(blocks)
        check_lap(stream, blocks)
        with stream.using(0) as slot:
            assert not slot.is_inference()
    stream.close()


def test_a_read_that_fails_is_raised_once_and_can_be_tried_again(blocks: list[FileBlock]) -> None:
    data = blocks[3].path.read_bytes()
    blocks[3].path.write_bytes(data[: blocks[3].offset + 1])
    stream = host_stream(blocks)
    use(stream, 3)
    with pytest.raises(FormatError, match="9728 is cut off") as raised, stream.using(3):
        pass
    assert raised.traceback[-1].name == "read_into"
    with pytest.raises(AssertionError, match="block 3 of a stream that failed"), stream.using(3):
        pass
    blocks[3].path.write_bytes(data)
    stream.rewind()
    check_lap(stream, blocks)
    stream.close()


def test_a_failure_is_not_held_by_the_stream_or_by_itself(blocks: list[FileBlock]) -> None:
    blocks[0].path.write_bytes(b"")
    stream = host_stream(blocks)
    gc.disable()
    try:
        use(stream, 1)
    except FormatError as error:
        failure = weakref.ref(error)
    held = failure()
    gc.enable()
    assert held is None
    stream.close()


def test_an_abandoned_step_begins_again_at_the_first_block(blocks: list[FileBlock]) -> None:
    stream = host_stream(blocks)
    for n_used in (1, 3, 0, 4):
        use(stream, n_used)
        stream.rewind()
    check_lap(stream, blocks)
    n_reads = [b.n_reads for b in blocks]
    stream.rewind()  # nothing to drop
    check_lap(stream, blocks)
    stream.close()
    assert sum(b.n_reads for b in blocks) <= sum(n_reads) + 5 + 2


def test_a_step_that_breaks_inside_a_block_can_be_abandoned(blocks: list[FileBlock]) -> None:
    stream = host_stream(blocks)
    with pytest.raises(ZeroDivisionError), stream.using(0):
        _ = 1 / 0
    stream.rewind()
    check_lap(stream, blocks)
    stream.close()


def test_close_waits_for_the_read_that_is_in_progress(blocks: list[FileBlock]) -> None:
    reading, go_on, log = threading.Event(), threading.Event(), list[str]()

    def before() -> None:
        reading.set()
        assert go_on.wait(5)
        log.append("read")

    blocks[0].before = before
    stream = host_stream(blocks)
    assert reading.wait(5)

    def close() -> None:
        stream.close()
        log.append("closed")

    closing = threading.Thread(target=close)
    closing.start()
    go_on.set()
    closing.join(5)
    assert log == ["read", "closed"]
    assert n_threads() == 0
    with pytest.raises(AssertionError, match="block 0 of a closed stream"):
        use(stream, 1)


def test_blocks_out_of_turn_are_a_mistake_of_ours(blocks: list[FileBlock]) -> None:
    stream = host_stream(blocks)
    with pytest.raises(AssertionError, match="1 out of turn; the next is 0"), stream.using(1):
        pass
    with stream.using(0), pytest.raises(AssertionError, match="block 0 inside the use of block 0"):
        use(stream, 1)
    stream.close()


# a GPU that is not there


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
