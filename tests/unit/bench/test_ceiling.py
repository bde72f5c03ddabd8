"""The ceiling: its arithmetic is exact, and its rates are measured on what they should be."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zquant.bench import ceiling
from zquant.bench.ceiling import (
    Products,
    Rates,
    best_seconds,
    overlap,
    products_of,
    rates_of,
    roofline,
    unwaited,
)
from zquant.memory.device import probe
from zquant.memory.sizes import NetworkSizes

RATES = Rates(memory_bytes_s=100.0, link_bytes_s=0.0, file_bytes_s=10.0)
FAST = Products(rows=64, flop_s=1e12, int8_op_s=None)
SLOW = Products(rows=64, flop_s=1000.0, int8_op_s=None)
SIZES = NetworkSizes(blocks=(40, 50, 60), n_weights=(20, 30, 30), visitor=0, fixed=0)
CONFIG: Any = SimpleNamespace(dim=4, n_refiner_layers=1, hidden_dim=96)


def plan(*, n_prompts: int = 1, is_gpu: bool = False, **dit: Any) -> Any:
    """With 6 tokens of the image and 4 of the caption."""
    network = {"streamed": frozenset(), "expanded": frozenset(), "shape": None} | dit
    return SimpleNamespace(
        picture=SimpleNamespace(n_prompts=n_prompts, n_image=6, n_tokens=10),
        machine=SimpleNamespace(is_gpu=is_gpu, expand_s=0.5),
        dit=SimpleNamespace(**network),
    )


LINEAR = 2 * 20 * 6 + 2 * (30 + 30) * 10  # the refiner sees the image alone
ATTENTION = 4 * 4 * (6**2 + 2 * 10**2)


def test_a_step_is_bound_by_its_products() -> None:
    found = roofline(plan(), SIZES, CONFIG, RATES, SLOW)
    assert found["products_s"] == found["roofline_s"]
    assert found["products_s"] == pytest.approx((LINEAR + ATTENTION) / 1000)
    assert found["step_flop"] == LINEAR + ATTENTION
    assert found["weights_s"] == 150 / 100
    assert found["moving_s"] == 0
    assert found["bound"] == "products"
    assert found["expand_s"] == 80 * 0.5


def test_a_step_is_bound_by_reading_its_weights() -> None:
    found = roofline(plan(), SIZES, CONFIG, RATES, FAST)
    assert (found["bound"], found["roofline_s"]) == ("weights", 1.5)


def test_a_step_is_bound_by_reading_the_file() -> None:
    found = roofline(plan(streamed=frozenset({0, 2})), SIZES, CONFIG, RATES, FAST)
    assert (found["bound"], found["roofline_s"]) == ("moving", (40 + 60) / 10)
    assert found["streamed_blocks"] == 2


@pytest.mark.parametrize(("kept", "seconds"), [({0, 1}, 100 / 50), ({0}, 60 / 10)])
def test_a_gpu_copies_what_is_kept_and_reads_the_rest(kept: set[int], seconds: float) -> None:
    rates = Rates(memory_bytes_s=1e9, link_bytes_s=50.0, file_bytes_s=10.0)
    shape = SimpleNamespace(kept=frozenset(kept))  # indices among the streamed blocks
    found = roofline(
        plan(is_gpu=True, streamed=frozenset({0, 2}), shape=shape), SIZES, CONFIG, rates, FAST
    )
    assert found["moving_s"] == seconds


def test_guidance_doubles_a_step() -> None:
    once = roofline(plan(), SIZES, CONFIG, RATES, SLOW)
    twice = roofline(plan(n_prompts=2), SIZES, CONFIG, RATES, SLOW)
    for name in ("products_s", "weights_s", "expand_s", "roofline_s", "step_flop"):
        assert twice[name] == 2 * once[name]


def test_int8_is_for_weights_and_not_for_attention() -> None:
    both = Products(rows=64, flop_s=1000.0, int8_op_s=4000.0)
    found = roofline(plan(), SIZES, CONFIG, RATES, both)
    assert found["products_s"] == LINEAR / 4000 + ATTENTION / 1000


def test_blocks_that_are_kept_expanded_are_not_expanded_again() -> None:
    found = roofline(plan(expanded=frozenset({0, 1, 2})), SIZES, CONFIG, RATES, SLOW)
    assert found["expand_s"] == 0


def test_the_best_of_several_counts_and_the_first_does_not() -> None:
    lengths = iter([0.0, 5.0, 2.0, 3.0, 9.0])
    now = 0.0

    def work() -> None:
        nonlocal now
        now += next(lengths)

    assert best_seconds(work, clock=lambda: now, seconds=8.0) == 2.0
    assert list(lengths) == [9.0]  # over when the time is


def test_the_end_of_the_work_is_waited_for() -> None:
    now = 0.0

    def wait() -> None:
        nonlocal now
        now += 4.0

    assert best_seconds(lambda: None, wait=wait, clock=lambda: now, seconds=0) == 4.0


@pytest.mark.parametrize(
    ("step", "compute", "moving", "expected"),
    [
        (3.0, 3.0, 2.0, 1.0),  # nothing but computing
        (5.0, 3.0, 2.0, 0.0),  # one after the other
        (4.0, 3.0, 2.0, 0.5),
        (4.0, 2.0, 3.0, 0.5),
        (9.0, 3.0, 2.0, 0.0),
        (2.5, 3.0, 2.0, 1.0),  # faster than the ceiling says
        (3.0, 3.0, 0.0, None),
    ],
)
def test_overlap(step: float, compute: float, moving: float, expected: float | None) -> None:
    assert overlap(step, compute, moving) == expected


def test_the_overlap_is_a_lower_bound() -> None:
    """True computing takes longer than the ceiling's, and would give more."""
    found = [overlap(5.0, compute, 2.0) for compute in (0.5, 1.0, 2.0, 3.0, 4.0, 5.0)]
    assert found == sorted(found, key=lambda value: value or 0)


