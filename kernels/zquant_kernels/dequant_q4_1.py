"""Q4_1: 32 4-bit weights share a float16 scale and a float16 offset; 20 bytes.

    w[e] = d * q[e] + m

    byte 0 half d, 2 half m, 4 qs[16];  q[e] as in Q4_0

Source: ggml `block_q4_1`; the oracle in the tests is gguf-py.
"""

import torch

from zquant_kernels.dequant_q4_0 import nibbles, reference_nibbles
from zquant_kernels.runtime import tl, triton

__all__ = ["QBLOCK", "QBLOCK_BYTES", "decode", "load_units", "reference"]

QBLOCK = 32
QBLOCK_BYTES = 20


def reference(packed: torch.Tensor) -> torch.Tensor:
    """float32 `[N, K]` weights of uint8 `packed [N, K / 32 * 20]`, in plain torch."""
    qblocks = packed.reshape(-1, QBLOCK_BYTES)
    units = qblocks[:, :4].contiguous().view(torch.float16).float()  # d, m
    q = reference_nibbles(qblocks[:, 4:])
    return (units[:, :1] * q + units[:, 1:]).reshape(len(packed), -1)


@triton.jit
def load_units(at, mask):  # type: ignore[no-untyped-def]
    """float32 of the float16 at pointers `at`, and of the one behind it; shapes of `at`."""
    at = at.to(tl.pointer_type(tl.float16))
    first, second = tl.load(at, mask=mask, other=0.0), tl.load(at + 1, mask=mask, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def decode(packed, start, mask):  # type: ignore[no-untyped-def]
    """float32 `[T, 32]` weights of the qblocks at bytes `start [T]`, 0 outside `mask [T]`."""
    at, mask = (packed + start)[:, None, None], mask[:, None, None]
    d, m = load_units(at, mask)
    return tl.reshape(d * nibbles(at + 4, mask).to(tl.float32) + m, (start.shape[0], 32))
