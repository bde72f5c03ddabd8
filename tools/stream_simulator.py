"""Plays the real `BlockStream` on simulated lanes, in every order and at any speed.

    Clock        the first by a virtual clock goes on: a time line from rates, always the same
    Seeded       anyone who can, at random: whatever takes long or short, some seed has it
    every_order  one order after the other, until all states of a small case were seen

`step_seconds` is what a step takes by the clock.
"""

import random
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from simulated_lanes import Chooser, Machine, Preempts, SimulatedLanes, Span

from zquant.memory.stream import BlockStream, StreamShape


class Clock:
    """Virtual time: the earliest goes on, threads first."""

    preempts: Preempts = "never"

    def choose(self, enabled: Sequence[tuple[float, str]], state: Callable[[], Hashable]) -> int:  # noqa: ARG002 # time is all
        """The earliest."""
        return min(range(len(enabled)), key=lambda i: enabled[i][0])


class Seeded:
    """Random orders; in every seed other actors are slow or fast."""

    preempts: Preempts = "always"

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._weights: dict[str, float] = {}

    def choose(self, enabled: Sequence[tuple[float, str]], state: Callable[[], Hashable]) -> int:  # noqa: ARG002 # has no memory
        """Anyone."""
        for _, name in enabled:
            if name not in self._weights:
                self._weights[name] = self._random.choice((0.01, 1.0, 1.0, 1.0, 100.0))
        weights = [self._weights[name] for _, name in enabled]
        return self._random.choices(range(len(enabled)), weights)[0]


class _Known(Exception):  # noqa: N818 # a shortcut, not a fault
    """The rest of this play was seen before."""


class _Ordered:
    """Follows `path`, then lets everybody go on for as long as they can, up to a known state."""

    preempts: Preempts = "where threads meet"

    def __init__(self, path: list[int], seen: set[Hashable]) -> None:
        self.path, self._given, self._seen = path, len(path), seen
        self._n_enabled: list[int] = []
        self._last = ""

    def choose(self, enabled: Sequence[tuple[float, str]], state: Callable[[], Hashable]) -> int:
        """As given, then who went on last."""
        step, names = len(self._n_enabled), [name for _, name in enabled]
        self._n_enabled.append(len(enabled))
        if step == len(self.path):
            now = state()
            if now in self._seen:
                raise _Known
            self._seen.add(now)
            self.path.append(names.index(self._last) if self._last in names else 0)
        self._last = names[self.path[step]]
        return self.path[step]

    def others(self) -> Iterator[list[int]]:
        """The paths that it passed by."""
        for step in range(self._given, len(self.path)):
            for other in range(self._n_enabled[step]):
                if other != self.path[step]:
                    yield [*self.path[:step], other]


def every_order(play: Callable[[Chooser], None]) -> int:
    """Call `play` until every state that any order leads to was seen; the number of states.

    Raises:
        Hazard: some order leads to one; likewise Deadlock.
    """
    seen: set[Hashable] = set()
    paths: deque[list[int]] = deque([[]])
    while paths:
        chooser = _Ordered(paths.popleft(), seen)
        with suppress(_Known):
            play(chooser)
        paths += chooser.others()
    return len(seen)


@dataclass(slots=True)
class SimulatedBlock:
    """A block without bytes; reading it fails for the `fails_at`-th time (0: the first)."""

    name: str
    n_bytes: int
    fails_at: int | None = None
    n_reads: int = 0

    def read_into(self, out: npt.NDArray[np.uint8]) -> None:
        """Count."""
        assert out.shape == (self.n_bytes,)
        self.n_reads += 1
        if self.n_reads - 1 == self.fails_at:
            raise OSError(f"cannot read block {self.name}")


