"""The block stream in every order that its actors can go on in, and by a virtual clock."""

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence

import pytest
from simulated_lanes import EARLIER, Chooser, Machine, SimulatedLanes
from stream_simulator import (
    Clock,
    Play,
    Seeded,
    SimulatedBlock,
    Use,
    every_order,
    forward,
    overlap,
    random_play,
    step_seconds,
)

from zquant.memory.stream import BlockStream, StreamShape

PINNED, PAGEABLE, DIRECT = Machine(), Machine(pinned=False), Machine(direct=True)
MACHINES = pytest.mark.parametrize(
    "machine", [PINNED, PAGEABLE, DIRECT], ids=["pinned", "pageable", "direct"]
)


def plays(n: int, machine: Machine, *, fails: bool = False) -> Iterator[tuple[Play, random.Random]]:
    for seed in range(n):
        lanes = SimulatedLanes(Seeded(seed), machine)
        yield random_play(seed, lanes, fails=fails), random.Random(seed)


# every order; a failure names no seed, but stops at the same one every time


@MACHINES
def test_no_order_has_a_hazard(machine: Machine) -> None:
    for play, rng in plays(50, machine):
        n_laps, blocks, shape = rng.randint(1, 3), play.blocks, play.shape
        uses = []
        for block in blocks:
            uses += [Use(None, 1.0)] * rng.choice((0, 0, 1, 2)) + [Use(block.n_bytes, 1.0)]
        for _ in range(n_laps):
            forward(play.stream, play.lanes, uses)
        play.stream.close()
        for i, block in enumerate(blocks):
            most_ahead = 0 if i in shape.kept else shape.n_slots + shape.n_ring
            n_needed = 1 if i in shape.kept else n_laps
            assert n_needed <= block.n_reads <= n_needed + most_ahead
        report, used = play.stream.report, n_laps * sum(b.n_bytes for b in blocks)
        assert report.bytes_read == sum(b.n_bytes * b.n_reads for b in blocks)
        assert report.pinned == machine.pinned
        most_ahead = shape.n_slots * max(b.n_bytes for b in blocks)
        if machine.direct:
            assert report.bytes_copied == 0
        else:
            assert used <= report.bytes_copied <= used + most_ahead


@MACHINES
def test_rewinding_in_the_middle_of_a_lap_is_safe(machine: Machine) -> None:
    for play, rng in plays(25, machine):
        for _ in range(3):
            play.lap(rng.randint(0, len(play.blocks)))
            play.stream.rewind()
        play.lap()
        play.stream.close()
        assert all(play.blocks[i].n_reads == 1 for i in play.shape.kept)


@MACHINES
def test_closing_at_any_time_is_safe(machine: Machine) -> None:
    for play, rng in plays(25, machine):
        for _ in range(rng.randint(0, 1)):
            play.lap()
        play.lap(rng.randint(0, len(play.blocks)))
        play.stream.close()
        play.stream.close()


@MACHINES
def test_a_failed_read_is_raised_by_the_use_that_misses_it_and_only_there(machine: Machine) -> None:
    for play, rng in plays(25, machine, fails=True):
        ((index, when),) = play.fails.items()
        for _ in range(when):
            play.lap()
        play.lap(index)
        with pytest.raises(OSError, match=f"cannot read block {index}"):
            play.use(index)
        with pytest.raises(AssertionError, match="a stream that failed; rewind it"):
            play.use(index)
        if rng.random() < 0.5:
            play.stream.rewind()
            play.lap()
        play.stream.close()


@MACHINES
def test_a_failed_read_that_nobody_misses_does_not_keep_the_stream_from_closing(
    machine: Machine,
) -> None:
    for play, rng in plays(25, machine, fails=True):
        ((index, when),) = play.fails.items()
        play.lap(rng.randint(0, index) if when == 0 else None)
        if rng.random() < 0.5:
            play.stream.rewind()
        play.stream.close()


def test_closing_does_not_wait_for_reads_that_have_not_begun() -> None:
    shape = StreamShape(n_slots=2, n_ring=1, kept=frozenset(range(4)))
    play = Play(SimulatedLanes(Clock(), PINNED), shape, 6)
    play.stream.close()
    assert [block.n_reads for block in play.blocks] == [0] * 6


def once(play: Play) -> None:
    play.lap()


def begun(play: Play) -> None:
    play.lap(1)


def twice(play: Play) -> None:
    play.lap()
    play.lap()


def rewound(play: Play) -> None:
    play.lap(1)
    play.stream.rewind()


def failing(play: Play) -> None:
    play.lap(1)
    with pytest.raises(OSError, match="cannot read"):
        play.use(1)


