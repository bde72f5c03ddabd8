"""Every check and measurement that needs a GPU, in stages that can be taken up again.

    tools/gpu_session [STAGE...] --out DIR [--rehearse] [--again] [--list]

Without names every stage runs, each with a limit of 540 s, and leaves `DIR/<stage>.json`: status
(done, failed or skipped) with the reason, seconds, the commands and their result. What commands
print goes to `DIR/session.log`. A stage that is done is not run again. Exit code 1: one failed;
2: there is no GPU. `--rehearse` runs everything small and on the CPU, to test this script.

A stage is a function that runs commands and returns its result, listed in `STAGES`.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
SCHEMA = "zquant-gpu-session-1"
LIMIT_S = 540.0
MODULES = (  # what the stages import, by the names under which it is installed
    *("torch", "triton", "numpy", "pytest", "gguf", "safetensors", "tokenizers", "transformers"),
    *("huggingface_hub", "pillow", "tqdm"),
)
REHEARSED_TESTS = ("tests/kernels/test_hadamard.py", "tests/gpu")
REHEARSED_KERNELS = ("quantize_tokens", "fused_norm")
TESTS = ("tests/kernels", "tests/gpu")
PROCESSES = 4  # test files at a time: compiling takes longer than launching
SHOWN_LINES = 15
SANITIZER = "compute-sanitizer"
SANITIZER_FAILED = 97  # exit code that tells its findings from a failure of the program
REFUSALS = ("Device not supported", "not supported on this device")


class Failed(Exception):  # noqa: N818 # a verdict, not a fault
    """The stage found something wrong; what it knows so far is kept."""

    def __init__(self, reason: str, result: object = None) -> None:
        super().__init__(reason)
        self.result = result


class Skipped(Exception):  # noqa: N818 # a verdict, not a fault
    """The stage cannot run here."""


@dataclass(frozen=True, slots=True)
class Done:
    """A command that ended; `code` is None where it was stopped at the limit."""

    code: int | None
    stdout: str
    stderr: str

    @property
    def trouble(self) -> str:
        """Why it did not end well, in one line; empty when it did."""
        if self.code == 0:
            return ""
        how = "stopped at the limit" if self.code is None else f"exit code {self.code}"
        return ": ".join([how, *tail(self.stderr or self.stdout, 1)])

    def document(self) -> Any:
        """The JSON document that is the last line of stdout.

        Raises:
            Failed: there is none.
        """
        try:
            return json.loads(*tail(self.stdout, 1))
        except (TypeError, ValueError) as error:
            raise Failed(self.trouble or f"no JSON document in its output ({error})") from error


@dataclass(slots=True, kw_only=True)
class Run:
    """One stage while it runs."""

    rehearse: bool
    log: Path
    end: float  # on the clock of `time.monotonic`
    commands: list[str] = field(default_factory=list)

    def __call__(self, *words: str, **env: str) -> Done:
        """Run a command in the checkout, at most until the stage's limit."""
        self.commands.append(shlex.join(words))
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**environment_variables(), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # so that it can be stopped with all that it started
        )
        code: int | None = None
        try:
            printed = process.communicate(timeout=max(0.1, self.end - time.monotonic()))
            code = process.returncode
        except BaseException as stop:
            os.killpg(process.pid, signal.SIGKILL)
            printed = process.communicate()
            if not isinstance(stop, subprocess.TimeoutExpired):
                raise
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {self.commands[-1]}\n{printed[0]}{printed[1]}\n")
        return Done(code, *printed)

    def python(self, *words: str, **env: str) -> Done:
        """`__call__` with this Python."""
        return self(sys.executable, *words, **env)


def environment_variables() -> dict[str, str]:
    """Ours, such that Python finds the checkout before anything installed."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [env.get("PYTHONPATH")])]
    return {**env, "PYTHONPATH": os.pathsep.join(path), "PYTHONFAULTHANDLER": "1"}


def tail(text: str, n: int) -> list[str]:
    """The last `n` lines that say something, or those with which Python tells of its crash."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    crash = [i for i, line in enumerate(lines) if line.startswith("Fatal Python error")]
    return lines[crash[0] :][:n] if crash else lines[-n:]


def environment(run: Run) -> dict[str, Any]:
    """What the machine is: modules, zquant doctor, nvidia-smi."""
    versions = {name: version(name) for name in MODULES}
    result: dict[str, Any] = {"python": platform.python_version(), "modules": versions}
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


