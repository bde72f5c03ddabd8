"""What another process holds while it runs: VRAM as the driver counts it, RAM as the kernel does.

VRAM has two witnesses. NVML names the bytes of a process, its CUDA context included; where it does
not (a container that numbers processes anew, Windows) the growth of what is taken on the whole GPU
stands for it, which is right only while nobody else uses the GPU. RAM is the largest resident set,
mapped files included, that the kernel has noted for the process itself.

`Gpu` can also hold VRAM, so that another process finds only so much of it free.
"""

import threading
import time
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from zquant.bench.watch import Nvml

__all__ = ["Gpu", "Watch"]

PERIOD_S = 0.02
PAGE = 2**21  # bytes by which the driver hands out VRAM


class Gpu:
    """A GPU, seen from outside the process that is measured.

    Attributes:
        device: of torch.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: list[Tensor] = []
        self._lock = threading.Lock()
        self._nvml = Nvml(f"GPU-{torch.cuda.get_device_properties(device).uuid}")

    @property
    def reason(self) -> str:
        """Why NVML does not say what a process holds; empty where it does."""
        return self._nvml.reason

    def process_bytes(self, pid: int) -> int | None:
        """VRAM of a process, its context included; None where NVML does not list it."""
        return self._nvml.process_bytes(pid)

    def free_bytes(self) -> int:
        """VRAM that nobody holds."""
        return int(torch.cuda.mem_get_info(self.device)[0])

    def unclaimed_bytes(self) -> int:
        """VRAM that nobody holds but us, to fill the GPU: what others take makes it smaller."""
        with self._lock:
            return self.free_bytes() + sum(held.numel() for held in self._held)

    def occupy(self, n_bytes: int) -> None:
        """Hold so many bytes more.

        Raises:
            torch.OutOfMemoryError: they are not free.
        """
        whole = n_bytes // PAGE * PAGE
        if whole > 0:
            with self._lock:
                self._held.append(torch.empty(whole, dtype=torch.uint8, device=self.device))

    def release(self) -> None:
        """Hold nothing."""
        with self._lock:
            self._held.clear()
            torch.cuda.empty_cache()


class Watch:
    """Peaks of a process from `start` to the end of the with-block.

    Attributes:
        ram_bytes: largest resident set; 0 is unknown.
        process_bytes: VRAM by NVML; None is unknown.
        device_bytes: VRAM that others than us took since this was made; None without a GPU.
        rate_hz: samples per second.
    """

    def __init__(self, gpu: Gpu | None) -> None:
        self._gpu = gpu
        self._before = gpu.unclaimed_bytes() if gpu else 0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self.ram_bytes = 0
        self.process_bytes: int | None = None
        self.device_bytes: int | None = None
        self.rate_hz = 0.0

    def __enter__(self) -> "Watch":
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

    @property
    def vram_bytes(self) -> int | None:
        """The process's, by the better witness that saw it from beginning to end."""
        listed = self._gpu is not None and not self._gpu.reason
        return self.process_bytes if listed and self.process_bytes else self.device_bytes

    @property
    def witness(self) -> str:
        """Who says `vram_bytes`."""
        if self._gpu is None:
            return ""
        if self.process_bytes and not self._gpu.reason:
            return "NVML, of the process"
        reason = self._gpu.reason or "NVML does not list the process"
        return f"growth of what is taken on the GPU ({reason})"

    def _run(self, pid: int) -> None:
        n, began = 0, time.perf_counter()
        while True:
            n += 1
            self._sample(pid)
            self.rate_hz = n / max(PERIOD_S, time.perf_counter() - began)
            if self._end.wait(PERIOD_S):
                return

    def _sample(self, pid: int) -> None:
        self.ram_bytes = max(self.ram_bytes, _peak_ram(pid))
        if self._gpu is None:
            return
        taken = self._before - self._gpu.unclaimed_bytes()
        self.device_bytes = max(self.device_bytes or 0, taken)
        process = self._gpu.process_bytes(pid)
        if process is not None:
            self.process_bytes = max(self.process_bytes or 0, process)


def _peak_ram(pid: int) -> int:
    """Of a process that still runs, what the kernel has noted; else 0.

    `ru_maxrss` would not do: a process inherits it from the one that started it.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (OSError, ValueError):
        return 0
    return next((int(s.split()[1]) * 1024 for s in lines if s.startswith("VmHWM:")), 0)
