"""IQ4_NL: 32 weights that are one of 16 values, and share one float16 scale; 18 bytes.

    w[e] = d * VALUES[q[e]]

    byte 0 half d, 2 qs[16];  q[e] as in Q4_0

The product is exact in float32 (11 + 8 bits).

Source: ggml `block_iq4_nl`, `kvalues_iq4nl`; the oracle in the tests is gguf-py.
"""

import torch

from zquant_kernels.dequant_q4_0 import nibbles, reference_nibbles
from zquant_kernels.runtime import tl, triton

__all__ = ["QBLOCK", "QBLOCK_BYTES", "decode", "look_up", "reference", "reference_look_up"]

QBLOCK = 32
QBLOCK_BYTES = 18
VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def reference(packed: torch.Tensor) -> torch.Tensor:
    """float32 `[N, K]` weights of uint8 `packed [N, K / 32 * 18]`, in plain torch."""
    qblocks = packed.reshape(-1, QBLOCK_BYTES)
    d = qblocks[:, :2].contiguous().view(torch.float16).float()
    return (d * reference_look_up(reference_nibbles(qblocks[:, 2:]))).reshape(len(packed), -1)


def reference_look_up(q: torch.Tensor) -> torch.Tensor:
    """float32 `VALUES[q]` in the shape of uint8 `q`."""
    return torch.tensor(VALUES, dtype=torch.float32, device=q.device)[q.int()]


@triton.jit
def look_up(q):  # type: ignore[no-untyped-def]
    """float32 `VALUES[q]` in the shape of int32 `q`, 0 to 15."""
    # two words of eight int8, the first lowest: no memory is read for the table
    word = tl.where(q < 8, 0xF6EADDCFBFAD9881, 0x7159453526190D01)
    return (word >> (8 * (q & 7)).to(tl.uint64)).to(tl.int8).to(tl.float32)


@triton.jit
def decode(packed, start, mask):  # type: ignore[no-untyped-def]
    """float32 `[T, 32]` weights of the qblocks at bytes `start [T]`, 0 outside `mask [T]`."""
    at, mask = (packed + start)[:, None, None], mask[:, None, None]
    d = tl.load(at.to(tl.pointer_type(tl.float16)), mask=mask, other=0.0).to(tl.float32)
    return tl.reshape(d * look_up(nibbles(at + 2, mask)), (start.shape[0], 32))