def sanitizer(run: Run) -> dict[str, Any]:
    """compute-sanitizer, memcheck and racecheck, over every kernel on small shapes."""
    script = ("benchmarks/kernels.py", "--check")
    if run.rehearse:
        few = ("--device", "cpu", "--only", *REHEARSED_KERNELS)
        done = run.python(*script, *few, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
        if done.code:
            raise Failed(f"the program to check: {done.trouble}")
        raise Skipped("a rehearsal: the program ran, interpreted and without the tool")
    tool = _sanitizer()
    if tool is None:
        raise Skipped(f"no {SANITIZER} on PATH, in CUDA_HOME/bin or in the usual CUDA folder")
    only_ours = _without_cxx(run(tool, "--help").stdout)
    result: dict[str, Any] = {}
    for name in ("memcheck", "racecheck"):
        options = ["--tool", name, "--error-exitcode", str(SANITIZER_FAILED), *only_ours]
        # torch hands out parts of large allocations; one allocation per tensor has an end to pass
        cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = run(tool, *options, sys.executable, *script, **cache)
        said = [line for line in done.stdout.splitlines() if line.startswith("=========")]
        if any(refusal in line for line in said for refusal in REFUSALS):
            raise Skipped(f"{SANITIZER} refuses this device: {said[-1]}")
        result[name] = {"code": done.code, "summary": tail("\n".join(said), 1), "lines": said[:200]}
        if done.code == SANITIZER_FAILED:
            raise Failed(f"{name}: {' '.join(result[name]['summary'])}", result)
        if done.code:
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
    if done.code:
        wrong = ", ".join(sorted({row["kernel"] for row in document["wrong"]}))
        raise Failed(f"wrong: {wrong}" if wrong else done.trouble, document)
    return document


STAGES: dict[str, Callable[[Run], Any]] = {
    "environment": environment,
    "tests": tests,
    "sanitizer": sanitizer,
    "kernels": kernels,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for and not done."""
    args = _arguments(argv)
    if args.list:
        for name, stage in STAGES.items():
            print(f"{name:12} {(stage.__doc__ or '').splitlines()[0]}")
        return 0
    if not args.rehearse and (missing := no_gpu()):
        say(f"{missing}. --rehearse tests this script without one.")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    names = args.stages or STAGES
    faults: list[Exception] = []
    statuses = [run_stage(name, args, faults) for name in names]
    if faults:
        raise faults[0]
    return int("failed" in statuses)


def no_gpu() -> str:
    """Why no GPU can be used; empty when one can."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    return "" if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"


def run_stage(name: str, args: argparse.Namespace, faults: list[Exception]) -> str:
    """Run a stage, write its document, return its status; a fault of its own goes to `faults`."""
    path = args.out / f"{name}.json"
    if not args.again and is_done(path, rehearsed=args.rehearse):
        say(f"{name}: is done ({path}); --again runs it again")
        return "done"
    start = time.monotonic()
    run = Run(rehearse=args.rehearse, log=args.out / "session.log", end=start + LIMIT_S)
    status, reason, result = "done", "", None
    try:
        result = STAGES[name](run)
    except Skipped as skip:
        status, reason = "skipped", str(skip)
    except Failed as failure:
        status, reason, result = "failed", str(failure), failure.result
    except Exception as fault:  # raised again when the other stages have had their turn
        faults.append(fault)
        status, reason = "failed", f"{type(fault).__name__}: {fault}"
        result = {"traceback": traceback.format_exc().splitlines()}
    seconds = round(time.monotonic() - start, 1)
    document = {
        "schema": SCHEMA,
        "stage": name,
        "status": status,
        "reason": reason,
        "rehearsed": args.rehearse,
        "seconds": seconds,
        "command": run.commands,
        "result": result,
    }
    write(path, document)
    say(f"{name}: {status} in {seconds} s" + (f": {reason}" if reason else ""))
    return status


def is_done(path: Path, *, rehearsed: bool) -> bool:
    """Whether a stage's document says that it was done, of the same kind."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return bool(document["status"] == "done") and document["rehearsed"] == rehearsed


def write(path: Path, document: Mapping[str, Any]) -> None:
    """The whole file or none of it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
    part.replace(path)


def say(line: str) -> None:
    """To people."""
    print(line, file=sys.stderr, flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], prog="tools/gpu_session"
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the documents")
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU")
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument("--list", action="store_true", help="name the stages and end")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.stages if name not in STAGES]:
        parser.error(f"stage {unknown[0]!r} is unknown; known: {', '.join(STAGES)}")
    if args.out is None and not args.list:
        parser.error("--out DIR is needed")
    return args


if __name__ == "__main__":
    sys.exit(main())
