"""Every wait of the block stream is needed: without it some order of events goes wrong."""

from collections import Counter
from collections.abc import Callable

import pytest
import simulated_lanes
from simulated_lanes import Chooser, Deadlock, Hazard, Machine, SimulatedLanes
from stream_simulator import Play, Seeded, every_order, random_play

from zquant.memory.lanes import Event, Queue
from zquant.memory.stream import StreamShape

PINNED, DIRECT = Machine(), Machine(direct=True)


class Deaf(SimulatedLanes):
    """Lanes where one kind of call does nothing; `heard` counts the calls of every kind."""

    def __init__(self, chooser: Chooser, machine: Machine, deaf_to: str = "") -> None:
        self.deaf_to, self.heard = deaf_to, Counter()
        super().__init__(chooser, machine)

    def hears(self, call: str) -> bool:
        name = f"{self._local.me.name}: {call}"
        self.heard[name] += 1
        return name != self.deaf_to

    def wait(self, queue: Queue, event: Event) -> None:
        if self.hears(f"wait on {queue}"):
            super().wait(queue, event)

    def synchronize(self, event: Event) -> None:
        if self.hears("synchronize"):
            super().synchronize(event)

    def until(self, *conditions: Callable[[], bool]) -> None:
        if self.hears(f"until {conditions[0].__name__}"):
            super().until(*conditions)

    def join(self) -> None:
        if self.hears("join"):
            super().join()

    def notify(self) -> None:
        if self.hears("notify"):
            super().notify()

    def record(self, queue: Queue, event: Event) -> None:
        if queue == "compute":
            event_is = "free" if len(self._threads) > 1 else "free at first"
        else:  # the copier records them in turn
            in_turn = self.heard["copier: record full"] == self.heard["copier: record copied"]
            event_is = "full" if in_turn else "copied"
        if self.hears(f"record {event_is}"):
            super().record(queue, event)

    def end(self) -> None:
        """Let threads that nobody waits for end."""
        self._fail(RuntimeError("the play is over"))


NEEDED = {
    "main: until _is_loaded": Hazard,
    "main: wait on compute": Hazard,
    "main: record free at first": Hazard,
    "main: record free": Hazard,
    "main: notify": Deadlock,
    "main: join": (Hazard, IndexError),  # also two readers at once
    "main: synchronize": Hazard,
    "reader: until _has_free_buffer": IndexError,
    "reader: synchronize": Hazard,
    "reader: notify": Deadlock,
    "copier: until _is_read": (Hazard, IndexError),
    "copier: until _has_free_slot": Hazard,
    "copier: wait on copy": Hazard,
    "copier: record full": Hazard,
    "copier: record copied": Hazard,
    "copier: notify": Deadlock,
}
NEEDED_DIRECT = {
    "main: until _is_loaded": Hazard,
    "main: notify": Deadlock,
    "main: join": Hazard,
    "reader: until _has_free_slot": Hazard,
    "reader: notify": Deadlock,
}
NOTHING_ON_A_CPU = {"main: wait on compute", "main: record free at first", "main: record free"}


def everything(play: Play) -> None:
    play.lap()
    play.lap()
    play.lap(1)
    play.stream.rewind()
    play.lap()
    play.stream.close()


@pytest.mark.parametrize(
    ("machine", "needed"),
    [(PINNED, NEEDED), (DIRECT, NEEDED_DIRECT)],
    ids=["pinned", "direct"],
)
def test_the_list_of_waits_is_complete(machine: Machine, needed: dict[str, object]) -> None:
    heard: set[str] = set()
    for seed in range(20):
        lanes = Deaf(Seeded(seed), machine)
        everything(random_play(seed, lanes))
        heard |= set(lanes.heard)
    assert heard - (NOTHING_ON_A_CPU if machine.direct else set()) == set(needed)


@pytest.mark.parametrize(
    ("machine", "call", "error"),
    [
        *[pytest.param(PINNED, *each, id=each[0]) for each in NEEDED.items()],
        *[pytest.param(DIRECT, *each, id=f"direct {each[0]}") for each in NEEDED_DIRECT.items()],
    ],
)
class TestWithoutOneWait:
    @pytest.fixture(autouse=True)
    def _short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Plays in which a thread runs away are given up soon."""
        monkeypatch.setattr(simulated_lanes, "MOST_CHOICES", 1500)

    def test_random_orders_go_wrong(self, machine: Machine, call: str, error) -> None:
        n_wrong = 0
        for seed in range(100):
            lanes = Deaf(Seeded(seed), machine, call)
            try:
                everything(random_play(seed, lanes))
            except error:
                n_wrong += 1
                if n_wrong == 3:
                    return
            except Deadlock:
                pass
            finally:
                lanes.end()
        pytest.fail(f"{n_wrong} of 100 orders went wrong")

    def test_some_order_of_a_small_case_goes_wrong(
        self, machine: Machine, call: str, error
    ) -> None:
        shape = StreamShape(n_slots=2, n_ring=0 if machine.direct else 1, kept=frozenset())

        def play(chooser: Chooser) -> None:
            lanes = Deaf(chooser, machine, call)
            try:
                played = Play(lanes, shape, 2)
                played.lap()
                played.lap(1)
                played.stream.close()
            finally:
                lanes.end()

        with pytest.raises(error):
            every_order(play)
