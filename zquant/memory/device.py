"""What this machine has, and which dtype it multiplies well.

Nothing here is decided silently: every choice comes with its reason, which `zquant run` prints.
"""

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from zquant.errors import DeviceError
from zquant.layers.compute import Compute
from zquant.memory.driver import why_no_gpu
from zquant.memory.paths import AUTO, Paths, choose
from zquant.memory.shortage import memory_that_runs_out

__all__ = ["COMPUTE_DTYPES", "Device", "matmul_flops", "peak_host_bytes", "probe"]

COMPUTE_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
CLEARLY_FASTER = 1.5  # a CPU must multiply bfloat16 this much faster before it is worth rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Where and in what dtype to compute, and why.

    `vae_dtype` differs from `compute_dtype` for float16, in which the autoencoder is unproven.
    `reason` is that of the dtype; `paths` have their own. `no_gpu` is why "auto" became a CPU
    beside an NVIDIA driver, and what to do.
    """

    torch_device: torch.device
    reason: str
    paths: Paths
    no_gpu: str = ""

    @property
    def compute(self) -> Compute:
        """How blocks compute."""
        return self.paths.compute

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of exact products."""
        return self.compute.dtype

    @property
    def vae_dtype(self) -> torch.dtype:
        """The autoencoder's dtype."""
        return torch.float32 if self.compute_dtype == torch.float16 else self.compute_dtype

    @property
    def is_cuda(self) -> bool:
        """Weights have to be copied to a GPU."""
        return self.torch_device.type == "cuda"

    @property
    def name(self) -> str:
        """The device as its maker calls it."""
        if self.is_cuda:
            return torch.cuda.get_device_name(self.torch_device)
        return f"CPU, {torch.get_num_threads()} threads"

    @property
    def summary(self) -> str:
        """The choices in one line."""
        dtype = str(self.compute_dtype).removeprefix("torch.")
        text = f"{self.name}, {dtype} ({self.reason}), {self.compute.mode} ({self.paths.reason})"
        dequantize = self.paths.families[0]
        if self.is_cuda and dequantize.reason:
            text += f"; no Triton kernels ({dequantize.reason})"
        if self.no_gpu:
            text += f"; no GPU: {self.no_gpu}"
        return text

    def peak_vram_bytes(self) -> int | None:
        """Most bytes torch has reserved on the GPU since it was probed; None on a CPU."""
        return torch.cuda.max_memory_reserved(self.torch_device) if self.is_cuda else None


@memory_that_runs_out()
def probe(
    device: str = AUTO,
    compute_dtype: str = AUTO,
    *,
    compute: str = AUTO,
    kernels: str = AUTO,
    attention: str = "sdpa",
) -> Device:
    """Choose device, dtype and kernels.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:1".
        compute_dtype: "auto" or a key of `COMPUTE_DTYPES`.
        compute: see `zquant.memory.paths.choose`; likewise `kernels` and `attention`.
        kernels: see `compute`.
        attention: see `compute`.

    Raises:
        DeviceError: the device is unknown or absent, or Triton is asked for and cannot run.
        PlanError: other programs have left no memory on it.
        ValueError: another choice is unknown.

    A GPU becomes torch's current device.
    """
    chosen = _torch_device(device)
    if chosen.type == "cuda":
        # events, streams and pinned memory go to the current device; this also initializes CUDA
        torch.cuda.set_device(chosen)
    if compute_dtype == AUTO:
        dtype, reason = _auto_dtype(chosen)
    elif compute_dtype in COMPUTE_DTYPES:
        dtype, reason = COMPUTE_DTYPES[compute_dtype], "as asked"
    else:
        known = ", ".join((AUTO, *COMPUTE_DTYPES))
        raise ValueError(f"compute dtype {compute_dtype!r} is unknown; known: {known}")
    paths = choose(chosen, dtype, compute=compute, kernels=kernels, attention=attention)
    if chosen.type == "cuda":
        torch.cuda.reset_peak_memory_stats(chosen)
    no_gpu = why_no_gpu() if device == AUTO and chosen.type == "cpu" else ""
    return Device(torch_device=chosen, reason=reason, paths=paths, no_gpu=no_gpu)


def _torch_device(device: str) -> torch.device:
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == AUTO:
        return torch.device("cuda", 0) if n_gpus else torch.device("cpu")
    if device == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d{1,4}))?", device, re.ASCII)
    if match is None:
        raise DeviceError(f"device {device!r} is unknown. Use auto, cpu, cuda or cuda:0.")
    index = int(match[1] or 0)
    if index >= n_gpus:
        found = {0: "no CUDA device", 1: "one CUDA device, cuda:0"}.get(
            n_gpus, f"CUDA devices 0 to {n_gpus - 1}"
        )
        remedy = "Use one that is there."
        if not n_gpus and (why := why_no_gpu()):
            remedy = f"Use --device cpu; {why}"  # which may end with a command to copy
        elif not n_gpus:
            remedy = "Use --device cpu, or install a torch build that matches the driver."
        raise DeviceError(
            f"device {device!r} is not there: torch {torch.__version__} sees {found}. {remedy}"
        )
    return torch.device("cuda", index)


def _auto_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        shown = "compute capability {}.{}".format(*capability)
        if capability >= (8, 0):
            return torch.bfloat16, f"{shown} multiplies bfloat16"
        if capability >= (7, 0):
            return torch.float16, f"{shown} multiplies float16, not bfloat16"
        return torch.float32, f"{shown} multiplies neither bfloat16 nor float16 fast"
    seconds = {dtype: _matmul_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    shown = f"this CPU multiplies bfloat16 at {ratio:.2f} times the float32 rate"
    return (torch.bfloat16 if ratio > CLEARLY_FASTER else torch.float32), shown


def matmul_flops(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product of `dtype` on this CPU."""
    return 2 * 128 * 1024 * 1024 / _matmul_seconds(dtype)


def _matmul_seconds(dtype: torch.dtype) -> float:
    """Best of three products of 0.27 GFLOP."""
    x, weight = torch.ones(128, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    times = []
    for _ in range(4):  # the first one also pays for set-up
        start = time.perf_counter()
        x @ weight
        times.append(time.perf_counter() - start)
    return min(times[1:])


def peak_host_bytes() -> int | None:
    """Most host memory this process has held, mapped pages included; None where unknown."""
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage says there is inherited from the parent
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    try:
        import resource  # absent on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
