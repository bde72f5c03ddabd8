"""The README has the numbers that the result files have, and nothing else makes them."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

with pytest.MonkeyPatch.context() as patch:  # its neighbours are on the path for the import only
    patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    report: Any = importlib.import_module("report")


def test_the_readme_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_every_table_has_its_place() -> None:
    text = "".join(readme.read_text("utf-8") for readme in report.READMES)
    assert sorted(match[2] for match in report.MARKS.finditer(text)) == sorted(report.TABLES)


def test_another_figure_makes_a_readme_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in report.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    changed = tmp_path / "cpu-full-q8_0.json"
    document = json.loads(changed.read_text())
    document["convert"][0]["wall_s"] = 12345.4
    changed.write_text(json.dumps(document))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.main(["--check"]) == 1
    said = capsys.readouterr().out
    assert f"{report.READMES[1]} is not what the results say" in said
    assert str(report.READMES[0]) not in said
    copies = [tmp_path / f"{i}.md" for i in range(2)]
    for copy, readme in zip(copies, report.READMES, strict=True):
        copy.write_bytes(readme.read_bytes())
    monkeypatch.setattr(report, "READMES", copies)
    assert report.main(["--write"]) == 0
    assert report.main(["--check"]) == 0
    assert "| 12345 s, peak RAM" in copies[1].read_text("utf-8")


def test_results_of_another_schema_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.json").write_text('{"schema": "zquant-end-to-end-0"}')
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match=r"x.json has the schema 'zquant-end-to-end-0'; known: "):
        report.load("x")


def test_projected_figures_stand_alone() -> None:
    assert report.projected().startswith("| projected |")
    for name in report.TABLES.keys() - {"projected"}:
        assert "RTX" not in report.TABLES[name]()


def test_plots_are_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = list(report.plot_all(tmp_path / "new", report.load))
    assert [path.stem for path in paths] == ["memory-seconds", "quality-size", "timeline-projected"]
    for path in paths:
        with Image.open(path) as image:
            assert len(image.convert("RGB").getcolors(2**16) or []) > 10
