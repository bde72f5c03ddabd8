"""Runs `zquant convert` in forked children that send themselves a signal at a given moment.

Standard input: a JSON line {"argv": [...], "out": folder, "signal": 9, "moment": 12} per child.
Standard output: a JSON line {"code": exit status, negative for a signal, "moments": how many there
were, null if the child did not end by itself, "stderr": text}.

A moment comes before every piece of output and before every open, rename and removal of a file in
`out`. Starting Python and torch once for all children is what makes many moments affordable.
"""

import json
import os
import signal
import sys
import tempfile
from typing import Any

import zquant.convert.execute  # noqa: F401 # before the forks
from zquant.cli.main import main
from zquant.formats.resumable import ResumableFile


def count_moments(out: str, number: int, at: int) -> list[int]:
    """From now on the process gets the signal `number` before its moment `at`."""
    count = [0]

    def moment() -> None:
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), number)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove") and str(args[0]).startswith(out):
            moment()

    real = ResumableFile.append

    def append(self: ResumableFile, *args: Any, **options: Any) -> None:
        moment()
        real(self, *args, **options)

    sys.addaudithook(audit)
    ResumableFile.append = append  # type: ignore[method-assign]
    return count


def child(request: dict[str, Any], stderr: int, answer: int) -> None:
    """Never returns."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(stderr, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    count = count_moments(request["out"], request["signal"], request["moment"])
    code = main(request["argv"])
    os.write(answer, str(count[0]).encode())
    os._exit(code)


def serve() -> None:
    for line in sys.stdin:
        read, write = os.pipe()
        with tempfile.TemporaryFile() as stderr:
            pid = os.fork()
            if not pid:
                child(json.loads(line), stderr.fileno(), write)
            os.close(write)
            moments = os.read(read, 100)
            os.close(read)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            stderr.seek(0)
            result = {"code": code, "moments": int(moments) if moments else None}
            result["stderr"] = stderr.read().decode()
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    serve()
