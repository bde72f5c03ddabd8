"""What a stage of a GPU session runs with: commands with a common limit, and its verdicts."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "Done", "Failed", "Run", "Skipped", "say", "tail"]

ROOT = Path(__file__).parents[1]


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
    """One stage while it runs.

    Attributes:
        rehearse: everything is small and on the CPU.
        log: gets what commands print.
        work: folder for models; it outlives the session.
        end: of the stage, on the clock of `time.monotonic`.
        loud: what commands say on stderr is shown while they run.
        commands: that ran.
    """

    rehearse: bool
    log: Path
    work: Path
    end: float
    loud: bool = False
    commands: list[str] = field(default_factory=list)

    @property
    def device(self) -> str:
        """Where models are converted and run."""
        return "cpu" if self.rehearse else "cuda"

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
        # read here and not by `communicate`, which shows nothing before the end
        errors, process.stderr = process.stderr, None
        said: list[str] = []
        reader = threading.Thread(target=self._listen, args=(errors, said), daemon=True)
        reader.start()
        code: int | None = None
        try:
            printed, _ = process.communicate(timeout=max(0.1, self.end - time.monotonic()))
            code = process.returncode
        except BaseException as stop:
            os.killpg(process.pid, signal.SIGKILL)
            printed, _ = process.communicate()
            if not isinstance(stop, subprocess.TimeoutExpired):
                raise
        reader.join()
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {self.commands[-1]}\n{printed}{''.join(said)}\n")
        return Done(code, printed, "".join(said))

    def _listen(self, errors: Any, said: list[str]) -> None:
        with errors:
            for line in errors:
                said.append(line)
                if self.loud:
                    say(line.rstrip())

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


def say(line: str) -> None:
    """To people."""
    print(line, file=sys.stderr, flush=True)
