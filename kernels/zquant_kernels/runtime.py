"""Triton when it is installed, otherwise stand-ins that let the kernel files import.

Kernel files take `triton`, `tl` from here. Without Triton a `@triton.jit` function is left a plain
Python function that nobody calls: wrappers ask `why_not(device)` first and compute the reference
instead. The reason is a sentence for people.
"""

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

__all__ = [
    "AVAILABLE",
    "INTERPRETED",
    "MIN_TRITON",
    "REASON",
    "CompileCase",
    "capability",
    "forbidden",
    "has_tensor_cores",
    "on_device",
    "tl",
    "triton",
    "why_not",
]

MIN_CAPABILITY = (7, 5)
MIN_TRITON = (3, 6)  # the oldest that the compile tests run
# small Turing chips under all their names; a Tesla T4 has them
NO_TENSOR_CORES = re.compile(r"GTX 16|\bT(400|500|600|1000|1200|2000)\b|MX[45]50")

_forbidden: ContextVar[str] = ContextVar("forbidden", default="")

triton: Any
tl: Any
try:
    import triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]

    AVAILABLE = tuple(map(int, triton.__version__.split(".")[:2])) >= MIN_TRITON
    REASON = "" if AVAILABLE else f"Triton {triton.__version__} is older than 3.6"
except ImportError as error:
    AVAILABLE = False
    REASON = f"Triton cannot be imported ({error})"
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=object)  # evaluated in the kernels' annotations

# Triton reads its own variable when a kernel is decorated, which is now and not at the launch
INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET", "") == "1"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileCase:
    """One form in which a wrapper can launch a kernel, for the compile tests.

    Attributes:
        kernel: the `triton.jit` function.
        types: argument -> Triton type, `{"x": "*fp16", "M": "i32"}`.
        constants: argument -> value of every `tl.constexpr`.
        options: what the wrapper passes beside arguments: num_warps, num_stages, enable_fp_fusion.
        aligned: arguments divisible by 16, pointers by their address; Triton specializes on that.
        min_arch: oldest architecture on which the wrapper launches it.
        matmul: it must use matrix instructions.
    """

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    min_arch: int = 75
    matmul: bool = False


@contextmanager
def forbidden(reason: str) -> Iterator[None]:
    """Within the context, in this thread, no kernel is launched; references answer instead."""
    token = _forbidden.set(reason)
    try:
        yield
    finally:
        _forbidden.reset(token)


def why_not(device: torch.device) -> str:
    """Why kernels cannot run on tensors of `device`; empty when they can."""
    if reason := _forbidden.get():
        return reason
    if not AVAILABLE or INTERPRETED:
        return REASON
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device; this is '{device.type}'"
    have = capability(device)
    if have < MIN_CAPABILITY:
        name, shown = torch.cuda.get_device_name(device), ".".join(map(str, have))
        return f"Triton kernels need compute capability 7.5; '{name}' has {shown}"
    return _launcher_trouble()


@cache
def _launcher_trouble() -> str:
    """Why Triton cannot build what launches kernels; empty when it can.

    It compiles a little C against Python's headers, when it is first used and for every kernel.
    """
    try:
        triton.runtime.driver.active.get_current_device()
    except Exception as error:  # of a compiler, a linker or the driver, by no common type
        said = str(error).partition("\n")[0]
        return (
            f"Triton cannot build its launcher ({type(error).__name__}: {said:.200}); it needs a "
            f"C compiler and Python's headers, e.g. the packages gcc and python3-dev"
        )
    return ""


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (0, 0) for what is none, as under the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def has_tensor_cores(device: torch.device) -> bool:
    """Whether a CUDA device multiplies matrices; of compute capability 7.5 not all do."""
    found = capability(device)
    if found != (7, 5):
        return found >= (7, 0)
    return NO_TENSOR_CORES.search(torch.cuda.get_device_name(device)) is None


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """A context in which Triton launches on the device of `tensor`."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
