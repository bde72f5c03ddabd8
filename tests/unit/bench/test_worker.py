"""The measuring process, here without a process of its own."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import zquant
from tests.unit.bench.bench_testing import SURVEY
from zquant.bench import ceiling, worker
from zquant.bench.schema import CEILING, DOCUMENT, check_shape
from zquant.errors import ZQuantError
from zquant.image import read_recipe
from zquant.models.checkpoint import Checkpoint
from zquant.models.tokenizer import prompt_ids


@pytest.fixture(autouse=True)
def cheap(toy_engine: zquant.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the vocabulary takes a second, and every rate a third; once is enough."""
    tokenizer = toy_engine.prompts.tokenizer
    monkeypatch.setattr(Checkpoint, "tokenizer", lambda _: tokenizer)

    def best(work: Any, **_: Any) -> float:
        work()
        return 1.0

    monkeypatch.setattr(ceiling, "best_seconds", best)


def job(model: Path, kind: str, **fields: Any) -> dict[str, Any]:
    machine = {"device": "cpu", "compute_dtype": "float32"}
    limits = {"budget_bytes": None, "ram_bytes": None}
    return {"kind": kind, "model": str(model), "steps": 2, "machine": machine, **limits, **fields}


def told(work: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a job."""
    events: list[dict[str, Any]] = []
    worker.work(work, lambda event, **values: events.append({"event": event, **values}))
    return events


def test_a_survey_has_the_machine_and_a_ceiling_per_size(toy_folder: Path) -> None:
    (event,) = told(job(toy_folder, "survey", sizes=[(64, 64), (128, 96)]))
    for key in ("machine", "device", "model", "rates"):
        check_shape(event[key], DOCUMENT[key], "the survey", key)
    small, large = event["sizes"]
    assert (small["n_tokens"], large["n_tokens"]) == (32 + 32, 64 + 32)
    for row in (small, large):
        check_shape(row["ceiling"], CEILING, "the survey")
    assert large["ceiling"]["step_flop"] > small["ceiling"]["step_flop"]
    assert json.dumps(event)
    assert set(SURVEY) == set(event)  # what plays it elsewhere has no other keys


def test_a_size_without_a_plan_has_the_reason(toy_folder: Path) -> None:
    work = job(toy_folder, "survey", sizes=[(64, 64)])
    (event,) = told(work | {"ram_bytes": 2**20})
    (row,) = event["sizes"]
    assert set(row) == {"failure"}
    assert "64x64: the text encoder needs " in row["failure"]
    assert "--max-ram allows 1.0 MiB" in row["failure"]


def test_every_picture_goes_through_every_phase(toy_folder: Path, tmp_path: Path) -> None:
    work = job(toy_folder, "paint", width=32, height=48, repeat=2, folder=str(tmp_path))
    ready, *others = told(work)
    assert ready == {"event": "ready"}
    runs = [i for i, event in enumerate(others) if event["event"] == "run"]
    assert len(runs) == 3
    for start, end in zip([0, *(i + 1 for i in runs)], runs, strict=False):
        phases = [event["phase"] for event in others[start:end]]
        # no embedding of an earlier picture is used again
        assert list(dict.fromkeys(phases)) == ["text encoder", "denoise", "vae"]
        run = others[end]
        assert len(run["steps_s"]) == 1
        parts = ("plan_s", "text_encoder_s", "first_step_s", "vae_s", "save_s")
        assert all(run[name] > 0 for name in parts)
        assert sum(run[name] for name in parts) + sum(run["steps_s"]) <= run["total_s"]
        assert run["peak_ram_bytes"] > 10 * 2**20
        assert run["peak_allocator_bytes"] is None
    assert others[runs[-1]]["memory"]["predicted_host_bytes"] > 0
    assert read_recipe(tmp_path / "picture.png")["prompt"] == worker.PROMPT.format(2)


def test_prompts_differ_but_not_in_length(toy_engine: zquant.Engine) -> None:
    tokenizer = toy_engine.prompts.tokenizer
    prompts = [worker.PROMPT.format(i) for i in range(100)]
    assert len(set(prompts)) == 100
    assert len({len(prompt_ids(tokenizer, prompt).ids) for prompt in prompts}) == 1


def test_a_single_step_cannot_be_told_apart(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ZQuantError, match="give --steps 2 or more"):
        told(job(toy_folder, "survey", sizes=[]) | {"steps": 1})


def play(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> None:
    def work(_: Any, send: Any) -> None:
        print("a library says hello")
        send("ready")
        if isinstance(outcome, BaseException):
            raise outcome

    monkeypatch.setattr(worker, "work", work)


def test_only_events_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    play(monkeypatch, None)
    assert worker.main(["{}"]) == 0
    printed = capsys.readouterr()
    assert printed.out == '{"event": "ready"}\n'
    assert printed.err == "a library says hello\n"
    assert sys.stdout is not sys.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ZQuantError("a: damaged"), "a: damaged"),
        (FileNotFoundError(2, "No such file", "a.gguf"), "[Errno 2] No such file: 'a.gguf'"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nmore"),
            "memory ran out (CUDA out of memory.). Close other programs that use the GPU.",
        ),
    ],
)
def test_what_a_user_can_act_on_is_an_event(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    play(monkeypatch, error)
    assert worker.main(["{}"]) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {"event": "error", "message": said}


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        worker.main(["{}"])


def test_ctrl_c_is_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, KeyboardInterrupt())
    assert worker.main(["{}"]) == 130


def test_the_peak_is_that_of_the_system_where_it_has_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker, "peak_host_bytes", lambda: 77)
    monkeypatch.setattr(worker, "_field", lambda _, name: {"VmHWM:": 3}[name])
    assert worker._peak_ram_bytes() == 3 * 1024
    monkeypatch.setattr(worker, "_field", lambda *_: None)
    assert worker._peak_ram_bytes() == 77


def test_what_the_system_does_not_count_is_unknown(tmp_path: Path) -> None:
    assert worker._field(tmp_path / "missing", "read_bytes:") is None
    file = tmp_path / "io"
    file.write_text("rchar: 5\nread_bytes: 4096\n")
    assert worker._field(file, "read_bytes:") == 4096
    assert worker._field(file, "VmHWM:") is None
