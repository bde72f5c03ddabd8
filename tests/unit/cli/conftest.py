"""`zquant run` as its tests call it."""

from collections.abc import Callable
from pathlib import Path

import pytest

import zquant
from zquant.cli.main import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    toy_engine: zquant.Engine,
    toy_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """`zquant run` with the toy, at 32×32 and two steps unless told: exit code, stdout, stderr."""
    from zquant.models.checkpoint import Checkpoint

    tokenizer = toy_engine.prompts.tokenizer
    monkeypatch.setattr(Checkpoint, "tokenizer", lambda _: tokenizer)
    monkeypatch.delenv("ZQUANT_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)

    def call(*words: str, small: bool = True) -> tuple[int, str, str]:
        given = list(words)
        if "--model" not in words and "--dit" not in words:
            given += ["--model", str(toy_folder)]
        if "--device" not in words:
            given += ["--device", "cpu"]
        if small:
            given += ["--width", "32", "--height", "32", "--steps", "2"]
            given += ["--compute-dtype", "float32"]
        code = main(["run", *given])
        return code, *capsys.readouterr()

    return call
