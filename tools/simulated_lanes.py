"""The lanes of the block stream, played: simulated memory, queues and disk under real threads.

One actor goes on at a time: the stream's threads, the copy queue, the compute queue or the disk.
At the calls of `SimulatedLanes` a `Chooser` says which; see `stream_simulator`. Events mean what
they mean in CUDA: a wait is for the last mark that was recorded before the call, and for nothing
if there was none. A `Hazard` is raised where

    compute begins in a slot that does not hold its block, complete and of the last copy
    a copy or a read begins to write a slot that earlier compute has not done with
    a read begins to write a buffer that a copy has not done with, or a copy reads one not filled
    memory is given back while a copy or a read is under way

and a `Deadlock` where nobody can go on. Work begins as soon as it can and ends when it is chosen:
what it needs or spoils counts for the whole of that time, so that a later beginning shows no more.
Not covered: what threads do to each other between two calls, and more than one device.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from zquant.memory.lanes import Queue, StreamedBlock

Condition: TypeAlias = Callable[[], bool]
Preempts: TypeAlias = Literal["never", "where threads meet", "always"]
EARLIER = "earlier work"  # in memory that a slot takes over
MOST_CHOICES = 2_000_000  # in one play; more means that somebody never stops


class Hazard(Exception):  # noqa: N818 # a verdict on the stream
    """Memory is used by two at a time, or before it is filled."""


class Deadlock(Exception):  # noqa: N818 # likewise
    """Nobody can go on, or somebody never stops."""


class Chooser(Protocol):
    """Decides who goes on; `preempts`: the calls at which a thread has to be chosen to go on."""

    preempts: Preempts

    def choose(self, enabled: Sequence[tuple[float, str]], state: Callable[[], Hashable]) -> int:
        """Index into `enabled`: the time at which each can go on, and its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is simulated; a copy from memory that is not `pinned` blocks the thread."""

    link_bytes_s: float = math.inf
    disk_bytes_s: float = math.inf
    pinned: bool = True
    direct: bool = False


@dataclass(frozen=True, slots=True)
class Span:
    """What a lane did for some time: "copy", "compute" or "disk"."""

    lane: str
    name: str
    start: float
    end: float


@dataclass(slots=True)
class _Event:
    recorded: int = 0  # marks
    reached: int = 0  # the last mark that its queue has passed


@dataclass(slots=True)
class _Memory:
    name: str
    holds: StreamedBlock | None = None
    fills: int = 0  # copies or reads into it that were asked for
    filled: int = 0  # the last of them that is complete
    n_copies: int = 0  # from it, not ended
    uses: list[int] = field(default_factory=list)  # by compute, not ended: the fill that each needs


def _always() -> bool:
    return True


def _nothing() -> None:
    pass


@dataclass(slots=True, eq=False)
class _Op:
    """Work of a lane; what is `instant` ends as it begins."""

    name: str
    seconds: float = 0.0
    instant: bool = False
    ready: Condition = _always
    begin: Callable[[], None] = _nothing
    end: Callable[[], None] = _nothing
    began: float | None = None
    done: bool = False


@dataclass(slots=True, eq=False)
class _Lane:
    name: str
    ops: deque[_Op] = field(default_factory=deque)
    n_done: int = 0

    @property
    def can_begin(self) -> bool:
        return bool(self.ops) and self.ops[0].began is None and self.ops[0].ready()


@dataclass(slots=True, eq=False)
class _Thread:
    name: str
    baton: threading.Lock = field(default_factory=threading.Lock)
    ready: Condition = _always
    doing: str = "begin"
    history: int = 0  # hash of its calls
    conditions: tuple[Condition, ...] = ()
    awake: bool = True
    ended: bool = False
    real: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.baton.acquire()


class SimulatedLanes:
    """`zquant.memory.lanes.Lanes`, played. The thread that makes one is "main".

    Attributes:
        clock: virtual time in seconds.
        spans: what took time so far, in order of its end.
    """

    enter = staticmethod(lambda: None)  # any thread may use this device

    def __init__(self, chooser: Chooser, machine: Machine) -> None:
        self.direct, self.machine = machine.direct, machine
        self.reason = "" if machine.pinned else "the machine refuses"
        self.clock, self.spans = 0.0, list[Span]()
        self._chooser, self._n_choices = chooser, 0
        self._lanes = {name: _Lane(name) for name in ("copy", "compute", "disk")}
        self._threads = [_Thread("main")]
        self._local = threading.local()
        self._local.me = self._threads[0]
        self._tensors: list[Tensor] = []
        self._memories: dict[int, _Memory] = {}
        self._failure: Exception | None = None

    def compute(self, name: str, seconds: float, slot: Tensor | None = None) -> None:
        """What the model does: enqueue work, which needs block `name` in `slot` if there is one."""
        self._call("compute")
        op = _Op(name, seconds)
        if slot is not None:
            memory = self._memories[id(slot)]
            fill = memory.fills
            memory.uses.append(fill)

            def begin() -> None:
                held = memory.holds.name if memory.holds else ""
                if name != EARLIER and (held != name or memory.filled != fill):
                    raise Hazard(f"compute of block {name} in {memory}")

            op.begin, op.end = begin, lambda: memory.uses.remove(fill)
        self._lanes["compute"].ops.append(op)
        if self.direct:
            self._call("computing", lambda: op.done)

    def finish(self) -> None:
        """What the model does at the end of a step: wait for the compute queue."""
        self._call("finish", lambda: not self._lanes["compute"].ops)

    def slot(self, n_bytes: int) -> Tensor:
        """Memory that earlier work still uses."""
        tensor = self._allocate("slot", n_bytes)
        self.compute(EARLIER, 0.0, tensor)
        return tensor

    def buffer(self, n_bytes: int) -> Tensor:
        """Memory."""
        return self._allocate("buffer", n_bytes)

    def event(self) -> _Event:
        """An event."""
        return _Event()

    def record(self, queue: Queue, event: _Event) -> None:
        """Mark the queue."""
        self._call(f"record on {queue}", meets=True)
        event.recorded += 1
        mark = event.recorded

        def reach() -> None:
            event.reached = mark

        self._lanes[queue].ops.append(_Op("record", instant=True, end=reach))

    def wait(self, queue: Queue, event: _Event) -> None:
        """Make the queue wait."""
        self._call(f"wait on {queue}", meets=True)
        mark = event.recorded
        op = _Op("wait", instant=True, ready=lambda: event.reached >= mark)
        self._lanes[queue].ops.append(op)

    def synchronize(self, event: _Event) -> None:
        """Wait."""
        self._call("synchronize", meets=True)
        mark = event.recorded
        self._call(f"synchronizing {mark}", lambda: event.reached >= mark)

    def copy(self, slot: Tensor, buffer: Tensor, n_bytes: int) -> None:
        """Enqueue a copy."""
        self._call("copy")
        source, memory = self._memories[id(buffer)], self._memories[id(slot)]
        memory.fills += 1
        source.n_copies += 1
        fill = memory.fills

        def begin() -> None:
            if source.holds is None or source.holds.n_bytes != n_bytes:
                raise Hazard(f"a copy of {n_bytes} bytes from {source}")
            self._overwrite(memory, fill)

        def end() -> None:
            memory.holds, memory.filled = source.holds, fill
            source.n_copies -= 1

        op = _Op(f"to {memory.name}", n_bytes / self.machine.link_bytes_s, begin=begin, end=end)
        self._lanes["copy"].ops.append(op)
        if not self.machine.pinned:
            self._call("copying", lambda: op.done)

    def read(self, block: StreamedBlock, memory: Tensor) -> None:
        """Read from the disk."""
        self._call("read", meets=True)
        to = self._memories[id(memory)]
        to.fills += 1
        fill = to.fills
        seconds = block.n_bytes / self.machine.disk_bytes_s
        op = _Op(block.name, seconds, begin=lambda: self._overwrite(to, fill))
        self._lanes["disk"].ops.append(op)
        self._call("reading", lambda: op.done)
        block.read_into(np.broadcast_to(np.zeros(1, np.uint8), block.n_bytes))
        to.holds, to.filled = block, fill

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Add an actor."""
        self._call("start")
        me = _Thread(name)

        def play() -> None:
            me.baton.acquire()
            self._local.me = me
            try:
                work()
                me.ended = True
                self._pass_on(me)
            except Exception as error:
                self._fail(error)

        me.real = threading.Thread(target=play, name=name, daemon=True)
        self._threads.append(me)
        me.real.start()

    def join(self) -> None:
        """Wait for all of them."""
        self._call("join", lambda: all(each.ended for each in self._threads[1:]))
        for each in self._threads[1:]:
            assert each.real is not None
            each.real.join()
        del self._threads[1:]

    def until(self, *conditions: Condition) -> None:
        """Sleep until `notify` finds that a condition holds."""
        me: _Thread = self._local.me
        name = f"until {conditions[0].__name__}"
        self._call(name)
        me.conditions = conditions
        me.awake = any(holds() for holds in conditions)
        if not me.awake:
            self._call(f"asleep {name}", lambda: me.awake)

    def notify(self) -> None:
        """Wake who can go on."""
        self._call("notify")
        for each in self._threads:
            each.awake = each.awake or any(holds() for holds in each.conditions)

    def now(self) -> float:
        """Virtual time."""
        return self.clock

    def close(self) -> None:
        """Give memory back."""
        self._call("close")
        if self._lanes["copy"].ops or self._lanes["disk"].ops:
            raise Hazard(f"memory is given back under way\n{self._picture()}")

    def _allocate(self, kind: str, n_bytes: int) -> Tensor:
        tensor = torch.empty(n_bytes, dtype=torch.uint8, device="meta")  # takes no memory
        self._memories[id(tensor)] = _Memory(f"{kind} {len(self._tensors)}")
        self._tensors.append(tensor)
        return tensor

    def _overwrite(self, memory: _Memory, fill: int) -> None:
        if memory.n_copies or any(use < fill for use in memory.uses):
            raise Hazard(f"fill {fill} of {memory}, which is in use")
        memory.holds = None

    # who goes on

    def _call(self, doing: str, ready: Condition = _always, *, meets: bool = False) -> None:
        """Where another may go on; the caller does when it is chosen and `ready`."""
        me: _Thread = self._local.me
        if self._failure:
            raise self._failure
        if ready is _always:  # whether it had to wait before makes no difference after
            me.history = hash((me.history, doing))
        mode = self._chooser.preempts
        if mode == "always" or (meets and mode != "never") or not ready():
            me.doing, me.ready = doing, ready
            self._pass_on(me)

    def _pass_on(self, me: _Thread) -> None:
        try:
            while isinstance(who := self._choose(), _Lane):
                self._end(who)
        except Exception as error:
            self._fail(error)
            raise
        if who is me:
            return
        who.baton.release()
        if not me.ended:
            me.baton.acquire()
            if self._failure:
                raise self._failure

    def _choose(self) -> _Thread | _Lane:
        self._begin()
        enabled: list[tuple[float, _Thread | _Lane]] = []
        enabled += [(self.clock, t) for t in self._threads if not t.ended and t.ready()]
        busy = [lane for lane in self._lanes.values() if lane.ops]
        enabled += [(op.began + op.seconds, x) for x in busy if (op := x.ops[0]).began is not None]
        self._n_choices += 1
        if not enabled or self._n_choices > MOST_CHOICES:
            raise Deadlock(f"after {self._n_choices} choices\n{self._picture()}")
        named = [(at, who.name) for at, who in enabled]
        at, who = enabled[self._chooser.choose(named, self._state)]
        self.clock = max(self.clock, at)
        return who

    def _begin(self) -> None:
        """Begin all that can, and pass marks and waits that hold up nobody."""
        while lanes := [lane for lane in self._lanes.values() if lane.can_begin]:
            for lane in lanes:
                op = lane.ops[0]
                op.begin()
                op.began = self.clock
                if op.instant:
                    self._end(lane)

    def _end(self, lane: _Lane) -> None:
        op = lane.ops.popleft()
        op.end()
        op.done = True
        lane.n_done += 1
        if not op.instant and op.began is not None:
            self.spans.append(Span(lane.name, op.name, op.began, self.clock))

    def _fail(self, error: Exception) -> None:
        """End everybody's play: the next call of each raises."""
        if self._failure is None:
            self._failure = error
            for each in self._threads:
                if each.baton.locked():
                    each.baton.release()

    def _state(self) -> Hashable:
        """Equal in two plays of one program only if they go on alike."""
        threads = [(t.history, t.ended, t.doing, t.ended or t.ready()) for t in self._threads]
        lanes = [(lane.n_done, len(lane.ops)) for lane in self._lanes.values()]
        return (*threads, *lanes)

    def _picture(self) -> str:
        threads = [f"{t.name}: {'ended' if t.ended else t.doing}" for t in self._threads]
        lanes = [f"{x.name}: {[op.name for op in x.ops]}" for x in self._lanes.values()]
        return "\n".join([*threads, *lanes, *(str(m) for m in self._memories.values())])
