"""Memory that runs out where no plan can help, as one error with a remedy.

Torch has an error of its own for its allocator on a GPU; what CUDA and its libraries take
themselves (a context, a workspace, an event) fails with a RuntimeError that only its text tells.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from zquant.errors import PlanError

__all__ = ["lost_vram", "memory_that_runs_out"]

# in the messages of torch's allocator for CPUs; of CUDA, cuBLAS and Triton
NO_RAM = "DefaultCPUAllocator"
NO_VRAM = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)


@contextmanager
def memory_that_runs_out() -> Iterator[None]:
    """What libraries raise without memory becomes a PlanError; other errors stay what they are."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        remedy = _remedy(error)
        if not remedy:
            raise
        raise PlanError(remedy) from error


def lost_vram(error: RuntimeError) -> str:
    """What a library says where VRAM ran out; empty for any other error."""
    said = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(text in said for text in NO_VRAM):
        return _first_line(error) or "out of memory"
    return ""


def _first_line(error: BaseException) -> str:
    """Without the advice and the trace that follow."""
    return str(error).split("\n")[0][:200]


def _remedy(error: MemoryError | RuntimeError) -> str:
    """The message of memory that ran out; empty for any other error."""
    if isinstance(error, RuntimeError) and (said := lost_vram(error)):
        return (
            f"VRAM ran out ({said}). Close programs that use the GPU, or use a "
            f"smaller --budget or --device cpu."
        )
    if isinstance(error, MemoryError) or NO_RAM in str(error):
        return (
            f"RAM ran out ({_first_line(error)}). Close other programs, or use a smaller "
            f"--max-ram, which streams more from the file."
        )
    return ""
