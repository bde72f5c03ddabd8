"""What the benchmark of the memory plan sees of another process, and the VRAM it takes away."""

import ctypes
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.streaming_testing import GIB, MIB, Card, gpu_args, play, runs, subject, watch
from zquant.bench import watch as vram
from zquant.memory import machine


def test_nvml_says_what_a_process_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    not_known = 2**64 - 1
    card = Card(monkeypatch, [(7, 5 * GIB), (8, 3 * GIB), (9, not_known)])
    gpu = watch.Gpu(torch.device("cuda"))
    assert [gpu.process_bytes(pid) for pid in (7, 8, 9, 10)] == [5 * GIB, 3 * GIB, None, None]
    # as the header has it: unsigned, 64 bits, twice unsigned
    assert ctypes.sizeof(vram._Process) == 24
    assert vram._Process.used.offset == 8
    card.code = 7
    assert gpu.process_bytes(7) is None
    assert gpu.reason == "nvmlDeviceGetComputeRunningProcesses_v3 gave 7"


class Counted(watch.Watch):  # type: ignore[misc, name-defined]
    """Counts its looks, so that no test depends on how soon they come."""

    n = 0

    def _sample(self, pid: int) -> None:
        super()._sample(pid)
        self.n += 1

    def looks(self) -> None:
        """Wait for a whole look that began after now."""
        last, end = self.n + 2, time.monotonic() + 60
        while self.n < last:
            assert time.monotonic() < end, "nobody looks"
            time.sleep(0.005)


def sampled(gpu: Any, pid: int, work: Callable[[Counted], None]) -> Any:
    with Counted(gpu) as found:
        found.start(pid)
        found.looks()
        work(found)
        found.looks()
    return found


def test_the_peak_of_vram_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, [(7, 2 * GIB)])

    def work(found: Counted) -> None:
        card.lists = [(7, 5 * GIB)]
        found.looks()
        card.lists = [(7, GIB)]

    found = sampled(watch.Gpu(torch.device("cuda")), 7, work)
    assert (found.vram_bytes, found.witness) == (5 * GIB, "NVML, of the process")
    assert found.rate_hz > 0


def test_where_nvml_is_silent_the_growth_of_the_gpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, [])
    gpu = watch.Gpu(torch.device("cuda"))

    def work(_: Counted) -> None:
        gpu.occupy(8 * GIB)  # ours, not theirs
        card.others += 3 * GIB

    found = sampled(gpu, 7, work)
    assert found.vram_bytes == 3 * GIB
    assert "NVML does not list the process" in found.witness


def test_a_witness_that_fell_silent_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, [(7, GIB)])

    def work(_: Counted) -> None:
        card.code = 9
        card.others += 6 * GIB

    found = sampled(watch.Gpu(torch.device("cuda")), 7, work)
    assert found.vram_bytes == 6 * GIB
    assert "gave 9" in found.witness


def test_without_nvml_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    Card(monkeypatch, [(7, GIB)])

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    gpu = watch.Gpu(torch.device("cuda"))
    assert gpu.process_bytes(7) is None
    assert "libnvidia-ml.so.1: cannot open" in gpu.reason


def test_the_ballast_leaves_the_budget_once_the_plan_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(tmp_path, monkeypatch)
    card, free = Card(monkeypatch, []), []
    gpu = watch.Gpu(torch.device("cuda"))
    occupy = gpu.occupy
    gpu.occupy = lambda n: (occupy(n), free.append(card.free))
    row = runs.measured(subject(), gpu_args(), gpu, 4 * GIB, steps=2)
    assert row["failures"] == []
    assert free == [4 * GIB + subject().withheld, 4 * GIB]
    assert row["free_bytes"] == 4 * GIB
    assert card.free == 31 * GIB  # given back


