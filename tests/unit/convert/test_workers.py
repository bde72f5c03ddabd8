"""Worker processes: the same bytes as threads, errors as one message, and no orphans."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from zquant.convert import workers as module
from zquant.convert.workers import WORTH_PROCESSES, workers
from zquant.errors import ZQuantError


def test_only_a_large_search_is_worth_processes():
    with workers(2, WORTH_PROCESSES - 1) as pool:
        assert isinstance(pool, ThreadPoolExecutor)
    with workers(1, WORTH_PROCESSES) as pool:
        assert isinstance(pool, ThreadPoolExecutor)
    with workers(2, WORTH_PROCESSES) as pool:
        assert isinstance(pool, ProcessPoolExecutor)


def test_there_are_no_more_processes_than_the_system_can_wait_for(monkeypatch):
    monkeypatch.setattr(module, "MAX_PROCESSES", 2)
    with workers(3, WORTH_PROCESSES) as pool:
        assert pool._max_workers == 2


def test_processes_write_the_bytes_of_threads(official, q4, run, look, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WORTH_PROCESSES", 0)
    result = run(source=str(official), out=tmp_path, threads=2)
    assert look.contents(tmp_path) == look.contents(q4)
    # this process and two others with torch in each
    assert result.peak_host_bytes > 3 * 50 * 2**20


def test_a_killed_process_is_one_message():
    with (
        pytest.raises(ZQuantError, match="--resume and fewer --threads"),
        workers(2, WORTH_PROCESSES) as pool,
    ):
        pool.submit(os._exit, 9).result()


PARENT = """
import os, time
from zquant.convert.workers import WORTH_PROCESSES, workers

def slow_pid(_):
    time.sleep(0.2)
    return os.getpid()

if __name__ == "__main__":
    with workers(2, WORTH_PROCESSES) as pool:
        print(*set(pool.map(slow_pid, range(8))), flush=True)
        time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at processes in /proc")
def test_processes_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [int(word) for word in parent.stdout.readline().split()]
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    assert children
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in children)


def _runs(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
