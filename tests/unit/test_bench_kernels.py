"""The benchmark of the kernels: nothing wrong is timed, and it says what it did."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


def load_benchmark() -> Any:
    """benchmarks/kernels.py under a name that is not also that of a Hugging Face package."""
    folder = Path(__file__).parents[2] / "benchmarks"
    spec = importlib.util.spec_from_file_location("bench_kernels", folder / "kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # for its neighbours only: transformers, in other tests, looks for a module called kernels
        patch.syspath_prepend(folder)
        spec.loader.exec_module(module)
    return module


kernels = load_benchmark()
Case, Shapes = kernels.Case, kernels.Shapes

Report = dict[str, Any]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, Report, str]]:
    """Exit code, document and what was said, of the benchmark with some words."""

    def go(*words: str) -> tuple[int, Report, str]:
        monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", "cpu", *words])
        code = kernels.main()
        printed = capsys.readouterr()
        return code, json.loads(printed.out.splitlines()[-1]), printed.err

    return go


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A benchmark of our own cases, a group for each."""
    listed: dict[str, Any] = {}

    def of(name: str) -> Callable[[Any], Iterator[Any]]:
        return lambda _: iter([listed[name]] if name in listed else [])

    monkeypatch.setattr(kernels, "GROUPS", {("a",): of("a"), ("b",): of("b")})
    monkeypatch.setattr(kernels, "NAMES", ["a", "b"])
    monkeypatch.setattr(kernels, "ceilings", lambda *_: {"copy_gib_s": 1.0})
    return listed


# the whole of `--tiny` is part of the rehearsal of a GPU session, which has its own test
FEW = ("dequantize", "fused_qk", "matmul_int8", "attention_int8", "groupnorm_silu")


def test_tiny_measures_what_is_asked_for_and_claims_nothing(run: Any) -> None:
    code, report, said = run("--tiny", "--only", *FEW)
    assert (code, report["schema"], report["wrong"]) == (0, "zquant-kernels-1", [])
    assert {row["kernel"] for row in report["rows"]} == set(FEW)
    assert report["timing"] == "references on a CPU; rates mean nothing"
    assert report["timing"] in said
    assert not [row for row in report["rows"] if "goal" in row]
    assert all(row["min_us"] <= row["median_us"] <= row["max_us"] for row in report["rows"])
    assert all(row["rate"] > 0 for row in report["rows"])
    # a second row of one name would be a row of something else
    names = [(row["kernel"], row["label"]) for row in report["rows"]]
    assert len(set(names)) == len(names)
    assert set(rows(report, "dequantize")[0]["ratios"]) == {"copy"}
    assert set(rows(report, "matmul_int8")[0]["ratios"]) == {"bf16 cuBLAS", "_int_mm"}
    assert set(rows(report, "attention_int8")[0]["ratios"]) == {"torch SDPA"}
    products = {row["shape"] for row in report["ceilings"]["products"]}
    assert products == {row["label"] for row in rows(report, "matmul_int8")}


def rows(report: Report, kernel: str) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row["kernel"] == kernel]


def test_the_shapes_on_a_gpu_are_those_of_the_model() -> None:
    s = Shapes(device=torch.device("cpu"), dtype=torch.bfloat16)
    assert (s.config.dim, s.config.hidden_dim, s.config.n_heads, s.rows) == (3840, 10240, 30, 10240)
    assert (4224, 3840, 10240) in s.products()
    small = kernels.small(s)
    for wide in (small.config.dim, small.config.hidden_dim):  # K types and rotation divide them
        assert wide % 256 == 0


def test_check_times_nothing(run: Any, cases: dict[str, Any]) -> None:
    cases["a"] = Case("a", "", lambda: torch.ones(1), 1)
    code, report, _ = run("--check")
    assert (code, report["rows"], "ceilings" in report) == (0, [], False)


def unstable(start: float = 0.0) -> Callable[[], Tensor]:
    """Another result on each call, as of a kernel that is not its reference."""
    state = torch.full((4,), start)
    return lambda: state.add_(1)


