"""Q8_0: 32 int8 weights share one float16 scale; 34 bytes.

    w[e] = d * q[e]

    byte 0 half d, 2 int8 q[32]

The product is exact in float32 (11 + 8 bits).

Source: ggml `block_q8_0`; the oracle in the tests is gguf-py.
"""

import torch

from zquant_kernels.runtime import tl, triton

__all__ = ["QBLOCK", "QBLOCK_BYTES", "decode", "reference"]

QBLOCK = 32
QBLOCK_BYTES = 34


def reference(packed: torch.Tensor) -> torch.Tensor:
    """float32 `[N, K]` weights of uint8 `packed [N, K / 32 * 34]`, in plain torch."""
    qblocks = packed.reshape(-1, QBLOCK_BYTES)
    d = qblocks[:, :2].contiguous().view(torch.float16).float()
    return (d * qblocks[:, 2:].view(torch.int8).float()).reshape(len(packed), -1)


@triton.jit
def decode(packed, start, mask):  # type: ignore[no-untyped-def]
    """float32 `[T, 32]` weights of the qblocks at bytes `start [T]`, 0 outside `mask [T]`."""
    at, mask = (packed + start)[:, None], mask[:, None]
    d = tl.load(at.to(tl.pointer_type(tl.float16)), mask=mask, other=0.0).to(tl.float32)
    q = tl.load(at + 2 + tl.arange(0, 32), mask=mask, other=0).to(tl.int8, bitcast=True)
    return d * q.to(tl.float32)