class Play:
    """A stream of `n_blocks` small blocks on simulated lanes, and a model that uses them.

    Args:
        lanes: fresh ones.
        shape: of the stream.
        n_blocks: of different sizes.
        fails: block -> which of its reads fails, 0 for the first.
    """

    def __init__(
        self,
        lanes: SimulatedLanes,
        shape: StreamShape,
        n_blocks: int,
        fails: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self.lanes, self.shape, self.fails = lanes, shape, fails
        self.blocks = [
            SimulatedBlock(str(i), 256 * (i + 1), fails_at=fails.get(i)) for i in range(n_blocks)
        ]
        self.stream = BlockStream(self.blocks, shape, lanes)

    def use(self, index: int) -> None:
        """Compute with one block."""
        with self.stream.using(index) as slot:
            self.lanes.compute(str(index), 1.0, slot)

    def lap(self, upto: int | None = None) -> None:
        """Use all blocks, or those before `upto`."""
        for index in range(len(self.blocks))[:upto]:
            self.use(index)


def random_play(seed: int, lanes: SimulatedLanes, *, fails: bool = False) -> Play:
    """1 to 6 blocks, any of them kept, 2 or 3 slots, a ring of 1 to 3; one block may fail."""
    rng = random.Random(seed)
    n_blocks = rng.randint(1, 6)
    kept = [i for i in range(n_blocks) if rng.random() < rng.choice((0, 0.5, 1))]
    n_slots, n_ring = rng.randint(2, 3), rng.randint(1, 3)
    if lanes.direct:
        n_ring, kept = 0, []
    failing = rng.randrange(n_blocks)
    when = 0 if failing in kept else rng.randint(0, 1)
    shape = StreamShape(n_slots=n_slots, n_ring=n_ring, kept=frozenset(kept))
    return Play(lanes, shape, n_blocks, {failing: when} if fails else {})


@dataclass(frozen=True, slots=True)
class Use:
    """A block in the order of the forward pass; `n_bytes` None for one that is resident."""

    n_bytes: int | None
    seconds: float


def forward(stream: BlockStream | None, lanes: SimulatedLanes, uses: Sequence[Use]) -> None:
    """One forward pass: enqueue everything and wait for the end of compute.

    The names of the stream's blocks are "0", "1", ...
    """
    index = 0
    for use in uses:
        if use.n_bytes is None:
            lanes.compute("resident", use.seconds)
            continue
        assert stream is not None
        with stream.using(index) as slot:
            lanes.compute(str(index), use.seconds, slot)
        index += 1
    lanes.finish()


def step_seconds(
    uses: Sequence[Use],
    shape: StreamShape,
    *,
    link_bytes_s: float,
    disk_bytes_s: float,
    steps: int,
) -> list[float]:
    """Seconds of every step by the virtual clock; the first one also fills the slots.

    Args:
        uses: the blocks of a step.
        shape: of the stream; ignored where nothing is streamed.
        link_bytes_s: host to device.
        disk_bytes_s: file to host memory.
        steps: how many.
    """
    lanes = SimulatedLanes(Clock(), Machine(link_bytes_s=link_bytes_s, disk_bytes_s=disk_bytes_s))
    sizes = [use.n_bytes for use in uses if use.n_bytes is not None]
    blocks = [SimulatedBlock(str(i), n_bytes) for i, n_bytes in enumerate(sizes)]
    stream = BlockStream(blocks, shape, lanes) if blocks else None
    ends = [0.0]
    for _ in range(steps):
        forward(stream, lanes, uses)
        ends.append(lanes.clock)
    if stream is not None:
        stream.close()
    return [end - start for start, end in pairwise(ends)]


def overlap(spans: Sequence[Span]) -> float:
    """The share of the shorter of copies and compute that ran beside the longer; 1 is all."""
    copy, compute = (
        sum(s.end - s.start for s in spans if s.lane == lane) for lane in ("copy", "compute")
    )
    wall = max(s.end for s in spans) - min(s.start for s in spans)
    return 1 - (wall - max(copy, compute)) / min(copy, compute)
