"""What another process holds while it runs: VRAM as the driver counts it, RAM as the kernel does.

VRAM has two witnesses. NVML names the bytes of a process, its CUDA context included; where it does
not (a container that numbers processes anew, Windows) the growth of what is taken on the whole GPU
stands for it, which is right only while nobody else uses the GPU. RAM is the largest resident set
that the kernel has noted, mapped files included, and apart from it what is no page of a file:
engines that map their weights and engines that read them differ by the first alone.

`Gpu` can also hold VRAM, so that another process finds only so much of it free.
"""

import threading
from pathlib import Path

import torch
from torch import Tensor

from zquant.bench.watch import Nvml, Sampler, vram_witness

__all__ = ["Gpu", "Watch"]

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


class Watch(Sampler):
    """Peaks of a process from `start` to the end of the with-block.

    Attributes:
        ram_bytes: largest resident set, mapped files included, of the process and those it started
            together; pages that they share count for each. 0 is unknown.
        private_bytes: of that what is no page of a file, which the system could drop.
        process_bytes: VRAM by NVML; None is unknown.
        device_bytes: VRAM that others than us took since this was made; None without a GPU.
    """

    period_s = 0.02

    def __init__(self, gpu: Gpu | None) -> None:
        super().__init__()
        self._gpu = gpu
        self._before = gpu.unclaimed_bytes() if gpu else 0
        self.ram_bytes = 0
        self.private_bytes = 0
        self.process_bytes: int | None = None
        self.device_bytes: int | None = None

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
        return vram_witness(self._gpu.reason, listed=bool(self.process_bytes))

    def _sample(self, pid: int) -> None:
        found = [_status(p) for p in (pid, *_children(pid))]
        now = sum(each.get("VmRSS", 0) for each in found)
        private = sum(each.get("RssAnon", 0) + each.get("RssShmem", 0) for each in found)
        self.ram_bytes = max(self.ram_bytes, now, found[0].get("VmHWM", 0))
        self.private_bytes = max(self.private_bytes, private)
        if self._gpu is None:
            return
        taken = self._before - self._gpu.unclaimed_bytes()
        self.device_bytes = max(self.device_bytes or 0, taken)
        process = self._gpu.process_bytes(pid)
        if process is not None:
            self.process_bytes = max(self.process_bytes or 0, process)


def _status(pid: int) -> dict[str, int]:
    """Bytes that the kernel counts for a process, by its names for them; none where it has ended.

    `VmHWM` is the peak that it has noted itself; `ru_maxrss` would not do, as a process inherits it
    from the one that started it.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (OSError, ValueError):
        return {}
    counted = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, _ in counted}


def _children(pid: int) -> list[str]:
    """Processes that it started and that still run."""
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
