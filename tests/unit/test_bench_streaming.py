"""The benchmark of the memory plan: what fails it and what it computes; one run of it is real."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.streaming_testing import GIB, MIB, gpu_args, play, runs, streaming, subject

Report = dict[str, Any]


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Report]:
    return play(tmp_path, monkeypatch)


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Report, str]]:
    """Exit code, document and what was said."""

    def go(*words: str) -> tuple[int, Report, str]:
        code = streaming.main(["a", "--device", "cpu", *words])
        printed = capsys.readouterr()
        return code, json.loads(printed.out.splitlines()[-1]), printed.err

    return go


BUDGETS = ("--budgets", "100MiB", "none")


def test_all_is_well(bench: Any, parts: dict[str, Report]) -> None:
    code, report, said = bench(*BUDGETS)
    assert (code, report["schema"], report["failures"]) == (0, "zquant-streaming-1", [])
    (model,) = report["models"]
    resident, row = model["rows"]
    assert [resident["budget_bytes"], row["budget_bytes"]] == [None, 100 * MIB]
    assert row["step_s"] == 2.0  # median without the first
    assert (row["first_step_s"], row["text_encoder_s"], row["ratio"]) == (9.0, 0.25, 1.0)
    assert row["latents_sha256"] == resident["latents_sha256"]
    assert 5 * MIB < row["peak_ram_bytes"] < 100 * MIB
    assert "step_s" in model["before"]
    ceiling = said.index("ceiling: products 0.50 s a step at 1 TFLOP/s")
    assert ceiling < said.index("within none") < said.index("within 100.0 MiB")
    assert report["warm"] in said


def failures(report: Report) -> list[str]:
    """Without the name of the model."""
    return [text.removeprefix("a within ") for text in report["failures"]]


def test_a_process_over_its_budget_fails(bench: Any, parts: dict[str, Report]) -> None:
    parts[str(100 * MIB)] = {"holds": 150 * MIB}
    parts["none"] = {"holds": 150 * MIB}  # may: it has no budget
    code, report, said = bench(*BUDGETS)
    assert code == 1
    (failure,) = failures(report)
    assert failure.startswith("100.0 MiB: held 1")
    assert failure.endswith(" bytes over the 100.0 MiB it may")
    assert "FAILED: held 1" in said


def test_other_latents_fail(bench: Any, parts: dict[str, Report], tmp_path: Path) -> None:
    parts[str(100 * MIB)] = {"latents": str(tmp_path / "other.npy")}
    code, report, _ = bench(*BUDGETS)
    assert code == 1
    assert failures(report) == ["100.0 MiB: latents differ from those within none"]


def test_a_run_that_fails_is_named_and_the_others_still_run(
    bench: Any, parts: dict[str, Report]
) -> None:
    parts["none"] = {"dies": "no memory"}
    code, report, said = bench(*BUDGETS)
    assert code == 1
    assert failures(report) == ["none: exit code 1: no memory"]
    assert "FAILED: exit code 1: no memory" in said
    row = report["models"][0]["rows"][1]
    assert (row["step_s"], row["ratio"], row["overlap"]) == (2.0, None, None)


def test_memory_that_ran_out_and_was_planned_again_fails(
    bench: Any, parts: dict[str, Report]
) -> None:
    notice = "memory ran out within the budget of 2.0 GiB, probably taken by another program"
    parts["none"] = {"notices": [notice, "the prompt is long"]}
    code, report, _ = bench(*BUDGETS)
    assert (code, failures(report)) == (1, [f"none: {notice}"])


def test_the_document_has_the_rows_so_far(
    bench: Any, parts: dict[str, Report], tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    parts[str(100 * MIB)] = {"saves": str(out), "dies": "in the second row"}
    code, report, _ = bench(*BUDGETS, "--out", str(out))
    assert code == 1
    found = json.loads(Path(f"{out}.saved").read_text())
    assert found == report | {
        "failures": [],
        "models": [report["models"][0] | {"rows": report["models"][0]["rows"][:1]}],
    }
    assert json.loads(out.read_text()) == report
    assert not list(tmp_path.glob("*.part"))


def test_whoever_looks_sees_a_whole_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    streaming.write_document(out, {"rows": 1})
    monkeypatch.setattr(Path, "replace", lambda *_: None)  # stopped before the end
    streaming.write_document(out, {"rows": 2})
    assert json.loads(out.read_text()) == {"rows": 1}


@pytest.mark.parametrize(("n_bytes", "wrong"), [(2 * 300 * 4, False), (2 * 300 * 4 - 1, True)])
def test_a_stream_that_moved_less_than_planned_fails(n_bytes: int, wrong: bool) -> None:
    memory = dict.fromkeys(
        ("predicted_vram_bytes", "measured_vram_bytes", "predicted_host_bytes", "budget_bytes")
    )
    memory |= dict.fromkeys(("predicted_step_s", "vae_rows", "allocations_after_step_1"))
    memory |= {"streamed_blocks": 2, "streams": {"dit": {"bytes_copied": n_bytes}}}
    seconds = {"steps": [1.0] * 4, "text_encoder": 0, "vae": 0, "total": 0}
    found: list[str] = []
    two_passes = subject(passes=2, link_bytes_s=600)
    document = {"memory": memory, "timings": seconds, "notices": []}
    row = runs.figures(document, two_passes, found, copies=True)
    assert (row["step_bytes"], row["copy_s"]) == (600, 1.0)  # blocks 1 and 3, twice
    assert bool(found) == wrong


@pytest.mark.parametrize(
    ("step_s", "compute_s", "copy_s", "wanted"),
    [(4.0, 4.0, 1.0, 1.0), (5.0, 4.0, 1.0, 0.0), (4.5, 4.0, 1.0, 0.5), (6.0, 4.0, 6.0, 1.0)],
    ids=["hidden", "one after the other", "half hidden", "copies rule"],
)
def test_overlap(step_s: float, compute_s: float, copy_s: float, wanted: float) -> None:
    assert streaming.overlap(step_s, compute_s, copy_s) == wanted


def test_overlap_needs_something_to_overlap() -> None:
    assert streaming.overlap(4.0, 4.0, 0.0) is None
    assert streaming.overlap(4.0, 0.0, 4.0) is None


def gpu_row(**changes: Any) -> Report:
    return {
        "budget_bytes": 4 * GIB,
        "failures": [],
        "peak_vram_bytes": 4 * GIB,
        "planned_vram_bytes": int(3.9 * GIB),
        "peak_ram_bytes": 3 * GIB,
        "planned_ram_bytes": 3 * GIB,
        "samples_hz": 45.0,
        "latents_sha256": "a",
        "step_s": 1.02,
        "step_bytes": GIB,
        "copy_s": 0.5,
        "streamed_blocks": 9,
        "text_encoder_s": 0.4,
        "vae_s": 1.0,
        "total_s": 12.0,
        "allocations_after_step_1": 0,
    } | changes


def goals(row: Report, **changes: Any) -> dict[str, bool]:
    streaming.compare(row, {"step_s": 1.0}, subject(**changes), gpu=True)
    return {goal["of"]: goal["met"] for goal in row["goals"]}


def test_goals_of_a_gpu() -> None:
    assert goals(gpu_row()) == {"plan": True, "step": True, "text encoder": True}
    bad = gpu_row(step_s=1.04, planned_vram_bytes=int(3.7 * GIB), text_encoder_s=0.6)
    assert goals(bad) == {"plan": False, "step": False, "text encoder": False}
    assert "step 1.04 MISSES 1.03" in streaming.line(bad, gpu=True)
    assert "allocations after step 1: 0" in streaming.line(bad, gpu=True)
    assert goals(gpu_row(budget_bytes=2 * GIB, step_s=1.09))["step"]
    assert not goals(gpu_row(planned_vram_bytes=int(4.3 * GIB)))["plan"]  # too much is as wrong
    assert set(goals(gpu_row(budget_bytes=3 * GIB))) == {"plan", "text encoder"}
    assert "text encoder" not in goals(gpu_row(), encoder_bpw=8.5)


def test_the_rate_while_copying_is_known_where_copies_rule() -> None:
    fast, slow = gpu_row(step_s=2.0, copy_s=2.0), gpu_row(step_s=2.0, copy_s=0.5)
    goals(fast)
    goals(slow)
    assert (fast["moved_gib_s"], fast["copying_gib_s"]) == (0.5, 0.5)
    assert (slow["moved_gib_s"], slow["copying_gib_s"]) == (0.5, None)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, ""),
        ({"peak_vram_bytes": 4 * GIB + 1}, "held 4.0 GiB of VRAM, 1 bytes over the 4.0 GiB it may"),
        ({"peak_vram_bytes": None}, "its peak of VRAM is unknown"),
        ({"budget_bytes": None, "peak_vram_bytes": None}, ""),
        ({"samples_hz": 9.0}, "was looked at only 9.0 times a second"),
        ({"peak_ram_bytes": 6 * GIB}, "held 6.0 GiB of RAM, 1073741824 bytes over the 5.0 GiB"),
        ({"latents_sha256": "b"}, "latents differ from those within none"),
    ],
)
def test_what_a_gpu_row_is_failed_for(changes: Report, wanted: str) -> None:
    row, first = gpu_row(**changes), {"latents_sha256": "a", "budget_bytes": None}
    streaming.judge(row, first, gpu=True, max_ram=5 * GIB)
    assert len(row["failures"]) == bool(wanted)
    assert wanted in "".join(row["failures"])


def test_zquant_itself_is_measured() -> None:
    args = gpu_args(device="cpu", ballast=False, compute_dtype="float32", steps=2, compute="int8")
    model = streaming.subject_of("demo", args, None)
    assert (len(model.blocks), model.passes, model.dtype) == (7, 1, "float32")
    assert model.document()["compute"] == "int8"
    assert model.compute_s > 0
    row = runs.measured(model, args, None, GIB, steps=2)
    assert row["failures"] == []
    assert 200 * MIB < row["peak_ram_bytes"] < GIB
    assert row["planned_ram_bytes"] > row["peak_ram_bytes"]
    assert (row["streamed_blocks"], row["step_bytes"], len(row["latents_sha256"])) == (0, 0, 64)
    streaming.compare(row, row, model, gpu=False)
    assert "(1.000 of resident); 0 blocks streamed" in streaming.line(row, gpu=False)


def test_budgets_are_read_and_what_others_are_compared_with_comes_first() -> None:
    args = streaming._arguments(["a", "--device", "cuda", "--budgets", "4GiB", "none", "2GiB"])
    assert args.budgets == [None, 2 * GIB, 4 * GIB]
    assert args.compute == "auto"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budgets", "much"], "'much' is not a number of bytes"),
        (["--ballast"], "are for a GPU"),
        (["--max-ram", "4GiB"], "are for a GPU"),
        (["--device", "auto"], "neither cpu nor cuda"),
    ],
)
def test_wrong_usage_ends_with_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        streaming.main(["a", "--device", "cpu", *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
