"""The session on a GPU: stages that end well or badly, are not repeated, and can be rehearsed."""

import ast
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_run
import gpu_session
import gpu_stages
import pytest
from gpu_run import ROOT, Done, Failed, Run, Skipped

Stages = dict[str, Callable[[Run], Any]]


def session(out: Path, *words: str) -> int:
    return gpu_session.main([*words, "--out", str(out), "--rehearse"])


def documents(out: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text("utf-8")) for path in out.glob("*.json")}


@pytest.fixture(autouse=True)
def without_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the pytest that stages run: loading them takes longer than our tests."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    """A session of our own stages; `ran` lists what ran."""
    listed: Stages = {}
    monkeypatch.setattr(gpu_session, "STAGES", listed)
    return listed


def run_of(tmp_path: Path, *, rehearse: bool = False) -> Run:
    """For a stage that is called without a session."""
    end = time.monotonic() + 60
    return Run(rehearse=rehearse, log=tmp_path / "log", work=tmp_path / "work", end=end)


# the others need models, or are like memcheck
CHEAP = ("environment", "tests", "kernels", "memcheck")


def test_a_rehearsal_runs_the_stages_without_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert session(tmp_path, *CHEAP) == 0, capsys.readouterr().err
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = documents(tmp_path)
    assert set(found) == set(CHEAP)
    assert {name for name, d in found.items() if d["status"] != "done"} == {"memcheck"}
    assert found["memcheck"]["status"] == "skipped"
    assert "rehearsal" in found["memcheck"]["reason"]
    assert found["environment"]["result"]["doctor"]["kind"] == "doctor"
    assert found["tests"]["result"]["passed"] > 0
    benchmark = found["kernels"]["result"]
    assert benchmark["wrong"] == []
    timed = {row["kernel"]: row["ratios"] for row in benchmark["rows"]}
    assert {"dequantize", "quantize", "fused_norm", "matmul_int8", "block"} < set(timed)
    assert set(timed["block"]) == {"torch references, bf16"}
    assert all(d["command"] and d["rehearsed"] for d in found.values())
    # of the processor: how long it takes says more about a busy machine
    assert end.ru_utime - start.ru_utime < 120
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == list(CHEAP)
    assert list(tmp_path.glob("*.part")) == []


def test_what_is_done_is_not_run_again_unless_asked(tmp_path: Path, stages: Stages) -> None:
    ran: list[str] = []
    stages.update(a=lambda _: ran.append("a"), b=lambda _: ran.append("b"))
    assert session(tmp_path, "a") == session(tmp_path) == session(tmp_path) == 0
    assert ran == ["a", "b"]
    assert session(tmp_path, "b", "--again") == 0
    assert ran == ["a", "b", "b"]


def test_a_rehearsal_is_not_the_real_thing(
    tmp_path: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[bool] = []
    stages["a"] = lambda run: ran.append(run.rehearse)
    assert session(tmp_path) == 0
    monkeypatch.setattr(gpu_session, "no_gpu", lambda: "")
    assert gpu_session.main(["--out", str(tmp_path)]) == 0
    assert ran == [True, False]


def fail(run: Run) -> None:
    raise Failed("two of them are wrong", {"wrong": 2})


def test_a_failing_stage_is_named_and_the_others_still_run(
    tmp_path: Path, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    stages.update(bad=fail, good=lambda _: {"fine": True})
    assert session(tmp_path) == 1
    found = documents(tmp_path)
    assert (found["bad"]["status"], found["bad"]["result"]) == ("failed", {"wrong": 2})
    assert (found["good"]["status"], found["good"]["result"]) == ("done", {"fine": True})
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("bad: failed in ")
    assert line.endswith(": two of them are wrong")
    stages["bad"] = lambda _: None
    assert session(tmp_path) == 0  # what failed is run again


def test_a_stage_that_is_broken_itself_costs_no_other_stage(tmp_path: Path, stages: Stages) -> None:
    stages.update(broken=lambda _: 1 // 0, good=lambda _: None)
    with pytest.raises(ZeroDivisionError):
        session(tmp_path)
    found = documents(tmp_path)
    assert {name: d["status"] for name, d in found.items()} == {"broken": "failed", "good": "done"}
    assert "ZeroDivisionError" in found["broken"]["result"]["traceback"][-1]


def test_a_skipped_stage_says_why_and_is_no_failure(tmp_path: Path, stages: Stages) -> None:
    def skip(run: Run) -> None:
        raise Skipped("no tool")

    stages["a"] = skip
    assert session(tmp_path) == 0
    assert documents(tmp_path)["a"]["reason"] == "no tool"


@pytest.mark.parametrize("broken", [fail, lambda _: 1 // 0], ids=["failed", "broken"])
def test_where_the_environment_fails_nothing_after_it_is_run(
    tmp_path: Path,
    stages: Stages,
    capsys: pytest.CaptureFixture[str],
    broken: Callable[[Run], Any],
) -> None:
    ran: list[str] = []
    stages.update(a=lambda _: ran.append("a"), environment=broken)
    stages.update(b=lambda _: ran.append("b"), c=lambda _: ran.append("c"))
    try:
        assert session(tmp_path) == 1
    except ZeroDivisionError:
        assert broken is not fail
    assert ran == ["a"]
    assert capsys.readouterr().err.splitlines()[-1] == "not run, as environment failed: b, c"
    assert set(documents(tmp_path)) == {"a", "environment"}


def test_no_stage_goes_past_the_end_of_the_session(tmp_path: Path, stages: Stages) -> None:
    ends: list[float] = []
    stages["a"] = lambda run: ends.append(run.end - time.monotonic())
    assert session(tmp_path, "--total-s", "100") == 0
    assert session(tmp_path, "--total-s", "1000", "--again") == 0
    assert session(tmp_path, "--again") == 0
    assert 90 < ends[0] < 100
    assert all(500 < left < 540 for left in ends[1:])


def test_a_stage_without_time_is_left_to_the_next_call(
    tmp_path: Path, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    stages.update(done=lambda _: None, bad=fail)
    assert session(tmp_path) == 1
    stages["new"] = lambda _: ran.append("new")
    assert session(tmp_path, "--total-s", "19") == 0
    assert ran == []
    found = documents(tmp_path)
    assert (found["new"]["status"], found["new"]["reason"]) == ("skipped", "no time is left")
    assert found["bad"]["result"] == {"wrong": 2}  # what is known is kept
    assert "bad: skipped in 0.0 s: no time is left" in capsys.readouterr().err
    stages["bad"] = stages["new"]
    assert session(tmp_path) == 0
    assert ran == ["new", "new"]


def test_a_command_that_hangs_is_stopped_with_its_children(
    tmp_path: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import subprocess, sys; print('before', flush=True); subprocess.run(['sleep', '60'])"

    def hang(run: Run) -> None:
        done = run.python("-c", code)  # ends only when the child, who has its stdout, does
        raise Failed(done.trouble, done.stdout)

    monkeypatch.setattr(gpu_session, "LIMIT_S", 5.0)
    stages["slow"] = hang
    assert session(tmp_path) == 1
    document = documents(tmp_path)["slow"]
    assert document["reason"].startswith("stopped at the limit")
    assert document["result"] == "before\n"
    assert document["seconds"] < 20


def test_a_missing_module_is_named(tmp_path: Path, stages: Stages) -> None:
    def stage(run: Run) -> None:
        raise Failed(run.python("-c", "import surely_not_there").trouble)

    stages["a"] = stage
    assert session(tmp_path) == 1
    assert "No module named 'surely_not_there'" in documents(tmp_path)["a"]["reason"]


def test_a_loud_stage_shows_what_its_commands_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("-c", "import sys; print('half', file=sys.stderr); print('result')")
    run = run_of(tmp_path)
    assert run.python(*words).stderr == "half\n"
    assert capsys.readouterr().err == ""
    run.loud = True
    assert run.python(*words).stdout == "result\n"
    assert capsys.readouterr().err == "half\n"
    assert run.log.read_text().count("half") == 4  # in each command, and said by each


def test_the_environment_names_missing_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(gpu_stages, "MODULES", ("torch", "surely-not-there"))
    monkeypatch.setattr(Run, "__call__", lambda *_, **__: Done(0, "{}", ""))
    with pytest.raises(Failed, match="modules are missing: surely-not-there"):
        gpu_stages.environment(run_of(tmp_path, rehearse=True))
    # without some of them there is only less to compare with
    monkeypatch.setattr(gpu_stages, "MODULES", ("torch",))
    monkeypatch.setattr(gpu_stages, "OPTIONAL", ("surely-not-there",))
    found = gpu_stages.environment(run_of(tmp_path, rehearse=True))
    assert found["optional"] == {"surely-not-there": None}


def test_what_the_environment_must_have_is_what_zquant_imports() -> None:
    imported = set()
    for path in [p for folder in ("zquant", "kernels") for p in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported |= {name.split(".")[0].replace("PIL", "pillow") for name in names}
    imported -= {*sys.stdlib_module_names, "zquant", "zquant_kernels"}
    assert set(gpu_stages.MODULES) - {"pytest"} <= imported
    assert imported <= {*gpu_stages.MODULES, *gpu_stages.OPTIONAL}


TESTS = """
import os, pytest
def test_right(): pass
@pytest.mark.gpu
def test_marked(): pass
def test_wrong(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
"""
CRASH = """
import os
def test_before(): pass
def test_crash(): os.abort()
"""


def test_tests_are_counted_and_failures_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tests/kernels"
    folder.mkdir(parents=True)
    (folder / "test_a.py").write_text(TESTS)
    (folder / "test_b.py").write_text(CRASH)
    (folder / "test_c.py").write_text("def test_right(): pass\n")
    settings = '[pytest]\naddopts = --import-mode=importlib -m "not gpu"\nmarkers = gpu\n'
    (tmp_path / "pytest.ini").write_text(settings)
    monkeypatch.setattr(gpu_stages, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_run, "ROOT", tmp_path)
    with pytest.raises(Failed) as failed:
        gpu_stages.tests(run_of(tmp_path))
    found = failed.value.result
    assert isinstance(found, dict)
    a, crashed, c = found["files"]
    (failure,) = a["failures"]
    assert failure["name"].endswith("test_a::test_wrong")
    assert "one is not two" in " ".join(failure["lines"])
    assert (a["passed"], a["skipped"]) == (2, {"not here": 1})
    # no report, but the other files are not lost
    (failure,) = crashed["failures"]
    assert failure["name"] == "tests/kernels/test_b.py"
    assert failure["lines"][0] == "exit code -6: Fatal Python error: Aborted"
    assert "in test_crash" in " ".join(failure["lines"])
    assert (c["name"], c["passed"], c["failures"]) == ("tests/kernels/test_c.py", 1, [])
    assert (found["passed"], found["failed"], found["skipped"]) == (3, 2, 1)


SANITIZER = """#!/bin/sh
[ "$1" = --help ] && {{ echo "  --kernel-name-exclude arg"; exit 0; }}
echo "$@" >>"{log}"
echo "========= COMPUTE-SANITIZER"
echo "========= {line}"
exit {code}
"""


@pytest.mark.parametrize(
    ("line", "code", "reason"),
    [
        ("ERROR SUMMARY: 0 errors", 0, ""),
        ("ERROR SUMMARY: 3 errors", 97, "check: ========= ERROR SUMMARY: 3 errors"),
        ("ERROR SUMMARY: 0 errors", 5, "check: exit code 5"),
        ("Error: Device not supported", 1, "refuses this device"),
    ],
)
@pytest.mark.parametrize("name", ["memcheck", "racecheck"])
def test_the_sanitizer_judges_by_its_own_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, line: str, code: int, reason: str
) -> None:
    log = tmp_path / "calls"
    tool = tmp_path / "bin" / gpu_stages.SANITIZER
    tool.parent.mkdir()
    tool.write_text(SANITIZER.format(log=log, line=line, code=code))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/nothing:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    run = run_of(tmp_path)
    stage = gpu_session.STAGES[name]
    if reason:
        kind = Skipped if "refuses" in reason else Failed
        with pytest.raises(kind, match=reason):
            stage(run)
        return
    assert stage(run)["summary"] == ["========= ERROR SUMMARY: 0 errors"]
    (call,) = log.read_text().splitlines()
    assert f"--tool {name} " in call
    assert "--kernel-name-exclude kns=_Z" in call
    assert call.endswith("benchmarks/kernels.py --check")


def test_a_sanitizer_that_is_stopped_at_the_limit_has_not_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = Done(None, "========= COMPUTE-SANITIZER\n", "")
    monkeypatch.setattr(gpu_stages, "_sanitizer", lambda: "tool")
    monkeypatch.setattr(Run, "__call__", lambda *_, **__: said)
    with pytest.raises(Failed, match="memcheck: stopped at the limit") as failed:
        gpu_stages.memcheck(run_of(tmp_path))
    assert failed.value.result is not None


def test_without_a_gpu_it_ends_with_2_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_session.main(["--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sees no GPU" in line
    assert not (tmp_path / "out").exists()


def test_wrong_usage_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in ((["nothing", "--out", "x"], "'nothing' is unknown"), ([], "--out DIR")):
        with pytest.raises(SystemExit) as end:
            gpu_session.main(words)
        assert end.value.code == 2
        assert message in capsys.readouterr().err


def test_the_list_names_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_session.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(gpu_session.STAGES)
