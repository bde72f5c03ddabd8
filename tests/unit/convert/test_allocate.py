"""The allocation of a budget: kept, never worse for more, near the best there is."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zquant.convert.allocate import Choices, Option, allocate, total_bytes, total_damage
from zquant.errors import PlanError

NAMES = ("a", "b", "c", "d")


@st.composite
def tensors(draw, most=5):
    """A few tensors with a few options each; whole numbers, so that sums are exact."""
    found = []
    for i in range(draw(st.integers(1, most))):
        # all tensors have "a", so that there is a uniform allocation
        names = ["a", *draw(st.lists(st.sampled_from(NAMES[1:]), unique=True))]
        sizes, damages = st.integers(1, 40), st.integers(0, 60).map(float)
        options = [Option(name, draw(sizes), draw(damages)) for name in names]
        found.append(Choices(f"t{i}", tuple(options)))
    return found


def least(found):
    return sum(min(o.nbytes for o in tensor.options) for tensor in found)


def every_allocation(found):
    for options in itertools.product(*(tensor.options for tensor in found)):
        yield {t.name: o.name for t, o in zip(found, options, strict=True)}


def solved(found, budget):
    return total_damage(found, allocate(found, budget))


@given(found=tensors(), more=st.integers(0, 150))
def test_the_budget_is_kept_and_every_tensor_has_one_of_its_options(found, more):
    chosen = allocate(found, least(found) + more)
    assert list(chosen) == [tensor.name for tensor in found]
    assert total_bytes(found, chosen) <= least(found) + more


@given(found=tensors(), more=st.integers(0, 150), even_more=st.integers(0, 150))
def test_a_larger_budget_is_never_worse(found, more, even_more):
    budget = least(found) + more
    assert solved(found, budget + even_more) <= solved(found, budget)


@given(found=tensors(), more=st.integers(0, 150))
def test_it_is_not_worse_than_any_uniform_or_known_allocation_that_fits(found, more):
    budget = least(found) + more
    fitting = [e for e in every_allocation(found) if total_bytes(found, e) <= budget]
    uniform = [{t.name: "a" for t in found}]
    for each in [e for e in uniform if e in fitting]:
        assert solved(found, budget) <= total_damage(found, each)
    known = fitting[len(fitting) // 2]
    assert total_damage(found, allocate(found, budget, [known])) <= total_damage(found, known)


@given(found=tensors(most=4), more=st.integers(0, 150))
def test_it_is_within_one_step_of_the_best_there_is(found, more):
    budget = least(found) + more
    best = min(
        total_damage(found, each)
        for each in every_allocation(found)
        if total_bytes(found, each) <= budget
    )
    steps = [
        before.damage - after.damage
        for tensor in found
        for before, after in itertools.pairwise(tensor.hull())
    ]
    assert best <= solved(found, budget) <= best + max(steps, default=0.0)


@given(found=tensors())
def test_with_room_for_everything_every_tensor_has_its_least_damage(found):
    budget = sum(max(o.nbytes for o in tensor.options) for tensor in found)
    assert solved(found, budget) == sum(min(o.damage for o in t.options) for t in found)


def test_bytes_go_where_they_save_most():
    small, large = Option("small", 10, 8.0), Option("large", 20, 0.0)
    found = [
        Choices("calm", (small, large)),
        Choices("touchy", (Option("small", 10, 80.0), large)),
    ]
    assert allocate(found, 30) == {"calm": "small", "touchy": "large"}


def test_of_equal_options_the_first_is_taken():
    options = (Option("first", 10, 1.0), Option("second", 10, 1.0))
    assert allocate([Choices("t", options)], 99) == {"t": "first"}


def test_the_hull_leaves_out_what_a_mixture_beats():
    options = [Option("a", 1, 9.0), Option("b", 2, 8.5), Option("c", 3, 1.0), Option("d", 4, 1.0)]
    assert [o.name for o in Choices("t", tuple(options)).hull()] == ["a", "c"]


def test_too_few_bytes_are_refused_with_the_least():
    found = [Choices("t", (Option("a", 10, 1.0),)), Choices("u", (Option("a", 7, 1.0),))]
    with pytest.raises(PlanError, match=r"2 tensors need at least 17 B .*; 16 bytes are left .*"):
        allocate(found, 16)
