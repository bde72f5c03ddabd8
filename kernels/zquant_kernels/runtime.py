"""Triton when it is installed, otherwise stand-ins that let the kernel files import.

Kernel files take `triton`, `tl` from here. Without Triton a `@triton.jit` function is left a plain
Python function that nobody calls: wrappers ask `why_not(device)` first and compute the reference
instead. The reason is a sentence for people.
"""

import os
from types import SimpleNamespace
from typing import Any

import torch

__all__ = ["AVAILABLE", "INTERPRETED", "REASON", "tl", "triton", "why_not"]

MIN_CAPABILITY = (7, 5)

triton: Any
tl: Any
try:
    import triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]

    AVAILABLE = True
    REASON = ""
except ImportError as error:
    AVAILABLE = False
    REASON = f"Triton cannot be imported ({error})"
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=object)  # evaluated in the kernels' annotations

# Triton reads its own variable when a kernel is decorated, which is now and not at the launch
INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET", "") == "1"


def why_not(device: torch.device) -> str:
    """Why kernels cannot run on tensors of `device`; empty when they can."""
    if not AVAILABLE or INTERPRETED:
        return REASON
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device; this is '{device.type}'"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        name, have = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        return f"Triton kernels need compute capability 7.5; '{name}' has {have}"
    return ""
