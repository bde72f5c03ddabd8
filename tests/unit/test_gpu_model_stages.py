"""The stages about whole models: what they ask for, keep, take up again and refuse.

Conversions and the benchmark are played: their command lines are read by their own parsers.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_model_stages as models
import gpu_session
import pytest
from gpu_run import Done, Failed, Run, Skipped

from zquant.cli.convert import add_arguments

ROOT = Path(__file__).parents[2]
WHOLE = [name for name, stage in gpu_session.STAGES.items() if stage.__module__ == models.__name__]


def parser_of(name: str) -> Callable[[list[str]], argparse.Namespace]:
    """Of a benchmark."""
    folder = ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location(f"bench_{name}", folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        spec.loader.exec_module(module)
    return lambda words: module._arguments(words)


def row(engine: str, status: str, reason: str = "") -> dict[str, str]:
    """Of the benchmark of peers."""
    fields = {"engine": engine, "label": engine, "size": "512"}
    return fields | {"status": status, "reason": reason}


class Played:
    """Answers the commands of a stage.

    Attributes:
        made: presets of checkpoints.
        conversions: asked for, by name of the source, qtype and device.
        benchmarks: asked for.
        words: of the benchmark of peers.
        failures: that the benchmark finds.
        rows: of the peers.
        stops_after: rows of a benchmark that is stopped at the limit; None: it ends.
        device_shows: the bytes of a conversion depend on the device.
    """

    def __init__(self) -> None:
        self.made: list[str] = []
        self.conversions: list[tuple[str, str, str]] = []
        self.benchmarks: list[argparse.Namespace] = []
        self.words: list[str] = []
        self.failures: list[str] = []
        self.rows = [row("diffusers", "ok")]
        self.stops_after: int | None = None
        self.device_shows = False
        self.parse = parser_of("streaming")

    def __call__(self, run: Run, *words: str) -> Done:
        run.commands.append(" ".join(words))
        if words[0] == "tools/make_checkpoint.py":
            self.made.append(words[3])
            Path(words[1]).mkdir()
            Path(words[1], "model_index.json").write_text("{}")
            return Done(0, "", "")
        if words[:3] == ("-m", "zquant", "convert"):
            return self.convert(list(words[3:]))
        if words[0] == "benchmarks/peers.py":
            self.words = list(words[1:])
            wrong = any(row["status"] == "failed" for row in self.rows)
            return self.ended(words, {"rows": self.rows}, wrong)
        assert words[0] == "benchmarks/streaming.py"
        self.benchmarks.append(self.parse(list(words[1:])))
        document = {"failures": self.failures, "rows": self.rows}
        return self.ended(words, document, bool(self.failures))

    def ended(self, words: Sequence[str], document: dict[str, Any], wrong: bool) -> Done:
        """A benchmark, which writes as it comes."""
        out = Path(words[words.index("--out") + 1])
        assert not out.exists()
        if self.stops_after is None:
            return Done(int(wrong), f"progress\n{json.dumps(document)}\n", "said\n")
        if self.stops_after:
            out.write_text(json.dumps(document | {"rows": self.rows[: self.stops_after]}))
        return Done(None, "progress\n", "said\n")

    def convert(self, words: list[str]) -> Done:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        args = parser.parse_args(words)
        assert args.resume
        assert args.json
        source, folder = map(Path, args.paths)
        assert (source / "model_index.json").is_file()
        self.conversions.append((source.name, args.qtype, args.device))
        folder.mkdir()
        data = f"{args.qtype} {args.device if self.device_shows else ''}"
        (folder / f"dit-{args.qtype}.gguf").write_text(data)
        manifest = {"files": {"dit": {"weights": 7}}}
        (folder / "model.json").write_text(json.dumps(manifest))
        return Done(0, json.dumps(manifest) + "\n", "quantizing on it\n")


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    answers = Played()
    monkeypatch.setattr(Run, "python", lambda run, *words, **_: answers(run, *words))
    return answers


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(models, "DISK_BYTES", {False: 1000, True: 1000})
    end = time.monotonic() + 60
    return Run(rehearse=False, log=tmp_path / "log", work=tmp_path / "work", end=end)


def test_a_rehearsal_makes_converts_and_paints(tmp_path: Path, played: Played) -> None:
    assert gpu_session.main([*WHOLE, "--out", str(tmp_path / "out"), "--rehearse"]) == 0
    found = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "out").glob("*.json")}
    assert set(found) == set(WHOLE)
    assert {name for name, d in found.items() if d["status"] != "done"} == {"ballast"}
    assert found["ballast"]["status"] == "skipped"
    assert set(played.made) == {"tiny"}
    assert {device for _, _, device in played.conversions} == {"cpu"}
    assert {args.device for args in played.benchmarks} == {"cpu"}
    assert found["convert-q8_0"]["result"]["weights"] == 7
    # the default work folder is for the full size
    made = sorted(p.name for p in (tmp_path / "out/work").iterdir())
    assert made == ["Q4_K_M", "Q8_0", "checkpoint", "peers", "streaming"]


def test_the_session_asks_for_full_size_on_the_gpu(run: Run, played: Played) -> None:
    found = models.checkpoint(run)
    assert found["bytes"] == 2
    models.convert_q8_0(run)
    models.convert_q4_k_m(run)
    assert (run.work / "checkpoint").is_dir()  # for peers
    assert played.made == ["full", "tiny", "tiny"]
    of_tiny = [("cuda", "cpu"), ("cuda", "cpu")]
    wanted = []
    for qtype, devices in zip(models.QTYPES, of_tiny, strict=True):
        wanted += [("checkpoint", qtype, device) for device in (*devices, "cuda")]
    assert played.conversions == wanted
    models.streaming_q8_0(run)
    models.streaming_q4_k_m(run)
    models.streaming_q4_k_m_int8(run)
    models.ballast(run)
    assert run.loud
    first, second, int8, last = played.benchmarks
    paths = [str(run.work / qtype) for qtype in models.QTYPES]
    assert [args.models for args in played.benchmarks] == [paths[:1], *[paths[1:]] * 2, paths]
    assert [args.compute for args in played.benchmarks] == ["auto", "auto", "int8", "auto"]
    assert (int8.budgets, int8.width, int8.steps) == ([None, 4 * 2**30], 1024, 8)
    gib = [None if size is None else size / 2**30 for size in second.budgets]
    assert gib == [None, 2, 3, 4, 6, 8]
    assert (first.width, first.height, first.steps) == (1024, 1024, 8)
    assert {args.device for args in played.benchmarks} == {"cuda"}
    assert [args.ballast for args in played.benchmarks] == [False, False, False, True]
    assert last.budgets == [2 * 2**30, 4 * 2**30]


def test_what_is_there_is_not_made_again(run: Run, played: Played) -> None:
    stopped = run.work / "checkpoint.part"
    stopped.mkdir(parents=True)
    (stopped / "half a shard").write_text("half")
    models.checkpoint(run)
    assert not (run.work / "checkpoint" / "half a shard").exists()
    assert models.checkpoint(run)["made_before"]
    models.convert_q8_0(run)
    assert models.convert_q8_0(run)["made_before"]
    models.convert_q4_k_m(run)
    assert models.checkpoint(run)["made_before"]
    assert played.made.count("full") == 1
    assert len(played.conversions) == 3 + 2 + 3


def test_other_bytes_by_the_gpu_are_named_and_nothing_is_converted(
    run: Run, played: Played
) -> None:
    models.checkpoint(run)
    played.device_shows = True
    with pytest.raises(Failed, match=r"tiny Q4_K_M: dit-Q4_K_M.gguf differ by cuda and cpu"):
        models.convert_q4_k_m(run)
    assert not (run.work / "Q4_K_M").exists()
    assert sorted(p.name for p in run.work.iterdir()) == ["checkpoint"]


def test_a_stage_says_which_stage_it_needs(run: Run, played: Played) -> None:
    run.work.mkdir()
    with pytest.raises(Failed, match="is missing; run: checkpoint --again"):
        models.convert_q8_0(run)
    with pytest.raises(Failed, match="not a model yet; run: checkpoint convert-q4_k_m --again"):
        models.streaming_q4_k_m(run)
    with pytest.raises(Failed, match="not a model yet"):
        models.ballast(run)
    assert played.benchmarks == []


def test_a_full_disk_is_found_before_the_work(
    run: Run, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "DISK_BYTES", {False: 10**18})
    with pytest.raises(Failed, match=r"1000000000.0 GB are needed, .* another folder with --work"):
        models.checkpoint(run)
    assert played.made == []


def test_what_the_benchmark_finds_fails_the_stage_and_is_kept(run: Run, played: Played) -> None:
    models.checkpoint(run)
    models.convert_q8_0(run)
    played.failures = ["Q8_0 within 2.0 GiB: held 2.1 GiB of VRAM", "another"]
    with pytest.raises(Failed, match=r"held 2.1 GiB of VRAM; another") as failed:
        models.streaming_q8_0(run)
    assert failed.value.result == {"failures": played.failures, "rows": played.rows}


@pytest.mark.parametrize("stage", ["streaming-q8_0", "peers-512"])
@pytest.mark.parametrize(("n", "kept"), [(1, {"reference"}), (2, {"reference", "zquant"})])
def test_a_benchmark_that_is_stopped_keeps_its_rows(
    run: Run, played: Played, stage: str, n: int, kept: set[str]
) -> None:
    for made in ("checkpoint", "convert-q8_0", "convert-q4_k_m"):
        gpu_session.STAGES[made](run)
    played.rows = [row(name, "ok") for name in ("reference", "zquant", "diffusers")]
    played.stops_after = n
    with pytest.raises(Failed, match="stopped at the limit") as failed:
        gpu_session.STAGES[stage](run)
    document: Any = failed.value.result
    assert {found["engine"] for found in document["rows"]} == kept
    played.stops_after = 0  # rows of another run are not taken for its own
    with pytest.raises(Failed, match="stopped at the limit") as failed:
        gpu_session.STAGES[stage](run)
    assert failed.value.result == ["said"]


def test_peers_paint_from_the_checkpoint_and_both_models(
    run: Run, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.checkpoint(run)
    models.convert_q8_0(run)
    with pytest.raises(Failed, match="Q4_K_M is not a model yet"):
        models.peers_1024(run)
    models.convert_q4_k_m(run)
    monkeypatch.setattr("zquant.models.checkpoint.model_files", lambda *_: None)
    parse = parser_of("peers")
    for stage, size in ((models.peers_1024, 1024), (models.peers_512, 512)):
        assert stage(run) == {"rows": played.rows}
        args = parse(played.words)
        assert (args.device, args.sizes, args.steps) == ("cuda", [size], 8)
        assert [p.name for p in (args.checkpoint, *args.models)] == ["checkpoint", *models.QTYPES]
        assert (args.work, args.keep, args.limit_s) == (run.work / "peers", True, 150)
    played.rows.append(row("zquant", "failed", "lost"))
    with pytest.raises(Failed, match="zquant 512: lost") as failed:
        models.peers_512(run)
    assert failed.value.result == {"rows": played.rows}


def test_without_a_peer_the_stage_fails_and_names_the_packages(
    run: Run, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.checkpoint(run)
    models.convert_q8_0(run)
    models.convert_q4_k_m(run)
    absent = "diffusers is not installed"
    played.rows = [row("reference", "ok"), row("zquant", "ok"), row("diffusers", "skipped", absent)]
    played.rows.append(row("sdcpp", "skipped", "no --sdcpp PATH"))
    monkeypatch.setattr(models, "version", lambda name: "1" if name == "accelerate" else None)
    reasons = f"no peer painted; {absent}; no --sdcpp PATH. .* wheels of diffusers, transf.*, gguf"
    with pytest.raises(Failed, match=reasons) as failed:
        models.peers_512(run)
    assert failed.value.result == {"rows": played.rows}
    played.rows.append(row("diffusers-gguf", "ok"))
    assert models.peers_512(run) == {"rows": played.rows}


@pytest.mark.parametrize(
    ("code", "stderr", "reason"),
    [(None, "painting\n", "stopped at the limit: painting"), (1, "a\nKeyError: 'x'\n", "KeyError")],
)
def test_a_benchmark_without_a_document_keeps_what_it_said(
    run: Run, played: Played, monkeypatch: pytest.MonkeyPatch, code: int, stderr: str, reason: str
) -> None:
    models.checkpoint(run)
    models.convert_q8_0(run)
    monkeypatch.setattr(Run, "python", lambda *_, **__: Done(code, "", stderr))
    with pytest.raises(Failed, match=reason) as failed:
        models.streaming_q8_0(run)
    assert failed.value.result == stderr.splitlines()


def test_a_conversion_that_fails_is_named(
    run: Run, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.checkpoint(run)
    monkeypatch.setattr(played, "convert", lambda _: Done(1, "", "zquant: error: no memory\n"))
    with pytest.raises(Failed, match=r"convert to Q8_0 on cuda: exit code 1: .*no memory"):
        models.convert_q8_0(run)


def test_the_checkpoint_is_made_by_the_real_tool(tmp_path: Path) -> None:
    end = time.monotonic() + 60
    run = Run(rehearse=True, log=tmp_path / "log", work=tmp_path / "work", end=end)
    found = models.checkpoint(run)
    assert found["bytes"] > 1e8
    assert (run.work / "checkpoint/model_index.json").is_file()
    assert found["gb_s"] > 0
    assert sys.executable in run.commands[0]


def test_there_is_no_ballast_on_a_cpu(run: Run) -> None:
    run.rehearse = True
    with pytest.raises(Skipped, match="no VRAM"):
        models.ballast(run)