def test_a_wrong_kernel_is_named_and_not_timed(run: Any, cases: dict[str, Any]) -> None:
    cases["a"] = Case("a", "odd", unstable(), 1)
    cases["b"] = Case("b", "", lambda: torch.ones(1), 1)
    code, report, said = run("--tiny")
    assert code == 1
    assert report["wrong"] == [{"kernel": "a", "label": "odd", "error": 0.5}]
    assert [row["kernel"] for row in report["rows"]] == ["b"]
    assert "a odd: wrong, 0.5; the limit is 0.001" in said


def test_a_kernel_that_raises_costs_no_other_kernel(
    run: Any, cases: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    cases["a"] = Case("a", "", lambda: 1 // 0, 1)
    cases["b"] = Case("b", "", lambda: torch.ones(1), 1)
    with pytest.raises(ZeroDivisionError):
        run("--tiny")
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["kernel"], row["error"][:17]) for row in report["wrong"]] == [
        ("a", "ZeroDivisionError")
    ]
    assert [row["kernel"] for row in report["rows"]] == ["b"]


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0])),
        (torch.tensor([torch.nan]), torch.tensor([torch.nan])),
        (torch.ones(2), torch.ones(2, 1)),
        (torch.ones(2), torch.ones(2, dtype=torch.float16)),
        ((torch.ones(2),), (torch.ones(2), torch.ones(2))),
        (None, None),
    ],
    ids=["NaN", "both NaN", "shape", "dtype", "number", "nothing"],
)
def test_what_cannot_be_compared_is_wrong(found: Any, wanted: Any) -> None:
    case = Case("a", "", lambda: found, 1, reference=lambda: wanted)
    assert kernels.difference(case) == torch.inf
    assert kernels.differing(iter([case]), {"a"}) != []


def test_every_result_of_a_kernel_is_compared() -> None:
    found = (torch.ones(4), None, torch.tensor([0, 2], dtype=torch.int8))
    wanted = (torch.ones(4), None, torch.tensor([0, 4], dtype=torch.int8))
    assert kernels.difference(Case("a", "", lambda: found, 1, reference=lambda: wanted)) == 0.5


def test_a_kernel_in_place_is_compared_from_equal_inputs() -> None:
    x = torch.ones(4)
    case = Case("a", "", lambda: x.add_(1), 1, reset=lambda: x.fill_(1))
    assert kernels.difference(case) == 0
    assert kernels.difference(replace(case, reset=lambda: None)) > 0


class FakeClock:
    """2 or 8 seconds for each call of ours, 4 for theirs; `n_calls` of the last."""

    def __init__(self, own: float, *, cuda: bool = False) -> None:
        self.own, self.cuda, self.n_calls = own, cuda, 0

    def __call__(self, calls: list[object]) -> dict[str, float]:
        self.n_calls = len(calls)
        us = 1e6 * (self.own if calls[0] is ours else 4)
        return {"median_us": us, "min_us": us, "max_us": us, "repeats": 1, "launch_us": 0}


@pytest.mark.parametrize(("own", "met"), [(2.0, True), (8.0, False)])
def test_ratios_and_goals(own: float, met: bool) -> None:
    case = Case("a", "", ours, 2**31, rivals={"theirs": theirs}, goal=("theirs", 1.4))
    row = kernels.timed([case], FakeClock(own), 2.0, compare=True)
    assert row["rate"] == 2 / own
    assert row["ratios"] == {kernels.COPY: 1 / own, "theirs": 4 / own}
    assert row["goal"] == {"of": "theirs", "at_least": 1.4, "met": met}
    assert ("meets" if met else "MISSES") in kernels.line(row)
    assert "goal" not in kernels.timed([case], FakeClock(own), 2.0, compare=False)


def test_what_memory_bounds_moves_a_gib_between_events() -> None:
    clock = FakeClock(2, cuda=True)
    case = Case("a", "", ours, 2**25, rivals={"theirs": theirs})
    kernels.timed([case] * 8, clock, 1.0, compare=False)
    assert clock.n_calls == 32
    kernels.timed([replace(case, unit="TOP/s")], clock, 1.0, compare=False)
    assert clock.n_calls == 1
    s = Shapes(device=torch.device("cpu"), dtype=torch.bfloat16)
    assert s.tokens[0] * s.config.dim * (2 + 1) >= kernels.LEAST_BYTES


def ours() -> None: ...


def theirs() -> None: ...


def test_a_cpu_is_not_measured_at_full_size(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 2
    assert "there is no GPU to measure" in capsys.readouterr().err