def test_the_ballast_leaves_a_plan_its_whole_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plan does not use of free VRAM is left beside the budget until it is made."""
    card, budget, context = Card(monkeypatch, []), 4 * GIB, [500 * MIB]
    gpu, cuda = watch.Gpu(torch.device("cuda")), SimpleNamespace(is_cuda=True, torch_device="cuda")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(machine, "process_vram_bytes", lambda: context[0])
    for rate in ("_disk_bytes_s", "_gpu_flops", "_link_bytes_s"):
        monkeypatch.setattr(machine, rate, lambda _: 1.0)
    withheld = runs.withheld_bytes(machine.machine_of(cuda, None), gpu)
    assert withheld > 32 * GIB // 25
    gpu.occupy(gpu.free_bytes() - budget - withheld)
    for context[0] in (400 * MIB, 600 * MIB):  # of the process that is measured
        before, card.others = card.others, card.others + context[0]
        found = machine.machine_of(cuda, None).device_bytes
        assert budget <= found <= budget + 256 * MIB
        card.others = before


def test_without_ballast_the_gpu_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(tmp_path, monkeypatch)
    Card(monkeypatch, [])
    gpu = watch.Gpu(torch.device("cuda"))
    gpu.occupy = lambda n: pytest.fail(f"{n} bytes") if n else None
    for args, budget in ((gpu_args(ballast=False), 4 * GIB), (gpu_args(), None)):
        row = runs.measured(subject(), args, gpu, budget, steps=2)
        assert (row["failures"], row["free_bytes"]) == ([], None)


def test_a_process_that_took_its_memory_before_the_plan_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(tmp_path, monkeypatch)
    card = Card(monkeypatch, [])
    gpu = watch.Gpu(torch.device("cuda"))
    occupy = gpu.occupy

    def greedy(n_bytes: int) -> None:
        occupy(n_bytes)
        card.others += 5 * GIB

    gpu.occupy = greedy
    row = runs.measured(subject(), gpu_args(), gpu, 4 * GIB, steps=2)
    (failure,) = row["failures"]
    assert failure.startswith("the ballast found too little free VRAM")


def piped(code: str, *words: str) -> subprocess.Popen[bytes]:
    """A Python that runs `code`, its input and output in our hands."""
    command = [sys.executable, "-ISc", code, *words]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_the_peak_of_ram_is_that_of_the_process_alone_and_is_never_missed() -> None:
    code = "x = b'x' * 2**27; del x; print('gone', flush=True); input()"
    with piped(code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"gone\n"
        with Counted(None) as found:
            found.start(process.pid)
            found.looks()
            process.communicate(b"\n")
    assert 128 * MIB < found.ram_bytes < 128 * MIB + 30 * MIB  # ours is larger than that by itself
    assert (found.vram_bytes, found.witness) == (None, "")


def test_pages_of_files_are_counted_apart(tmp_path: Path) -> None:
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True)
    if kind.stdout.strip() in ("tmpfs", "ramfs"):
        pytest.skip("pages of tmpfs are memory, not a file's")
    file = tmp_path / "weights"
    file.write_bytes(bytes(64 * MIB))
    code = (
        "import mmap, sys; x = b'x' * 2**25; f = open(sys.argv[1], 'rb');"
        "m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); n = sum(m[::4096]);"
        "print('read', flush=True); input()"
    )
    with piped(code, str(file)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"read\n"
        with Counted(None) as found:
            found.start(process.pid)
            found.looks()
            process.communicate(b"\n")
    assert 32 * MIB < found.private_bytes < 32 * MIB + 20 * MIB
    assert found.ram_bytes > found.private_bytes + 64 * MIB


def test_worker_processes_are_counted_too() -> None:
    child = "x = b'x' * 2**26; print('made', flush=True); input()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-ISc', {child!r}])"
    with piped(code) as process, Counted(None) as found:
        assert process.stdout is not None
        assert process.stdout.readline() == b"made\n"
        found.start(process.pid)
        found.looks()
        process.communicate(b"\n")
    assert found.private_bytes > 64 * MIB
