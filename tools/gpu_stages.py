"""Stages of a GPU session that need no model: the machine, tests, memory errors, kernels."""

import json
import os
import platform
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

from gpu_run import ROOT, Failed, Run, Skipped, tail

__all__ = ["environment", "kernels", "memcheck", "racecheck", "tests", "version"]

# what zquant and the tests import whatever they do, by the names under which it is installed
MODULES = ("torch", "triton", "numpy", "pillow", "pytest", "tokenizers", "tqdm")
OPTIONAL = (  # without these there are fewer peers and tests, or something is slow or local only
    *("accelerate", "diffusers", "gguf", "huggingface_hub", "numba", "requests", "safetensors"),
    "transformers",
)
REHEARSED_TESTS = ("tests/unit/test_env.py",)
REHEARSED_KERNELS = ("quantize_tokens", "fused_norm")
TESTS = ("tests/kernels", "tests/gpu")
PROCESSES = 4  # test files at a time: compiling takes longer than launching
SHOWN_LINES = 15
SANITIZER = "compute-sanitizer"
SANITIZER_FAILED = 97  # exit code that tells its findings from a failure of the program
REFUSALS = ("Device not supported", "not supported on this device")


def environment(run: Run) -> dict[str, Any]:
    """What the machine is: modules, zquant doctor, nvidia-smi."""
    versions = {name: version(name) for name in MODULES}
    result: dict[str, Any] = {"python": platform.python_version(), "modules": versions}
    result["optional"] = {name: version(name) for name in OPTIONAL}
    if tool := shutil.which("nvidia-smi"):
        result["nvidia-smi"] = run(tool).stdout.splitlines()
    words = ("--device", "cpu", "--compute-dtype", "float32") if run.rehearse else ()
    done = run.python("-m", "zquant", "doctor", "--json", *words)
    try:
        result["doctor"] = json.loads(done.stdout)
    except ValueError as error:
        raise Failed(f"zquant doctor: {done.trouble or error}", result) from error
    if missing := [name for name, found in versions.items() if found is None]:
        raise Failed(f"Python modules are missing: {', '.join(missing)}", result)
    return result


def version(name: str) -> str | None:
    """Of an installed module; None where it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def tests(run: Run) -> dict[str, Any]:
    """Kernel and GPU tests, a process per file: a fault of the GPU spoils one file only."""
    paths = [p for folder in TESTS for p in sorted((ROOT / folder).glob("test_*.py"))]
    files = REHEARSED_TESTS if run.rehearse else [str(path.relative_to(ROOT)) for path in paths]
    with TemporaryDirectory() as folder, ThreadPoolExecutor(1 if run.rehearse else PROCESSES) as p:
        rows = list(
            p.map(lambda i: _test_file(run, files[i], Path(folder, f"{i}.xml")), range(len(files)))
        )
    failures = [failure["name"] for row in rows for failure in row["failures"]]
    result = {
        "passed": sum(row["passed"] for row in rows),
        "failed": len(failures),
        "skipped": sum(sum(row["skipped"].values()) for row in rows),
        "files": rows,
    }
    if failures:
        raise Failed(f"{len(failures)} failed, first {failures[0]}", result)
    if not result["passed"]:
        raise Failed("no test ran", result)
    return result


def _test_file(run: Run, name: str, report: Path) -> dict[str, Any]:
    """What became of the tests of one file or folder: `skipped` by reason, `failures` by name."""
    start = time.monotonic()
    # an empty mark expression selects all, also what the project's settings leave out
    words = ["-q", "-m", "", "-p", "no:cacheprovider", f"--junitxml={report}", name]
    env = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if run.rehearse else {}
    done = run.python("-m", "pytest", *words, **env)
    passed, skipped, failures = 0, Counter[str](), []
    # a crash leaves no report
    for case in ElementTree.parse(report).iter("testcase") if report.is_file() else ():
        outcome = {child.tag: child for child in case}
        if trouble := [outcome[tag] for tag in ("failure", "error") if tag in outcome]:
            lines = tail(trouble[0].text or "", SHOWN_LINES)
            failures.append(
                {"name": f"{case.get('classname')}::{case.get('name')}", "lines": lines}
            )
        elif "skipped" in outcome:
            skipped[outcome["skipped"].get("message") or ""] += 1
        else:
            passed += 1
    if done.code not in (0, 1) or (done.code == 1 and not failures):
        lines = [done.trouble, *tail(f"{done.stdout}\n{done.stderr}", SHOWN_LINES)]
        failures.append({"name": name, "lines": lines})
    seconds = round(time.monotonic() - start, 1)
    return {
        "name": name,
        "seconds": seconds,
        "passed": passed,
        "skipped": skipped,
        "failures": failures,
    }


def memcheck(run: Run) -> dict[str, Any]:
    """compute-sanitizer's memcheck over every kernel on small shapes."""
    return _sanitized(run, "memcheck")


def racecheck(run: Run) -> dict[str, Any]:
    """Likewise its racecheck, which is slower."""
    return _sanitized(run, "racecheck")


def _sanitized(run: Run, name: str) -> dict[str, Any]:
    """What a tool of compute-sanitizer found."""
    script = ("benchmarks/kernels.py", "--check")
    if run.rehearse:
        few = ("--device", "cpu", "--only", *REHEARSED_KERNELS)
        done = run.python(*script, *few, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
        if done.trouble:
            raise Failed(f"the program to check: {done.trouble}")
        raise Skipped("a rehearsal: the program ran, interpreted and without the tool")
    tool = _sanitizer()
    if tool is None:
        raise Skipped(f"no {SANITIZER} on PATH, in CUDA_HOME/bin or in the usual CUDA folder")
    only_ours = _without_cxx(run(tool, "--help").stdout)
    options = ["--tool", name, "--error-exitcode", str(SANITIZER_FAILED), *only_ours]
    # torch hands out parts of large allocations; one allocation per tensor has an end to pass
    cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = run(tool, *options, sys.executable, *script, **cache)
    said = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    if any(refusal in line for line in said for refusal in REFUSALS):
        raise Skipped(f"{SANITIZER} refuses this device: {said[-1]}")
    result = {"code": done.code, "summary": tail("\n".join(said), 1), "lines": said[:200]}
    if done.code == SANITIZER_FAILED:
        raise Failed(f"{name}: {' '.join(result['summary'])}", result)
    if done.trouble:
        raise Failed(f"{name}: {done.trouble}", result)
    return result


def _sanitizer() -> str | None:
    """Where the tool is."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which(SANITIZER) or shutil.which(SANITIZER, path=os.pathsep.join(places))


def _without_cxx(help_text: str) -> list[str]:
    """Options that leave out C++ kernels, which are torch's: Triton's names are not mangled."""
    spelled = ("--kernel-regex-exclude", "--kernel-name-exclude")
    option = next((name for name in spelled if name in help_text), None)
    return [option, "kns=_Z"] if option else []


def kernels(run: Run) -> Any:
    """Correctness, then speed of every kernel against its ceiling."""
    words = ("--device", "cpu", "--tiny") if run.rehearse else ()
    env = {"OMP_NUM_THREADS": "1"} if run.rehearse else {}
    done = run.python("benchmarks/kernels.py", *words, **env)
    document = done.document()
    if done.trouble:
        wrong = ", ".join(sorted({row["kernel"] for row in document["wrong"]}))
        raise Failed(f"wrong: {wrong}" if wrong else done.trouble, document)
    return document
