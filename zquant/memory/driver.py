"""What the NVIDIA driver says through its own tool, and why torch may see no card beside it.

Nothing here raises: a tool that is absent, fails or hangs is an answer that is not there.
"""

import ctypes
import os
import shutil
import subprocess

import torch

__all__ = ["driver_version", "process_vram_bytes", "why_no_gpu"]

MIB = 2**20
TOOL_S = 10  # for an answer; a driver that hangs gives none
DRIVERS = ("libcuda.so.1", "nvcuda.dll")  # the library of the driver on Linux and on Windows
HIDES = "CUDA_VISIBLE_DEVICES"
WITH_CUDA = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"


def driver_version() -> str | None:
    """The NVIDIA driver's version; None where its tool does not tell."""
    answer = _asked("--query-gpu=driver_version")
    return answer[0].strip() or None if answer else None


def process_vram_bytes() -> int | None:
    """VRAM of this process, context included, as the driver counts it; None where it does not."""
    for line in _asked("--query-compute-apps=pid,used_memory"):
        pid, _, used = line.partition(",")
        if pid.strip() == str(os.getpid()) and used.strip().isdigit():
            return int(used) * MIB
    return None  # Windows shows "[N/A]", a container other process numbers


def why_no_gpu() -> str:
    """Why torch sees no CUDA device beside an NVIDIA driver, and what to do; empty without one.

    Empty also where torch sees a device, which is found out before anything slow is asked.
    """
    if torch.cuda.is_available():
        return ""
    version = driver_version()
    if version is None and not any(map(_loads, DRIVERS)):
        return ""
    if torch.version.cuda is None:
        return f"this PyTorch, {torch.__version__}, has no CUDA: {WITH_CUDA}"
    hidden = os.environ.get(HIDES)
    if hidden not in (None, "0"):
        return f"{HIDES} is {hidden!r:.80}, which may hide the card: unset it"
    return (
        f"PyTorch {torch.__version__}, for CUDA {torch.version.cuda}, finds no card through the "
        f"NVIDIA driver{f' {version}' if version else ''}: update the driver and restart"
    )


def _asked(query: str) -> list[str]:
    """The lines that the driver's tool answers; none where there is no answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TOOL_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
