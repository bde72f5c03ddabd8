"""Q5_1: 32 5-bit weights share a float16 scale and a float16 offset; 24 bytes.

    w[e] = d * q[e] + m

    byte 0 half d, 2 half m, 4 qh[4], 8 qs[16];  q[e] as in Q5_0

Source: ggml `block_q5_1`; the oracle in the tests is gguf-py.
"""

import torch

from zquant_kernels.dequant_q4_1 import load_units
from zquant_kernels.dequant_q5_0 import levels, reference_levels
from zquant_kernels.runtime import tl, triton

__all__ = ["QBLOCK", "QBLOCK_BYTES", "decode", "reference"]

QBLOCK = 32
QBLOCK_BYTES = 24


def reference(packed: torch.Tensor) -> torch.Tensor:
    """float32 `[N, K]` weights of uint8 `packed [N, K / 32 * 24]`, in plain torch."""
    qblocks = packed.reshape(-1, QBLOCK_BYTES)
    units = qblocks[:, :4].contiguous().view(torch.float16).float()  # d, m
    q = reference_levels(qblocks[:, 4:])
    return (units[:, :1] * q + units[:, 1:]).reshape(len(packed), -1)


@triton.jit
def decode(packed, start, mask):  # type: ignore[no-untyped-def]
    """float32 `[T, 32]` weights of the qblocks at bytes `start [T]`, 0 outside `mask [T]`."""
    at, mask = (packed + start)[:, None, None], mask[:, None, None]
    d, m = load_units(at, mask)
    return tl.reshape(d * levels(at + 4, mask).to(tl.float32) + m, (start.shape[0], 32))
