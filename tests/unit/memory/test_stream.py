"""The block stream with real threads and files on a CPU."""

import gc
import threading
import weakref

import pytest
import torch

from tests.unit.memory.stream_testing import (
    FileBlock,
    blocks,
    check_lap,
    deadline,
    n_threads,
    use,
)
from zquant.errors import FormatError
from zquant.memory.lanes import HostLanes
from zquant.memory.stream import BlockStream, StreamShape

__all__ = ["blocks", "deadline"]  # fixtures


def host_stream(blocks: list[FileBlock], n_slots: int = 2) -> BlockStream:
    shape = StreamShape(n_slots=n_slots, n_ring=0, kept=frozenset())
    return BlockStream(blocks, shape, HostLanes())


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
    stream._lanes.join()  # the reader's frame ends with its thread
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
    closing.join(0.2)
    assert closing.is_alive()
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
