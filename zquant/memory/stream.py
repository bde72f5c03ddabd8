"""Blocks that do not stay on the device are fetched while earlier ones compute.

    file --reader--> host buffer --copier--> slot --compute queue--> free again

A few host buffers (the ring) are refilled from the file lap after lap; a kept block has a buffer of
its own and is read once. The reader thread runs ahead as far as the ring reaches, the copier thread
as far as there are slots, so that disk, link and device all work at the same time. Where compute
uses host memory itself (a CPU) the reader fills the slots, and there is no copier.

    who       waits for                                     before
    reader    host: a ring buffer was handed to the copies  reading into it
              event `copied` of that buffer
    copier    host: the block was read                      enqueueing its copy
              host: the slot's last use was enqueued
              copy queue: event `free` of the slot
    main      host: the copy was enqueued                   handing the slot to the model
              compute queue: event `full` of the slot

Neither the main thread nor a queue ever waits for a whole device, and nothing is allocated after
construction. Every wait goes through `Lanes`, so that `tools/stream_simulator.py` can play them.

Covered: order and life of slots and buffers. Not covered: how many there are (the plan), and what
lies where inside a block.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

from torch import Tensor

from zquant.memory.lanes import Event, Lanes, StreamedBlock

__all__ = ["BlockStream", "StreamReport", "StreamShape", "StreamedBlock"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamShape:
    """How much memory a stream gets; decided by the plan.

    Attributes:
        n_slots: places for blocks on the device, at least 2.
        n_ring: host buffers that are refilled from the file; 0 where compute uses host memory.
        kept: indices of blocks with a host buffer of their own, read from the file once.
    """

    n_slots: int
    n_ring: int
    kept: frozenset[int]

    def __post_init__(self) -> None:
        if self.n_slots < 2 or self.n_ring < 0:
            raise ValueError(
                f"a stream needs 2 slots or more and no negative ring; got {self.n_slots} slots "
                f"and a ring of {self.n_ring}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamReport:
    """What a stream has done since it was made.

    Attributes:
        bytes_read: from files.
        bytes_copied: from host to device.
        waited_s: how long `using` had to wait, in seconds.
        pinned: all host buffers are page-locked.
        reason: why they are not; empty when they are.
    """

    bytes_read: int
    bytes_copied: int
    waited_s: float
    pinned: bool
    reason: str


@dataclass(frozen=True, slots=True)
class _Slot:
    memory: Tensor
    free: Event  # on the compute queue, after the last use
    full: Event  # on the copy queue, after the copy


@dataclass(frozen=True, slots=True)
class _Buffer:
    memory: Tensor
    copied: Event  # on the copy queue, after the copy


class _Stopped(Exception):  # noqa: N818 # a request, not a fault
    """The stream is being closed or rewound."""


class BlockStream:
    """Hands out `blocks` one by one, in cyclic order, fetching the next ones meanwhile.

    One thread uses it. It takes `lanes` over and closes them.

    Args:
        blocks: in the order in which they are used.
        shape: how many slots and buffers.
        lanes: of the device that computes.
    """

    def __init__(self, blocks: Sequence[StreamedBlock], shape: StreamShape, lanes: Lanes) -> None:
        self._blocks, self._lanes = tuple(blocks), lanes
        self._filled: set[int] = set()  # kept blocks that were read
        self._bytes_read = self._bytes_copied = 0
        self._waited_s = 0.0
        self._in_use = self._closed = False
        # the thread whose failure means that no further block will come
        self._last = "reader" if lanes.direct else "copier"
        try:
            self._allocate(shape)
        except BaseException:
            lanes.close()
            raise
        self._start()

    @contextmanager
    def using(self, index: int) -> Iterator[Tensor]:
        """Block `index` in a slot, from here to the end of the with-block.

        Work that is enqueued inside comes after the copy, and the slot is not refilled before
        that work is done.

        Args:
            index: the one after the last; after the last block, or `rewind`, 0.

        Returns:
            uint8 `[slot bytes]` on the device; the block is in its first bytes.

        Raises:
            Exception: what reading this block raised; from then on only `rewind` and `close` work.
        """
        expected = self._used % len(self._blocks)
        assert not self._closed, f"block {index} of a closed stream"
        assert not self._broken, f"block {index} of a stream that failed; rewind it"
        assert not self._in_use, f"block {index} inside the use of block {expected}"
        assert index == expected, f"block {index} out of turn; the next is {expected}"
        slot = self._slots[self._used % len(self._slots)]
        began = self._lanes.now()
        self._lanes.until(self._is_loaded, self._has_failed)
        self._waited_s += self._lanes.now() - began
        if self._has_failed() and not self._is_loaded():
            raise self._take_failure()
        self._lanes.wait("compute", slot.full)
        self._in_use = True
        try:
            yield slot.memory
        finally:
            self._lanes.record("compute", slot.free)
            self._in_use = False
            self._used += 1
            self._lanes.notify()

    def rewind(self) -> None:
        """Begin again at block 0; costs nothing where that is the next one anyhow."""
        assert not self._closed, "rewind of a closed stream"
        assert not self._in_use, "rewind inside the use of a block"
        if self._broken or self._used % len(self._blocks):
            self._stop()
            self._start()

    def close(self) -> None:
        """End the threads and free all memory; waits for a read that is in progress."""
        if self._closed:
            return
        self._stop()
        for buffer in (*self._ring, *self._kept.values()):
            self._lanes.synchronize(buffer.copied)
        self._lanes.close()
        self._slots.clear()
        self._ring.clear()
        self._kept.clear()
        self._free.clear()
        self._staged.clear()
        self._failures.clear()
        self._closed = True

    @property
    def report(self) -> StreamReport:
        """What was moved until now; also of a closed stream."""
        return StreamReport(
            bytes_read=self._bytes_read,
            bytes_copied=self._bytes_copied,
            waited_s=self._waited_s,
            pinned=not self._lanes.reason,
            reason=self._lanes.reason,
        )

    def _allocate(self, shape: StreamShape) -> None:
        """Everything that is ever allocated."""
        lanes, sizes = self._lanes, [block.n_bytes for block in self._blocks]
        staged = [size for i, size in enumerate(sizes) if i not in shape.kept]
        assert sizes, "no blocks to stream"
        assert shape.kept <= set(range(len(sizes))), f"kept blocks {shape.kept} of {len(sizes)}"
        if lanes.direct:
            assert not shape.kept, "host buffers where blocks are read into slots"
            assert not shape.n_ring, "a ring where blocks are read into slots"
        else:
            assert shape.n_ring or not staged, f"no ring for {len(staged)} blocks"

        def buffer(n_bytes: int) -> _Buffer:
            return _Buffer(lanes.buffer(n_bytes), lanes.event())

        self._slots = [
            _Slot(lanes.slot(max(sizes)), lanes.event(), lanes.event())
            for _ in range(shape.n_slots)
        ]
        for slot in self._slots:
            # its memory may be in use by what was enqueued before it was freed and given to us
            lanes.record("compute", slot.free)
        self._ring = [buffer(max(staged)) for _ in range(shape.n_ring)] if staged else []
        self._kept = {i: buffer(sizes[i]) for i in sorted(shape.kept)}

    def _start(self) -> None:
        """Threads at block 0. Buffers and slots keep their events: copies may be under way."""
        self._used = self._loaded = 0  # turns: block `turn % n_blocks` in slot `turn % n_slots`
        self._stopping = self._broken = False
        self._failures: dict[str, BaseException] = {}
        self._free = deque(self._ring)
        self._staged: deque[_Buffer] = deque()
        if self._lanes.direct:
            self._work("reader", self._read_into_slots)
        else:
            self._work("reader", self._read_into_buffers)
            self._work("copier", self._copy_into_slots)

    def _stop(self) -> None:
        self._stopping = True
        self._lanes.notify()
        self._lanes.join()

    def _work(self, name: str, loop: Callable[[], None]) -> None:
        def work() -> None:
            try:
                self._lanes.enter()
                loop()
            except _Stopped:
                pass
            except BaseException as error:  # raised again by the use that misses the block
                self._failures[name] = error
                self._lanes.notify()

        self._lanes.start(name, work)

    # the loops of the two threads

    def _read_into_buffers(self) -> None:
        while to_read := [i for i in range(len(self._blocks)) if i not in self._filled]:
            for index in to_read:
                if index in self._kept:
                    self._read(index, self._kept[index].memory)
                    self._filled.add(index)
                else:
                    self._wait(self._has_free_buffer)
                    buffer = self._free.popleft()
                    self._lanes.synchronize(buffer.copied)
                    self._read(index, buffer.memory)
                    self._staged.append(buffer)
                self._lanes.notify()

    def _copy_into_slots(self) -> None:
        for turn in count():
            index = turn % len(self._blocks)
            self._wait(self._is_read)
            if "reader" in self._failures and not self._can_copy(index):
                raise self._failures["reader"]
            self._wait(self._has_free_slot)
            buffer = self._kept[index] if index in self._kept else self._staged.popleft()
            self._copy(index, buffer, self._slots[turn % len(self._slots)])
            if index not in self._kept:
                self._free.append(buffer)
            self._loaded += 1
            self._lanes.notify()

    def _read_into_slots(self) -> None:
        for turn in count():
            self._wait(self._has_free_slot)
            self._read(turn % len(self._blocks), self._slots[turn % len(self._slots)].memory)
            self._loaded += 1
            self._lanes.notify()

    def _read(self, index: int, memory: Tensor) -> None:
        if self._stopping:
            raise _Stopped
        self._lanes.read(self._blocks[index], memory)
        self._bytes_read += self._blocks[index].n_bytes

    def _copy(self, index: int, buffer: _Buffer, slot: _Slot) -> None:
        n_bytes = self._blocks[index].n_bytes
        self._lanes.wait("copy", slot.free)
        self._lanes.copy(slot.memory, buffer.memory, n_bytes)
        self._lanes.record("copy", slot.full)
        self._lanes.record("copy", buffer.copied)
        self._bytes_copied += n_bytes

    # what threads wait for

    def _wait(self, condition: Callable[[], bool]) -> None:
        self._lanes.until(condition, self._is_stopping)
        if self._stopping:
            raise _Stopped

    def _is_stopping(self) -> bool:
        return self._stopping

    def _has_failed(self) -> bool:
        return self._last in self._failures

    def _has_free_buffer(self) -> bool:
        return bool(self._free)

    def _has_free_slot(self) -> bool:
        return self._loaded < self._used + len(self._slots)

    def _is_loaded(self) -> bool:
        return self._loaded > self._used

    def _is_read(self) -> bool:
        """The copier's next block, or the news that it will never come."""
        return self._can_copy(self._loaded % len(self._blocks)) or "reader" in self._failures

    def _can_copy(self, index: int) -> bool:
        # the reader keeps the order of the blocks: what is staged first is the next of its kind
        return index in self._filled if index in self._kept else bool(self._staged)

    def _take_failure(self) -> BaseException:
        # in no local variable: the error holds the frames that it passed, and they would hold it
        self._broken = True
        try:
            return self._failures[self._last]
        finally:
            self._failures.clear()
