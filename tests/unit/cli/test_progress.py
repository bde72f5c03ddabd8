"""Bars on stderr, for terminals only."""

import sys

import pytest

from zquant.cli.progress import PhaseBar


def test_bars_are_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    bar = PhaseBar()
    for done in range(3):
        bar("denoise", done, 2)
    bar("vae", 0, 1)
    bar.close()
    bar.close()
    assert capsys.readouterr() == ("", "")


def test_a_bar_counts_its_phase(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = PhaseBar()
    for done in range(3):
        bar("denoise", done, 2)
    bar.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert "denoise: 100%" in err
    assert "2/2" in err
