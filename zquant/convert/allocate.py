"""Which option every tensor gets, so that the damage is least and the bytes stay within a budget.

    minimise  sum damage[t][choice[t]]   with  sum nbytes[t][choice[t]] <= budget

A tensor's options that are worth having lie on the lower convex hull of its (bytes, damage) points:
every other one is beaten by a mixture of two neighbours. All tensors begin with their smallest
option; then the steps along all hulls are taken in the order of damage saved per byte, and one that
does not fit ends its own tensor's way only. Until the first step that does not fit this is exact;
what follows loses at most what that step would have saved. More budget never costs damage: a step
saves more than all that could be put in less than its place.

Pure arithmetic: what is stored and how the damage was measured is not known here.

Source: Lagrangian relaxation of the multiple-choice knapsack problem (Sinha and Zoltners 1979).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from zquant.errors import PlanError
from zquant.units import format_bytes

__all__ = ["Choices", "Option", "allocate", "total_bytes", "total_damage"]

Chosen = Mapping[str, str]  # name of a tensor -> name of an option


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a tensor; `damage` adds up over tensors, in any unit."""

    name: str
    nbytes: int
    damage: float


@dataclass(frozen=True, slots=True)
class Choices:
    """A tensor and its options, at least one, in the order in which equal ones are preferred."""

    name: str
    options: tuple[Option, ...]

    def option(self, name: str) -> Option:
        """The option called `name`."""
        return next(option for option in self.options if option.name == name)

    def hull(self) -> list[Option]:
        """The lower convex hull: bytes rise, damage falls, ever less of it per byte."""
        hull: list[Option] = []
        for option in sorted(self.options, key=lambda o: (o.nbytes, o.damage)):
            if hull and option.damage >= hull[-1].damage:
                continue
            while len(hull) > 1 and _saved(hull[-2], hull[-1]) <= _saved(hull[-1], option):
                hull.pop()
            hull.append(option)
        return hull


@dataclass(frozen=True, slots=True)
class _Step:
    """From one option of tensor `at` to the next on its hull."""

    at: int
    nbytes: int
    saved_per_byte: float
    to: Option


def allocate(
    tensors: Sequence[Choices], budget: int, known: Sequence[Chosen] = ()
) -> dict[str, str]:
    """The option of every tensor.

    Args:
        tensors: what there is to choose, names distinct.
        budget: bytes of all tensors together.
        known: complete allocations to do at least as well as, where they fit; so are those that
            give all tensors the option of one name.

    Returns:
        name of the tensor -> name of the option, in the order of `tensors`.

    Raises:
        PlanError: even the smallest options need more bytes.
    """
    least = sum(tensor.hull()[0].nbytes for tensor in tensors)
    if least > budget:
        raise PlanError(
            f"{len(tensors)} tensors need at least {format_bytes(least)} ({least} bytes) in their "
            f"smallest qtypes; {max(0, budget)} bytes are left for them. Ask for a larger size."
        )
    found = [_along_hulls(tensors, budget - least), *known, *_uniform(tensors)]
    fitting = [each for each in found if total_bytes(tensors, each) <= budget]
    best = min(fitting, key=lambda each: total_damage(tensors, each))
    return {tensor.name: best[tensor.name] for tensor in tensors}


def total_bytes(tensors: Sequence[Choices], allocation: Chosen) -> int:
    """Bytes of all tensors in an allocation."""
    return sum(tensor.option(allocation[tensor.name]).nbytes for tensor in tensors)


def total_damage(tensors: Sequence[Choices], allocation: Chosen) -> float:
    """Damage of all tensors in an allocation."""
    return sum(tensor.option(allocation[tensor.name]).damage for tensor in tensors)


def _along_hulls(tensors: Sequence[Choices], left: int) -> dict[str, str]:
    """From the smallest options up, while `left` bytes last."""
    hulls = [tensor.hull() for tensor in tensors]
    chosen = {tensor.name: hull[0].name for tensor, hull in zip(tensors, hulls, strict=True)}
    ended: set[int] = set()
    steps = [step for at, hull in enumerate(hulls) for step in _steps(at, hull)]
    # sorting is stable, so steps of one tensor keep their order even where they save the same
    for step in sorted(steps, key=lambda s: -s.saved_per_byte):
        if step.at in ended:
            continue
        if step.nbytes > left:
            ended.add(step.at)
            continue
        left -= step.nbytes
        chosen[tensors[step.at].name] = step.to.name
    return chosen


def _steps(at: int, hull: Sequence[Option]) -> Iterator[_Step]:
    for before, after in pairwise(hull):
        yield _Step(at, after.nbytes - before.nbytes, _saved(before, after), after)


def _saved(before: Option, after: Option) -> float:
    """Damage saved per byte; the bytes differ."""
    return (before.damage - after.damage) / (after.nbytes - before.nbytes)


def _uniform(tensors: Sequence[Choices]) -> Iterator[Chosen]:
    """Every allocation that gives all tensors the option of one name."""
    names = [{option.name for option in tensor.options} for tensor in tensors]
    for name in sorted(set.intersection(*names)) if names else ():
        yield {tensor.name: name for tensor in tensors}
