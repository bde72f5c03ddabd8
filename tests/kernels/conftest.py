"""Fresh memory is NaN in kernel tests, so what a kernel forgets to write shows."""

import os

import pytest
import torch

# before 2.10 torch warns at every product of a GPU where this is not set
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
