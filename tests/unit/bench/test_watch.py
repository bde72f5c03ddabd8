"""What NVML says of a process, with a library that is played."""

import ctypes
import os
import time
from typing import Any

import pytest

from zquant.bench import watch
from zquant.bench.watch import NOT_KNOWN, Nvml, Watch


class Library:
    """Gives what it was told to; `codes` are of calls that fail."""

    def __init__(self, **codes: int) -> None:
        self.codes = codes
        self.used = 1000
        self.processes: list[tuple[int, int]] = []
        self.calls: list[str] = []
        self.uuid = b""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml") or self.codes.get(name) == -1:
            raise AttributeError(f"undefined symbol: {name}")

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if code := self.codes.get(name):
                return code
            if name == "nvmlDeviceGetHandleByUUID":
                self.uuid = arguments[0]
            elif name == "nvmlDeviceGetMemoryInfo":
                arguments[1]._obj.used = self.used
            elif name == "nvmlDeviceGetComputeRunningProcesses_v3":
                _, n, found = (getattr(each, "_obj", each) for each in arguments)
                n.value = len(self.processes)
                for i, (pid, used) in enumerate(self.processes):
                    found[i].pid, found[i].used = pid, used
            return 0

        return call


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    return use(monkeypatch, Library())


def use(monkeypatch: pytest.MonkeyPatch, library: Library) -> Library:
    monkeypatch.setattr(watch.ctypes, "CDLL", lambda _: library)
    return library


def test_the_gpu_is_found_by_its_uuid(library: Library) -> None:
    nvml = Nvml("GPU-12ab")
    assert (nvml.reason, library.uuid) == ("", b"GPU-12ab")
    assert nvml.used_bytes() == 1000


def test_a_process_among_others(library: Library) -> None:
    library.processes = [(1, 5), (77, 2**33), (78, NOT_KNOWN)]
    nvml = Nvml("GPU-1")
    assert nvml.process_bytes(77) == 2**33
    assert nvml.process_bytes(78) is None
    assert nvml.process_bytes(79) is None


def test_the_structures_are_nvml_s() -> None:
    assert ctypes.sizeof(watch._Process) == 24
    assert ctypes.sizeof(watch._Memory) == 24


@pytest.mark.parametrize(("code", "reason"), [(999, "nvmlInit_v2 gave 999"), (-1, "undefined")])
def test_after_a_refusal_nothing_is_asked(
    monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    library = use(monkeypatch, Library(nvmlInit_v2=code))
    nvml = Nvml("GPU-1")
    assert nvml.reason.startswith(reason)
    assert (nvml.used_bytes(), nvml.process_bytes(1)) == (None, None)
    assert library.calls == ["nvmlInit_v2"] * (code > 0)


def test_without_the_library_the_reason_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(watch.ctypes, "CDLL", missing)
    assert "cannot open shared object file" in Nvml("GPU-1").reason


def observed(library: Library, during: Any) -> Watch:
    """A watch during which `during` was called between samples."""
    with Watch(Nvml("GPU-1")) as found:
        found.start(os.getpid())
        n = 0
        deadline = time.monotonic() + 5
        while n < 3 and time.monotonic() < deadline:
            before = len(library.calls)
            during(n)
            while len(library.calls) < before + 5 and time.monotonic() < deadline:
                time.sleep(0.005)
            n += 1
    return found


def test_the_peak_of_a_process_is_kept(library: Library) -> None:
    def take(n: int) -> None:
        library.processes = [(os.getpid(), (10, 90, 20)[n])]
        library.used = (1010, 1400, 1020)[n]

    found = observed(library, take)
    assert (found.process_bytes, found.growth_bytes) == (90, 400)
    assert found.vram_bytes == 90
    assert found.witness == "NVML, of the process"
    assert 0 < found.rate_hz <= 30  # a busy machine gives fewer


def test_where_processes_are_not_listed_the_growth_stands_in(library: Library) -> None:
    def take(n: int) -> None:
        library.used = (1010, 1400, 1020)[n]

    found = observed(library, take)
    assert found.vram_bytes == 400
    assert found.witness == ("growth of what is taken on the GPU (NVML does not list the process)")


def test_where_nvml_fails_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Library(nvmlInit_v2=999))
    with Watch(Nvml("GPU-1")) as found:
        found.start(1)
    assert found.vram_bytes is None
    assert found.witness == "growth of what is taken on the GPU (nvmlInit_v2 gave 999)"


def test_without_a_gpu_there_is_nothing_to_look_at() -> None:
    with Watch(None) as found:
        found.start(1)
    assert (found.vram_bytes, found.witness, found.rate_hz) == (None, "", 0.0)
