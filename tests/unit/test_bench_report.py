"""The README has the numbers that the result files have, and nothing else makes them."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import report


def test_the_readme_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_every_table_has_its_place() -> None:
    text = report.README.read_text(encoding="utf-8")
    assert sorted(match[2] for match in report.MARKS.finditer(text)) == sorted(report.TABLES)


def test_another_figure_makes_the_readme_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in report.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    changed = tmp_path / "cpu-full-512-q4_k_m.json"
    document = json.loads(changed.read_text())
    document["run"][0]["step_s"] += 1
    changed.write_text(json.dumps(document))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.main(["--check"]) == 1
    assert "report.py --write" in capsys.readouterr().out
    copy = tmp_path / "README.md"
    copy.write_bytes(report.README.read_bytes())
    monkeypatch.setattr(report, "README", copy)
    assert report.main(["--write"]) == 0
    assert report.main(["--check"]) == 0
    assert "| 512x512, one step | 121 s, peak RAM 6.7 GiB | 97 s," in copy.read_text("utf-8")


def test_projected_figures_stand_alone() -> None:
    assert report.projected().startswith("| projected |")
    for name in ("measured", "int8-blocks", "int8-demo"):
        assert "RTX" not in report.TABLES[name]()


def test_plots_are_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = list(report.plot_all(tmp_path / "new", report.load))
    assert [path.stem for path in paths] == ["memory-seconds", "quality-size", "timeline-projected"]
    for path in paths:
        with Image.open(path) as image:
            assert len(image.convert("RGB").getcolors(2**16) or []) > 10
