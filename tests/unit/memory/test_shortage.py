"""Memory that runs out is one message with a remedy, whoever says it; other errors are left."""

import pytest
import torch

from zquant.errors import PlanError
from zquant.memory.shortage import memory_that_runs_out

SHORTAGES = {
    "numpy": (MemoryError("for numpy"), "RAM ran out .*--max-ram"),
    "torch on Linux": (
        RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried"),
        r"RAM ran out \(\[enforce\] Def.*--max-ram",
    ),
    "torch on Windows": (
        RuntimeError("[enforce] DefaultCPUAllocator: not enough memory: you tried"),
        "RAM ran out .*--max-ram",
    ),
    "torch on a GPU": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
        r"VRAM ran out \(CUDA.*2 GiB\.\)\. Close programs that use the GPU.*smaller --budget",
    ),
    "CUDA": (
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
        r"VRAM ran out \(CUDA error: out of memory\)\. Close programs that use the GPU",
    ),
    "cuBLAS": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        "VRAM ran out .*Close programs that use the GPU",
    ),
}


@pytest.mark.parametrize(("error", "message"), SHORTAGES.values(), ids=SHORTAGES)
def test_memory_that_runs_out_has_a_remedy(error: Exception, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught, memory_that_runs_out():
        raise error
    assert caught.value.__cause__ is error


def test_another_error_stays_what_it_is() -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError) as caught, memory_that_runs_out():
        raise error
    assert caught.value is error


def test_what_cuda_says_of_memory_is_a_runtime_error() -> None:
    assert issubclass(torch.OutOfMemoryError, RuntimeError)
    assert issubclass(torch.AcceleratorError, RuntimeError)
