"""Fresh memory is NaN in kernel tests, so what a kernel forgets to write shows."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
