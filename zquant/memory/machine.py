"""How much memory and speed this machine offers a plan: RAM, VRAM, products, link and disk.

Rates are measured in milliseconds where that is cheap (products and expansion on a CPU, the link,
one range of the file); those of a GPU's products are the data sheet's, at the share that large
kernels reach. They predict seconds, and decide nothing else.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from zquant_kernels import runtime

from zquant.formats.names import Part
from zquant.memory.device import Device, matmul_flops
from zquant.memory.needs import Machine
from zquant.quant.codec import dequantize

__all__ = [
    "keep_heap_small",
    "machine_of",
    "process_vram_bytes",
    "ram_available",
    "ram_held",
    "ram_total",
    "trim_heap",
]

MIB = 2**20
HEADROOM_SHARE = 0.1  # of what is available, left to others
HEADROOM_RAM = 512 * MIB
HEADROOM_VRAM = {True: 512 * MIB, False: 192 * MIB}  # Windows draws its desktop there
CPU_LIBRARIES = 160 * MIB  # buffers of MKL and oneDNN, code that is loaded at the first product
M_MMAP_THRESHOLD = -3  # of mallopt
MAPPED_BYTES = 2 * MIB
CONTEXT = 448 * MIB  # of CUDA, where the driver does not tell
CONTEXT_GROWTH = 128 * MIB  # kernels that are loaded later, workspaces of libraries
PINNED_SHARE = {True: 0.4, False: 0.75}  # of RAM: Windows pins no more than half of it
EFFICIENCY = 0.65  # of the data sheet's products that large kernels reach
FLOPS_PER_SM = {  # per clock, float16 with float32 sums, dense
    (7, 0): 1024,
    (7, 5): 512,
    (8, 0): 2048,
    (9, 0): 4096,
    (10, 0): 8192,
}
FLOPS_GEFORCE = 512
FLOPS_WITHOUT_TENSOR_CORES = 256  # GTX 16
CLOCK_HZ = 1.7e9  # where torch does not tell
PROBE_BYTES = 32 * MIB
PROBE_ROWS = 512


def machine_of(device: Device, weight: Part) -> Machine:
    """What `device` offers; `weight` is a typical one of the model, whose file is read from."""
    on_windows = os.name == "nt"
    # first, as it loads the decoders, which the process then holds
    expand_s = 0.0 if device.is_cuda else _expand_s(weight, device.compute_dtype)
    available, held = ram_available(), ram_held()
    ram = held + max(0, available - max(HEADROOM_RAM, int(available * HEADROOM_SHARE)))
    disk = _disk_bytes_s(weight)
    if not device.is_cuda:
        return Machine(
            is_gpu=False,
            device_bytes=ram,
            outside=held + CPU_LIBRARIES,
            ram_bytes=ram,
            ram_held=held,
            flops=matmul_flops(device.compute_dtype),
            expand_s=expand_s,
            disk_bytes_s=disk,
        )
    torch_device = device.torch_device
    free, total = torch.cuda.mem_get_info(torch_device)
    reserved = torch.cuda.memory_reserved(torch_device)
    process = process_vram_bytes()
    context = CONTEXT if process is None else max(0, process - reserved)
    headroom = max(HEADROOM_VRAM[on_windows], total // 25)
    return Machine(
        is_gpu=True,
        device_bytes=max(0, free + reserved + context - headroom),
        outside=context + CONTEXT_GROWTH,
        ram_bytes=ram,
        ram_held=held,
        pinned_bytes=int(ram_total() * PINNED_SHARE[on_windows]),
        flops=_gpu_flops(torch_device),
        link_bytes_s=_link_bytes_s(torch_device),
        disk_bytes_s=disk,
    )


def ram_available() -> int:
    """Bytes that programs can still take without swapping; a container's limit counts."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
        return min(available, _container_room())
    if os.name == "nt":
        return _windows_memory()[1]
    return ram_total() // 2  # macOS keeps no such number