@pytest.mark.parametrize(
    ("program", "machine", "n_blocks", "kept"),
    [
        pytest.param(once, PINNED, 2, {}, id="a ring"),
        pytest.param(begun, PINNED, 2, {0}, id="a ring and a kept block"),
        pytest.param(once, PINNED, 1, {0}, id="a kept block"),
        pytest.param(begun, PAGEABLE, 2, {}, id="pageable"),
        pytest.param(twice, DIRECT, 3, {}, id="direct"),
        pytest.param(rewound, PINNED, 2, {}, id="rewound"),
        pytest.param(rewound, DIRECT, 2, {}, id="direct and rewound"),
        pytest.param(failing, PINNED, 2, {}, id="failing"),
    ],
)
def test_small_cases_have_no_hazard_in_any_order(
    program: Callable[[Play], None], machine: Machine, n_blocks: int, kept: Collection[int]
) -> None:
    shape = StreamShape(n_slots=2, n_ring=0 if machine.direct else 1, kept=frozenset(kept))

    def play(chooser: Chooser) -> None:
        lanes = SimulatedLanes(chooser, machine)
        played = Play(lanes, shape, n_blocks, {1: 0} if program is failing else {})
        program(played)
        played.stream.close()

    assert every_order(play) > 30


@pytest.mark.parametrize(("n_slots", "n_ring"), [(1, 1), (2, -1)])
def test_a_stream_needs_two_slots(n_slots: int, n_ring: int) -> None:
    with pytest.raises(ValueError, match=f"got {n_slots} slots and a ring of {n_ring}"):
        StreamShape(n_slots=n_slots, n_ring=n_ring, kept=frozenset())


# by the clock

LINK = 2.0**20  # bytes per second
EVERY_THIRD = frozenset(range(0, 33, 3))


def uses_of(n_streamed: int, compute_s: float, copy_s: float, n_resident: int = 0) -> list[Use]:
    """Streamed blocks first."""
    streamed = [Use(int(copy_s * LINK), compute_s)] * n_streamed
    return streamed + [Use(None, compute_s)] * n_resident


def seconds(uses: Sequence[Use], shape: StreamShape, *, disk: float = 1e30) -> list[float]:
    return step_seconds(uses, shape, link_bytes_s=LINK, disk_bytes_s=disk, steps=4)


def kept_shape(n: int, n_slots: int = 2) -> StreamShape:
    return StreamShape(n_slots=n_slots, n_ring=1, kept=frozenset(range(n)))


def test_copies_that_are_faster_than_compute_cost_only_the_first_fill() -> None:
    first, *rest = seconds(uses_of(34, 0.5, 0.25, 2), kept_shape(34))
    assert first == 36 * 0.5 + 0.25
    assert rest == [36 * 0.5] * 3


def test_copies_that_are_slower_than_compute_take_what_the_link_takes() -> None:
    _, *rest = seconds(uses_of(34, 0.25, 0.5), kept_shape(34))
    assert rest == [34 * 0.5] * 3


def test_a_slow_disk_takes_what_the_disk_takes_for_blocks_that_are_not_kept() -> None:
    uses, third = uses_of(33, 0.25, 0.125), StreamShape(n_slots=2, n_ring=2, kept=EVERY_THIRD)
    assert seconds(uses, third, disk=LINK / 8)[1:] == [22 * 1.0] * 3
    # all in a row they keep the disk waiting for a free buffer
    row = StreamShape(n_slots=2, n_ring=2, kept=frozenset(range(11)))
    assert seconds(uses, row, disk=LINK / 8)[-1] > 22 * 1.0


def test_residents_hide_copies_only_as_far_as_slots_reach() -> None:
    uses = uses_of(4, 0.25, 1.0, 16)
    assert seconds(uses, kept_shape(4, n_slots=2))[-1] > seconds(uses, kept_shape(4, n_slots=4))[-1]
    # spread between the residents they are all hidden
    spread = [use for i in range(4) for use in (uses[i], *uses[4 + 4 * i : 8 + 4 * i])]
    assert seconds(spread, kept_shape(4))[1:] == [20 * 0.25] * 3


def test_no_stream_takes_the_compute_time() -> None:
    uses = uses_of(0, 0.25, 1.0, 3)
    assert seconds(uses, kept_shape(0)) == [0.75] * 4


def test_disk_and_link_work_ahead_as_far_as_ring_and_slots_reach() -> None:
    lanes = SimulatedLanes(Clock(), Machine(link_bytes_s=LINK, disk_bytes_s=LINK))
    blocks = [SimulatedBlock(str(i), 2**10) for i in range(8)]
    stream = BlockStream(blocks, StreamShape(n_slots=2, n_ring=3, kept=frozenset()), lanes)
    forward(stream, lanes, [Use(2**10, 100.0)] * 8)
    end = next(s.end for s in lanes.spans if s.lane == "compute" and s.name == "0")
    done = Counter(s.lane for s in lanes.spans if s.end < end)
    assert (done["disk"], done["copy"]) == (2 + 3, 2)
    stream.close()


def test_copies_and_compute_overlap_and_the_host_waits_for_reads_only() -> None:
    lanes = SimulatedLanes(Clock(), Machine(link_bytes_s=LINK, disk_bytes_s=LINK * 4))
    uses = uses_of(8, 0.5, 0.25)
    blocks = [SimulatedBlock(str(i), use.n_bytes or 0) for i, use in enumerate(uses)]
    stream = BlockStream(blocks, kept_shape(8), lanes)
    forward(stream, lanes, uses)
    step = [span for span in lanes.spans if span.lane != "disk" and span.name != EARLIER]
    # 8 blocks and one that was fetched ahead; the first copy has nothing beside it
    assert overlap(step) == 1 - 0.25 / (9 * 0.25)
    assert stream.report.waited_s == 8 * 0.25 / 4
    stream.close()
