"""`zquant plan`: tables and JSON, nothing painted."""

import json
import re
from pathlib import Path

import pytest

import zquant
from zquant.cli.main import main
from zquant.models.checkpoint import Checkpoint


@pytest.fixture(autouse=True)
def tokenizer(toy_engine: zquant.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the vocabulary takes a second; once is enough."""
    tokenizer = toy_engine.prompts.tokenizer
    monkeypatch.setattr(Checkpoint, "tokenizer", lambda _: tokenizer)


def plan(folder: Path, *words: str) -> int:
    words = ("plan", "--model", str(folder), "--device", "cpu", *words)
    return main(words)


def test_a_table_per_phase(toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(toy_folder, "--width", "256", "--height", "128") == 0
    out = capsys.readouterr().out
    assert out.startswith("256x128, 8 steps, prompt of 1")
    for row in ("fixed weights", "resident blocks", "activations", "peak", "seconds"):
        assert f"\n{row} " in out
    assert "RAM: " in out
    assert re.search(r"^smallest: --max-ram \d+\.\d\dGiB would still do$", out, re.MULTILINE)
    assert "recommended: this model as it is; every block stays" in out


def test_json_adds_up(toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("a red fox", "--json", "--max-ram", "60GiB", "--guidance-scale", "2")
    assert plan(toy_folder, *words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "plan"
    assert document["max_ram_bytes"] == 60 * 2**30
    assert document["picture"]["n_prompts"] == 2
    for phase in document["phases"]:
        assert sum(phase["device"].values()) == phase["device_bytes"] <= 60 * 2**30
    assert document["predicted_host_bytes"] == max(p["host_bytes"] for p in document["phases"])


def test_what_does_not_fit_is_one_message(
    toy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(toy_folder, "--max-ram", "16MiB", "--size", "1024") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1024x1024: the " in captured.err
    assert "--max-ram allows 16.0 MiB. Use --max-ram " in captured.err


def test_a_size_that_is_none_is_wrong_usage(
    toy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(toy_folder, "--budget", "plenty") == 2
    assert "'plenty' is not a number of bytes" in capsys.readouterr().err
