"""How much memory and speed this machine offers a plan: RAM, VRAM, products, link and disk.

Rates are measured in milliseconds where that is cheap (products and expansion on a CPU, the link,
one range of the file); those of a GPU's products are the data sheet's, at the share that large
kernels reach. They predict seconds, and decide nothing else.
"""

import ctypes
import os
import sys
import time
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from zquant_kernels import runtime

from zquant.formats.names import Part
from zquant.memory.device import Device, matmul_flops
from zquant.memory.driver import process_vram_bytes
from zquant.memory.needs import Machine
from zquant.quant.codec import dequantize

__all__ = [
    "keep_heap_small",
    "machine_of",
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
FLOPS_WITHOUT_TENSOR_CORES = 128  # GTX 16, whose float16 has float32's rate with float32 sums
CLOCK_HZ = 1.7e9  # where torch does not tell
GROUPS = {  # in /proc/self/cgroup: root of the groups, limit, use, and what of it is given back
    "0": ("/sys/fs/cgroup", "memory.max", "memory.current", "file"),
    "memory": (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_cache",
    ),
}
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
    """Bytes that the control groups of this process still allow; effectively unlimited without.

    Every group limits those below it: the least counts, from the process's own up to the root.
    """
    own = {"0": "/", "memory": "/"}
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, controllers, group = line.split(":", 2)
            own["memory" if "memory" in controllers.split(",") else number] = group
    # a container may see its own group as the root: then the rest of the path is not there
    return min(
        _group_room(Path(f"{root}{group}"), *names)
        for key, (root, *names) in GROUPS.items()
        for group in (PurePosixPath(own[key]), *PurePosixPath(own[key]).parents)
    )


def _group_room(folder: Path, limit: str, used: str, cached: str) -> int:
    """Bytes that one control group still allows."""
    try:
        allowed = int((folder / limit).read_text())
        taken = int((folder / used).read_text())
        fields = dict(s.split() for s in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # there is no such group, or its limit is "max"
        return sys.maxsize
    # cached file pages are given back on demand
    return max(0, allowed - taken + int(fields.get(cached, 0)))


def _windows_memory() -> tuple[int, int]:
    """Total and available bytes, from `GlobalMemoryStatusEx`."""
    fields = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)]
    names = ("total", "available", "page_total", "page_left", "virtual", "virtual_left", "extended")
    fields += [(name, ctypes.c_ulonglong) for name in names]  # type: ignore[misc]
    status = type("MemoryStatus", (ctypes.Structure,), {"_fields_": fields})()
    status.length = ctypes.sizeof(status)
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(status.total), int(status.available)


def _gpu_flops(device: torch.device) -> float:
    properties = torch.cuda.get_device_properties(device)
    capability = runtime.capability(device)
    per_sm = FLOPS_PER_SM.get(capability, FLOPS_GEFORCE)
    if not runtime.has_tensor_cores(device):
        per_sm = FLOPS_WITHOUT_TENSOR_CORES
    clock = getattr(properties, "clock_rate", 0) * 1000 or CLOCK_HZ  # kHz
    return float(properties.multi_processor_count * clock * per_sm * EFFICIENCY)


def _link_bytes_s(device: torch.device) -> float:
    """Pinned copies to the device; 0 where nothing can be pinned, or the device is full."""
    try:
        source = torch.empty(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
        target = torch.empty_like(source, device=device)
    except RuntimeError:
        return 0.0  # a plan for a full device is refused with its figures
    new: Any = torch.cuda.Event
    start, stop = new(enable_timing=True), new(enable_timing=True)
    target.copy_(source, non_blocking=True)
    start.record()
    target.copy_(source, non_blocking=True)
    stop.record()
    stop.synchronize()
    del target
    torch.cuda.empty_cache()  # or its segment would stay, with cuBLAS's workspace in it
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
