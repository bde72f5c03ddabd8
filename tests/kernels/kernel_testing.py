"""What all kernel tests share: where they run, which dtypes are exact there, guard bands."""

import pytest
import torch
from zquant_kernels import runtime

__all__ = ["DEVICE", "EXACT", "assert_same_bits", "guarded", "needs_launch"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_launch = pytest.mark.skipif(
    bool(runtime.why_not(DEVICE)),
    reason=f"{runtime.why_not(DEVICE)}; run with TRITON_INTERPRET=1",
)
# the interpreter truncates to bfloat16 where a GPU rounds
EXACT = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
GUARD_BYTES = 4096


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal values, NaN where the other is NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


class guarded:  # noqa: N801 # used like a function
    """A copy of a tensor between two bands of known bytes; `check()` proves them untouched.

    What a kernel reads from the bands is garbage (NaN for floats of any width), so reading out of
    range shows in its result.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        n = tensor.numel() * tensor.element_size()
        pad = -n % GUARD_BYTES
        self._all = torch.full(
            (2 * GUARD_BYTES + n + pad,), 0xFF, dtype=torch.uint8, device=tensor.device
        )
        body = self._all[GUARD_BYTES : GUARD_BYTES + n]
        self.tensor = body.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        self._n = n

    def check(self) -> None:
        """Raise AssertionError when a band was written."""
        assert (self._all[:GUARD_BYTES] == 0xFF).all(), "written before the tensor"
        assert (self._all[GUARD_BYTES + self._n :] == 0xFF).all(), "written after the tensor"
