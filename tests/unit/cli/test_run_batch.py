"""`zquant run --prompt-file`: many prompts, names and seeds, resuming after a stop."""

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zquant.cli.main import main
from zquant.image import read_recipe
from zquant.models.dit import DiT

Batch = Callable[..., tuple[int, str, str]]


@pytest.fixture
def batch(run: Callable[..., tuple[int, str, str]]) -> Batch:
    """`zquant run --prompt-file` with the toy, 32x32, two steps, into `out`."""

    def call(lines: str, *words: str) -> tuple[int, str, str]:
        Path("prompts.txt").write_text(lines, encoding="utf-8")
        out = [] if "--out" in words else ["--out", "out"]
        return run("--prompt-file", "prompts.txt", *out, *words)

    return call


def names(folder: str = "out") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


LINES = """# two plain, one with settings
a fox
a hare

{"prompt": "a bear", "name": "bear", "steps": 1, "count": 2, "seed": 40}
"""


def test_every_line_becomes_pictures(batch: Batch) -> None:
    code, out, err = batch(LINES, "--seed", "7")
    assert code == 0
    assert out.splitlines() == [
        f"{Path('out', name)}.png  seed {seed}"
        for name, seed in (("0002", 7), ("0003", 8), ("bear-1", 40), ("bear-2", 41))
    ]
    assert names() == ["0002.png", "0003.png", "bear-1.png", "bear-2.png"]
    assert "4 of 4 pictures to paint" in err
    recipe = read_recipe("out/bear-2.png")
    assert (recipe["prompt"], recipe["steps"], recipe["width"]) == ("a bear", 1, 32)


def test_json_is_a_line_per_picture(batch: Batch) -> None:
    code, out, _ = batch("a fox\na hare\n", "--json")
    assert code == 0
    documents = [json.loads(line) for line in out.splitlines()]
    assert [d["recipe"]["seed"] for d in documents] == [0, 1]
    assert set(documents[0]) == {"image", "recipe", "timings", "memory", "notices"}


def stop_after(monkeypatch: pytest.MonkeyPatch, n: int) -> list[int]:
    """Ctrl-C while the n-th velocity is computed; the list counts all of them."""
    real, calls = DiT.velocity, [0]

    def velocity(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == n:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(DiT, "velocity", velocity)
    return calls


def test_what_was_stopped_is_resumed_without_repeating_a_step(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stop_after(monkeypatch, 3)
    code, out, err = batch("a fox\na hare\n")
    assert code == 130
    assert out == ""
    assert "stopping after this step" in err
    assert err.endswith("out: not complete; go on with --resume\nzquant: interrupted\n")
    code, _, err = batch("a fox\na hare\n")
    assert code == 1
    assert "--resume" in err
    code, out, err = batch("a fox\na hare\n", "--resume")
    assert code == 0
    assert calls[0] == 4  # two pictures of two steps
    assert names() == ["0001.png", "0002.png"]
    batch("a fox\na hare\n", "--out", "whole")
    for name in names():
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()


def test_resuming_a_finished_job_paints_what_is_missing(batch: Batch) -> None:
    batch("a fox\n")
    assert batch("a fox\na hare\n", "--resume")[0] == 0
    assert names() == ["0001.png", "0002.png"]


WRONG = {
    "not a setting": ('{"prompt": "x", "widht": 32}', 1, "line 1: .*widht"),
    "not a size": ('a fox\n{"prompt": "x", "width": 33}', 1, "line 2: width is 33"),
    "no prompts": ("# nothing", 1, "has no prompts"),
}


@pytest.mark.parametrize(("lines", "code", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_one_message_and_no_work(
    batch: Batch, lines: str, code: int, message: str
) -> None:
    import re

    got, out, err = batch(lines)
    assert (got, out) == (code, "")
    assert re.search(message, err)
    assert not Path("out").exists()


def test_flags_that_do_not_go_with_many_prompts(batch: Batch, tmp_path: Path) -> None:
    for words in (["a fox"], ["--save-latents", "x.npy"], ["--out", "fox.png"]):
        code, out, err = batch("a fox", *words)
        assert (code, out) == (2, "")
        assert "--prompt-file" in err
    assert main(["run", "a fox", "--resume", "--model", str(tmp_path)]) == 2


def test_many_pictures_need_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["run", "--prompt-file", "x.txt", "--model", str(tmp_path)]) == 2
    assert "--prompt-file needs --out FOLDER for its pictures" in capsys.readouterr().err


def test_prompts_that_a_console_cannot_show_are_still_json(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="cp1252"))
    code, _, _ = batch("狐狸 🦊\n", "--json")
    assert code == 0
    assert json.loads(written.getvalue())["recipe"]["prompt"] == "狐狸 🦊"