@pytest.mark.parametrize(
    ("waited", "moving", "expected"), [(0.5, 2.0, 0.75), (3.0, 2.0, 0.0), (0.1, 0.0, None)]
)
def test_what_nobody_waited_for(waited: float, moving: float, expected: float | None) -> None:
    assert unwaited(waited, moving) == expected


class Part:
    """A tensor in a file."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.read: list[tuple[int, int]] = []

    def read_into(self, start: int, out: Any) -> None:
        self.read.append((start, len(out)))


@pytest.fixture
def a_second(monkeypatch: pytest.MonkeyPatch) -> Callable[..., float]:
    """All work takes a second, and is done once."""

    def best(work: Callable[[], object], **_: Any) -> float:
        work()
        return 1.0

    monkeypatch.setattr(ceiling, "best_seconds", best)
    return best


def test_rates_are_bytes_over_seconds(a_second: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "READ", 100)
    monkeypatch.setattr(ceiling, "COPIED", 1000)
    parts: Any = [Part(60), Part(70), Part(80)]
    found = rates_of(probe("cpu", "float32"), parts)
    assert found == Rates(memory_bytes_s=2000.0, link_bytes_s=0.0, file_bytes_s=100.0)
    assert [part.read for part in parts] == [[(0, 60)], [(0, 40)], []]


def test_a_small_file_is_read_whole(a_second: Any) -> None:
    parts: Any = [Part(60), Part(70)]
    assert ceiling._file_bytes_s(parts) == 130


def test_a_cpu_multiplies_no_more_rows_than_it_needs(a_second: Any) -> None:
    found = products_of(probe("cpu", "float32"), CONFIG, 4096)
    assert found.rows == ceiling.FEW_ROWS  # that many took a second already
    assert found.flop_s == 2.0 * found.rows * 96 * 4
    assert found.int8_op_s is None


def test_a_fast_cpu_multiplies_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "best_seconds", lambda *_, **__: 1e-6)
    assert products_of(probe("cpu", "float32"), CONFIG, 4096).rows == 4096


def test_int8_products_are_measured_where_blocks_are_int8(
    a_second: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    real = torch._int_mm

    def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        shapes.append((tuple(x.shape), x.dtype, tuple(weight.shape)))
        return real(x, weight)

    monkeypatch.setattr(torch, "_int_mm", multiply)
    found = products_of(probe("cpu", "float32", compute="int8"), CONFIG, 64)
    assert found.int8_op_s == 2.0 * 64 * 96 * 4
    assert shapes[0] == ((64, 4), torch.int8, (4, 96))


def test_where_torch_has_no_int8_product_there_is_no_rate(
    a_second: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> Any:
        raise NotImplementedError("no int8 here")

    monkeypatch.setattr(torch, "_int_mm", missing)
    found = products_of(probe("cpu", "float32", compute="int8"), CONFIG, 64)
    assert (found.int8_op_s, found.int8_reason) == (None, "no int8 here")
    assert found.flop_s > 0
