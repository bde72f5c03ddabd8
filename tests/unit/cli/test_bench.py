"""`zquant bench` and `zquant bench cost` from the command line."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.bench.bench_testing import Play
from zquant.bench import ceiling, measure, worker
from zquant.bench.schema import check
from zquant.cli.main import main

COST = {
    "--hardware-price": "23000",
    "--watts": "450",
    "--price-per-kwh": "0.8",
    "--images-per-day": "5000",
    "--api-price": "0.04",
}


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Played measuring processes, of which one size fails."""
    return Play(tmp_path, monkeypatch)


def cost(*words: str, without: str = "") -> int:
    flags = [word for name, value in COST.items() if name != without for word in (name, value)]
    return main(["bench", "cost", *flags, *words])


@pytest.fixture
def survey_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The survey without a process of its own and with rates that take no time."""
    real = measure._converse

    def best(work: Any, **_: Any) -> float:
        work()
        return 0.001

    def converse(job: dict[str, Any], hear: Any, *watch: Any) -> None:
        if job["kind"] == "survey":
            worker.work(job, lambda event, **values: hear({"event": event, **values}))
        else:
            real(job, hear, *watch)

    monkeypatch.setattr(ceiling, "best_seconds", best)
    monkeypatch.setattr(measure, "_converse", converse)


def test_the_demo_is_measured(
    survey_here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one real run: a process of its own, model and device."""
    out = tmp_path / "result.json"
    words = ["--sizes", "64", "--steps", "2", "--repeat", "1", "--device", "cpu"]
    assert main(["bench", "demo", *words, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    table, last = printed.out.rstrip("\n").rsplit("\n\n", 1)
    document = json.loads(last)
    check(document)
    assert json.loads(out.read_text()) == document
    assert table.startswith("demo on CPU, ")
    assert document["command"] == f"zquant bench demo {' '.join(words)}"
    (row,) = document["sizes"]
    assert (row["width"], row["height"], row["failure"]) == (64, 64, None)
    assert row["peaks"]["vram_process_bytes"] is None
    assert len(document["model"]["files"]["dit"]["sha256"]) == 64
    phases = ("plan_s", "text_encoder_s", "first_step_s", "step_s", "vae_s", "save_s", "total_s")
    assert all(row["warm"][name]["median"] > 0 for name in phases)
    # start-up is not in the total, loading libraries takes longer than a picture of the demo
    assert row["startup_s"] > row["warm"]["total_s"]["median"]
    said = printed.err
    assert said.index("64x64: ceiling ") < said.index("64x64: ready") < said.index("64x64: cold, ")
    assert cost("--result", str(out), "--json") == 0
    costs = json.loads(capsys.readouterr().out)["costs"]
    assert [(c["size"], c["seconds_per_image"]) for c in costs] == [
        ("64x64", row["warm"]["total_s"]["median"])
    ]


def played(play: Play, *words: str) -> int:
    play._script.write_text(json.dumps(play.parts))
    return main(["bench", "a", "--repeat", "2", *words])


def test_json_is_the_document_alone(play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    assert played(play, "--sizes", "64", "--json") == 0
    check(json.loads(capsys.readouterr().out))


def test_what_failed_is_no_success(play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    play.parts["64x64"] = [{"event": "error", "message": "memory ran out"}, {"exit": 1}]
    assert played(play, "--sizes", "64") == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["sizes"][0]["failure"] == "memory ran out"
    assert "64x64: FAILED: memory ran out" in printed.err


def test_flags_reach_the_process_that_measures(play: Play) -> None:
    flags = ["--budget", "4GiB", "--max-ram", "6GiB", "--kernels", "torch", "--compute", "exact"]
    assert played(play, "--sizes", "64x64", "--steps", "3", *flags) == 0
    for job in play.jobs:
        assert (job["budget_bytes"], job["ram_bytes"]) == (4 * 2**30, 6 * 2**30)
        assert (job["steps"], job["machine"]["kernels"]) == (3, "torch")
        assert job["machine"]["compute"] == "exact"


def test_the_default_sizes_are_the_published_ones(play: Play) -> None:
    survey = play.parts["survey"][0]
    play.parts["survey"] = [survey | {"sizes": [{"failure": "too large"}] * 5}]
    assert played(play) == 1
    sizes = [[512, 512], [768, 768], [1024, 1024], [1280, 720], [1536, 1536]]
    assert play.jobs[0]["sizes"] == sizes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "--sizes", "big"], "size 'big' is not pixels; write it like 512 or 1280x720"),
        (["a", "--sizes", "500"], "width is 500; it must be a multiple of 16"),
        (["a", "--steps", "1"], "steps is 1; it must be 2 or more"),
        (["a", "--repeat", "0"], "repeat is 0"),
        (["a", "--budget", "plenty"], "'plenty' is not a number of bytes"),
        (["a", "--watts", "450"], "--watts has a meaning only where zquant bench cost"),
        (["a", "--currency", "CNY"], "--currency has a meaning only where zquant bench cost"),
        (["cost", "--sizes", "512"], "--sizes has a meaning only where a model is measured"),
        (["cost", "--device", "cpu"], "--device has a meaning only where a model is measured"),
        (["cost"], "needs --hardware-price, --watts, --price-per-kwh, --images-per-day, --api-pr"),
    ],
    ids=" ".join,
)
def test_wrong_usage(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.out == ""


def test_a_model_that_is_not_there_is_one_message(
    play: Play, capsys: pytest.CaptureFixture[str]
) -> None:
    play.parts["survey"] = [{"event": "error", "message": "a: not a model folder"}, {"exit": 1}]
    assert played(play) == 1
    assert "zquant: error: a: not a model folder\n" in capsys.readouterr().err


def test_the_folder_of_the_result_is_looked_for_first(
    play: Play, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert played(play, "--out", str(tmp_path / "nowhere" / "a.json")) == 1
    assert "nowhere' does not exist; create it first" in capsys.readouterr().err
    assert not play._log.exists()


def test_cost_prints_a_table_and_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--hours-per-day", "8", "--currency", "CNY", "--api-currency", "USD")
    assert cost("--seconds-per-image", "5", *flags, "--exchange-rate", "7.197") == 0
    out = capsys.readouterr().out
    assert "local        CNY 26,153.60 " in out
    assert "API          CNY 1,576,143.00 (USD 219,000.00 at 7.197 CNY/USD)" in out
    document: Any = json.loads(out.splitlines()[-1])
    assert document["schema"] == "zquant-bench-cost-1"


@pytest.mark.parametrize("words", [(), ("--seconds-per-image", "5", "--result", "a.json")])
def test_cost_takes_its_seconds_from_one_place(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cost(*words) == 2
    assert "needs either --result or --seconds-per-image" in capsys.readouterr().err


@pytest.mark.parametrize("flag", COST)
def test_cost_names_what_it_lacks(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cost("--seconds-per-image", "5", without=flag) == 2
    assert f"zquant bench cost needs {flag}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "schema is None; expected 'zquant-bench-1'"),
        ("[", "not valid JSON"),
        ('{"schema": "zquant-bench-1"}', "command is missing"),
    ],
)
def test_a_result_that_is_none_is_one_message(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    file.write_text(text)
    assert cost("--result", str(file)) == 1
    printed = capsys.readouterr()
    assert f"{file}: " in printed.err
    assert said in printed.err


def test_a_result_of_failures_alone_has_no_seconds(
    play: Play, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    play.parts["64x64"] = [{"event": "error", "message": "memory ran out"}]
    out = tmp_path / "result.json"
    assert played(play, "--sizes", "64", "--out", str(out)) == 1
    assert cost("--result", str(out)) == 1
    assert (
        "result.json: every size failed. Measure with smaller --sizes." in capsys.readouterr().err
    )