def ram_total() -> int:
    """Bytes of RAM."""
    if os.name == "nt":
        return _windows_memory()[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def ram_held() -> int:
    """Bytes of RAM that this process holds now, mapped pages included."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 600 * MIB  # what torch and transformers take once they are loaded


def trim_heap() -> None:
    """Let the C library give freed memory back to the system, where it is known to keep it."""
    _glibc("malloc_trim", 0)


def keep_heap_small() -> None:
    """Let large tensors be mapped one by one, so that what is freed is given back at once.

    By itself glibc raises the size from which it does so to 32 MiB, and activations fragment its
    heap: half a GiB more than what is alive. Fresh pages cost time, so only who has a ceiling on
    RAM wants this.
    """
    _glibc("mallopt", M_MMAP_THRESHOLD, MAPPED_BYTES)


def _glibc(name: str, *arguments: int) -> None:
    """Call a function that glibc has, and musl and others lack."""
    if sys.platform == "linux":
        function = getattr(ctypes.CDLL(None), name, None)
        if function is not None:
            function(*arguments)


def _container_room() -> int:
    """Bytes that a control group still allows; effectively unlimited without one."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        fields = dict(s.split() for s in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return sys.maxsize
    if limit == "max":
        return sys.maxsize
    # cached file pages are given back on demand
    return max(0, int(limit) - used + int(fields.get("file", 0)))


def _windows_memory() -> tuple[int, int]:
    """Total and available bytes, from `GlobalMemoryStatusEx`."""
    fields = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)]
    names = ("total", "available", "page_total", "page_left", "virtual", "virtual_left", "extended")
    fields += [(name, ctypes.c_ulonglong) for name in names]  # type: ignore[misc]
    status = type("MemoryStatus", (ctypes.Structure,), {"_fields_": fields})()
    status.length = ctypes.sizeof(status)
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(status.total), int(status.available)


def process_vram_bytes() -> int | None:
    """VRAM of this process, context included, as the driver counts it; None where it does not."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    for line in done.stdout.splitlines():
        pid, _, used = line.partition(",")
        if pid.strip() == str(os.getpid()) and used.strip().isdigit():
            return int(used) * MIB
    return None  # Windows shows "[N/A]", a container other process numbers


def _gpu_flops(device: torch.device) -> float:
    properties = torch.cuda.get_device_properties(device)
    capability = runtime.capability(device)
    per_sm = FLOPS_PER_SM.get(capability, FLOPS_GEFORCE)
    if not runtime.has_tensor_cores(device):
        per_sm = FLOPS_WITHOUT_TENSOR_CORES
    clock = getattr(properties, "clock_rate", 0) * 1000 or CLOCK_HZ  # kHz
    return float(properties.multi_processor_count * clock * per_sm * EFFICIENCY)


def _link_bytes_s(device: torch.device) -> float:
    """Pinned copies to the device; 0 where nothing can be pinned."""
    try:
        source = torch.empty(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return 0.0
    target = torch.empty_like(source, device=device)
    new: Any = torch.cuda.Event
    start, stop = new(enable_timing=True), new(enable_timing=True)
    target.copy_(source, non_blocking=True)
    start.record()
    target.copy_(source, non_blocking=True)
    stop.record()
    stop.synchronize()
    return float(PROBE_BYTES / (start.elapsed_time(stop) / 1000))


def _disk_bytes_s(weight: Part) -> float:
    """One read of the file, from the disk or from what the system keeps of it."""
    out = np.empty(min(PROBE_BYTES, weight.nbytes), np.uint8)
    start = time.perf_counter()
    weight.read_into(0, out)
    return len(out) / max(1e-9, time.perf_counter() - start)


def _expand_s(weight: Part, dtype: torch.dtype) -> float:
    """Seconds to expand one weight, best of three."""
    n_rows = min(PROBE_ROWS, weight.shape[0])
    row_bytes = weight.qtype.row_bytes(weight.shape[-1])
    stored = np.empty(n_rows * row_bytes, np.uint8)
    weight.read_into(0, stored)
    rows = torch.from_numpy(stored).view(n_rows, row_bytes)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        dequantize(rows, weight.qtype, dtype)
        times.append(time.perf_counter() - start)
    return min(times) / (n_rows * weight.shape[-1])
