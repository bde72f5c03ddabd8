"""What the system says of its memory, read rightly."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import zquant
from zquant.memory import machine
from zquant.memory.device import matmul_flops, probe

GIB, MIB = 2**30, 2**20


def fake_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, texts: dict[str, str]) -> None:
    """The system's files have other contents, or are not there."""
    folder = tmp_path / "system"
    for name, text in texts.items():
        file = folder / name.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def path(name: Any) -> Path:
        return folder / str(name).lstrip("/")

    monkeypatch.setattr(machine, "Path", path)


MEMINFO = "MemTotal:       16000000 kB\nMemFree:  1 kB\nMemAvailable:    8388608 kB\n"
CGROUP = {
    "/sys/fs/cgroup/memory.current": str(3 * GIB),
    "/sys/fs/cgroup/memory.stat": f"anon 5\nfile {GIB}\n",
}


@pytest.mark.parametrize(
    ("limit", "expected"), [("max", 8 * GIB), (str(4 * GIB), 2 * GIB), (str(GIB), 0)]
)
def test_a_container_has_what_its_limit_leaves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, expected: int
) -> None:
    files = {"/proc/meminfo": MEMINFO, "/sys/fs/cgroup/memory.max": limit, **CGROUP}
    fake_files(monkeypatch, tmp_path, files)
    assert machine.ram_available() == max(0, expected)


GROUPS = {  # limits in a process's own group and above it; files of the group at the root
    "version 2": (
        "1:name=systemd:/other\n0::/user/session/app\n",
        "/sys/fs/cgroup",
        ("memory.max", "memory.current", "file"),
    ),
    "version 1": (
        "0::/\n4:cpu,memory:/user/session/app\n",
        "/sys/fs/cgroup/memory",
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    ),
}


@pytest.mark.parametrize(("own", "root", "names"), GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("limited", ["/user/session/app", "/user/session", "/user", ""])
def test_the_least_of_the_processs_own_groups_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    own: str, root: str, names: tuple[str, str, str], limited: str,
) -> None:  # fmt: skip
    limit, used, cached = names
    files = {"/proc/meminfo": MEMINFO, "/proc/self/cgroup": own}
    for group in ("/user/session/app", "/user", ""):  # that between them has no files
        files[f"{root}{group}/{limit}"] = str(2**63 - 4096)
    for group, gib in ((limited, 5), ("/other", 1)):
        files[f"{root}{group}/{limit}"] = str(gib * GIB)
    for group in ("/user/session/app", "/user/session", "/user", "", "/other"):
        files[f"{root}{group}/{used}"] = str(3 * GIB)
        files[f"{root}{group}/memory.stat"] = f"{cached} {GIB}\n"
    fake_files(monkeypatch, tmp_path, files)
    assert machine.ram_available() == 3 * GIB


@pytest.mark.parametrize("own", ["", "nothing like it\n", "0::\n"])
def test_a_list_of_groups_that_cannot_be_read_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: str
) -> None:
    fake_files(monkeypatch, tmp_path, {"/proc/meminfo": MEMINFO, "/proc/self/cgroup": own})
    assert machine.ram_available() == 8 * GIB


def test_without_a_control_group_the_system_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_files(monkeypatch, tmp_path, {"/proc/meminfo": MEMINFO})
    assert machine.ram_available() == 8 * GIB


TRIM = """
from zquant.memory import machine
many = [bytes(100_000) for _ in range(1000)]  # below the size that is mapped alone
last = bytes(100_000)  # keeps the top of the heap in use
full = machine.ram_held()
del many
machine.trim_heap()
print(full - machine.ram_held())
"""


def printed(code: str) -> int:
    """What the code prints, in a process whose heap has no past."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


TOUCH = """
import torch
from zquant.memory import machine
before = machine.ram_held()
block = torch.ones(2**26, dtype=torch.uint8)
print(machine.ram_held() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_what_the_process_holds_grows_with_what_it_touches() -> None:
    assert 60 * MIB < printed(TOUCH) < 120 * MIB  # the kernel counts in batches
    assert machine.ram_held() < machine.ram_total()


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_a_heap_that_is_trimmed_is_given_back() -> None:
    assert printed(TRIM) > 50 * MIB


HEAP = """
import torch
from zquant.memory import machine
if {small}:
    machine.keep_heap_small()
for _ in range(3):  # freeing raises the size from which glibc maps
    torch.ones(7 * 2**20, dtype=torch.float32)
kept = [torch.ones(2**20) for _ in range(50)]
del kept[::2]
print(machine.ram_held())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_a_small_heap_keeps_no_freed_tensors() -> None:
    small, usual = (printed(HEAP.format(small=small)) for small in (True, False))
    assert usual - small > 64 * MIB  # 25 freed tensors of 4 MiB


def test_a_cpu_is_measured(toy_engine: zquant.Engine) -> None:
    weight = toy_engine.checkpoint.parts["dit"]["layers.0.feed_forward.w1.weight"]
    found = machine.machine_of(probe("cpu", "float32"), weight)
    assert not found.is_gpu
    assert found.device_bytes == found.ram_bytes >= found.ram_held > 0
    assert found.outside == found.ram_held + machine.CPU_LIBRARIES
    assert found.ram_bytes < machine.ram_total() + found.ram_held
    assert found.disk_bytes_s > 0
    assert 0 < found.expand_s < 1e-5
    assert matmul_flops(torch.float32) > 1e8


class FakeCuda:
    """An RTX 3060 with 5 GiB free."""

    def __init__(self, name: str, capability: tuple[int, int], n_sms: int) -> None:
        self.name, self.capability, self.multi_processor_count = name, capability, n_sms
        self.clock_rate = 1_777_000  # kHz

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 * GIB, 12 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: self)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: self.name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: self.capability)
        monkeypatch.setattr(machine, "_link_bytes_s", lambda _: 12e9)


@pytest.mark.parametrize(
    ("name", "capability", "n_sms", "tflops"),
    [
        ("NVIDIA GeForce RTX 3060", (8, 6), 28, 25.5),
        ("NVIDIA GeForce GTX 1650", (7, 5), 14, 3.2),
        ("NVIDIA H100", (9, 0), 132, 960.7),
    ],
)
def test_a_gpu_from_what_torch_knows(
    monkeypatch: pytest.MonkeyPatch, toy_engine: zquant.Engine,
    name: str, capability: tuple[int, int], n_sms: int, tflops: float,
) -> None:  # fmt: skip
    FakeCuda(name, capability, n_sms).install(monkeypatch)
    monkeypatch.setattr(machine, "process_vram_bytes", lambda: GIB + 300 * MIB)
    weight = toy_engine.checkpoint.parts["dit"]["layers.0.feed_forward.w1.weight"]

    class Gpu:
        is_cuda, torch_device = True, torch.device("cuda", 0)

    found = machine.machine_of(Gpu(), weight)  # type: ignore[arg-type]
    assert found.is_gpu
    assert found.flops == pytest.approx(tflops * 1e12 * machine.EFFICIENCY, rel=0.01)
    # what is free and what the process holds itself, less the headroom
    assert found.device_bytes == 5 * GIB + GIB + 300 * MIB - 12 * GIB // 25
    assert found.outside == 300 * MIB + machine.CONTEXT_GROWTH
    assert found.link_bytes_s == 12e9


def test_a_full_device_has_no_rate_instead_of_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch, "empty_like", full)
    assert machine._link_bytes_s(torch.device("cuda", 0)) == 0.0
