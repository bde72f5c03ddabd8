"""VRAM of another process while it runs, 20 times a second, as the driver counts it.

NVML names the bytes of a process, its CUDA context included. Where it does not (a container that
numbers processes anew, Windows) the growth of what is taken on the whole GPU stands for it, which
is right only while nobody else uses that GPU. This process needs no CUDA context of its own.
"""

import ctypes
import sys
import threading
import time
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, TypeVar

__all__ = ["Nvml", "Sampler", "Watch", "vram_witness"]

S = TypeVar("S", bound="Sampler")

PERIOD_S = 0.05
N_PROCESSES = 256
NOT_KNOWN = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE
LIBRARY = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"


class _Process(ctypes.Structure):
    """`nvmlProcessInfo_t` of `nvmlDeviceGetComputeRunningProcesses_v3`."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class _Memory(ctypes.Structure):
    """`nvmlMemory_t`."""

    _fields_ = tuple((name, ctypes.c_ulonglong) for name in ("total", "free", "used"))


class Nvml:
    """One GPU, asked through NVIDIA's management library.

    Attributes:
        reason: why it does not answer; empty while it does.
    """

    def __init__(self, uuid: str) -> None:
        self.reason = ""
        self._handle = ctypes.c_void_p()
        try:
            self._library: Any = ctypes.CDLL(LIBRARY)
        except OSError as error:
            self.reason = str(error)
            return
        self._ask("nvmlInit_v2")
        self._ask("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self._handle))

    def used_bytes(self) -> int | None:
        """Taken on the GPU, by whomever."""
        memory = _Memory()
        if not self._ask("nvmlDeviceGetMemoryInfo", self._handle, ctypes.byref(memory)):
            return None
        return int(memory.used)

    def process_bytes(self, pid: int) -> int | None:
        """Of a process; None where NVML does not list it."""
        n, found = ctypes.c_uint(N_PROCESSES), (_Process * N_PROCESSES)()
        name = "nvmlDeviceGetComputeRunningProcesses_v3"
        if not self._ask(name, self._handle, ctypes.byref(n), ctypes.byref(found)):
            return None
        mine = [p.used for p in found[: n.value] if p.pid == pid and p.used != NOT_KNOWN]
        return int(mine[0]) if mine else None

    def _ask(self, name: str, *arguments: object) -> bool:
        """Whether the call worked; after the first that did not, none is made."""
        if self.reason:
            return False
        try:
            code = getattr(self._library, name)(*arguments)
        except AttributeError as error:  # an old driver
            self.reason = str(error)
            return False
        self.reason = f"{name} gave {code}" if code else ""
        return not code


class Sampler(ABC):
    """Looks at a process from `start` to the end of the with-block, in a thread of its own.

    Attributes:
        period_s: between two looks.
        rate_hz: samples per second.
    """

    period_s = PERIOD_S

    def __init__(self) -> None:
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self.rate_hz = 0.0

    def __enter__(self: S) -> S:
        return self

    def start(self, pid: int) -> None:
        """Look at that process from now on."""
        self._thread = threading.Thread(target=self._run, args=(pid,), daemon=True)
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, pid: int) -> None:
        n, began = 0, time.perf_counter()
        while True:
            self._sample(pid)
            n += 1
            self.rate_hz = n / max(self.period_s, time.perf_counter() - began)
            if self._end.wait(self.period_s):
                return

    @abstractmethod
    def _sample(self, pid: int) -> None:
        """Look once."""


def vram_witness(reason: str, *, listed: bool) -> str:
    """Who says what VRAM a process held: NVML where it `listed` the process, with no `reason`."""
    if listed and not reason:
        return "NVML, of the process"
    return f"growth of what is taken on the GPU ({reason or 'NVML does not list the process'})"


class Watch(Sampler):
    """The peak of a process from `start` to the end of the with-block.

    Attributes:
        process_bytes: by NVML; None is unknown.
        growth_bytes: of what is taken on the GPU since this was made; None is unknown.
    """

    def __init__(self, nvml: Nvml | None) -> None:
        super().__init__()
        self._nvml = nvml
        self._before = nvml.used_bytes() if nvml else None
        self.process_bytes: int | None = None
        self.growth_bytes: int | None = None

    def start(self, pid: int) -> None:
        """Look at that process from now on; without a GPU there is nothing to look at."""
        if self._nvml is not None:
            super().start(pid)

    @property
    def vram_bytes(self) -> int | None:
        """The process's, by the better witness."""
        return self.growth_bytes if self._is_unlisted else self.process_bytes

    @property
    def _is_unlisted(self) -> bool:
        """Whether NVML did not see the process, or fell silent before its end."""
        return self.process_bytes is None or self._nvml is None or self._nvml.reason != ""

    @property
    def witness(self) -> str:
        """Who says `vram_bytes`; empty without a GPU."""
        if self._nvml is None:
            return ""
        return vram_witness(self._nvml.reason, listed=self.process_bytes is not None)

    def _sample(self, pid: int) -> None:
        assert self._nvml is not None
        used, process = self._nvml.used_bytes(), self._nvml.process_bytes(pid)
        if used is not None and self._before is not None:
            self.growth_bytes = max(self.growth_bytes or 0, used - self._before)
        if process is not None:
            self.process_bytes = max(self.process_bytes or 0, process)
