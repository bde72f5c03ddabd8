"""Q5_0: 32 5-bit weights share one float16 scale; 22 bytes.

    w[e] = d * (q[e] - 16)

    byte 0 half d, 2 qh[4], 6 qs[16]
    q[e] = nibble as in Q4_0, plus 16 if bit e of the little-endian qh is set

Source: ggml `block_q5_0`; the oracle in the tests is gguf-py.
"""

import torch

from zquant_kernels.dequant_q4_0 import nibbles, reference_nibbles
from zquant_kernels.runtime import tl, triton

__all__ = ["QBLOCK", "QBLOCK_BYTES", "decode", "levels", "reference", "reference_levels"]

QBLOCK = 32
QBLOCK_BYTES = 22


def reference(packed: torch.Tensor) -> torch.Tensor:
    """float32 `[N, K]` weights of uint8 `packed [N, K / 32 * 22]`, in plain torch."""
    qblocks = packed.reshape(-1, QBLOCK_BYTES)
    d = qblocks[:, :2].contiguous().view(torch.float16).float()
    return (d * (reference_levels(qblocks[:, 2:]).float() - 16)).reshape(len(packed), -1)


def reference_levels(qblocks: torch.Tensor) -> torch.Tensor:
    """uint8 `[n, 32]` levels, 0 to 31, of uint8 `[n, 20]`: qh and qs."""
    bit = torch.arange(8, device=qblocks.device, dtype=torch.uint8)
    fifth = ((qblocks[:, :4, None] >> bit) & 1).reshape(-1, 32)
    return reference_nibbles(qblocks[:, 4:]) | fifth << 4


@triton.jit
def levels(at, mask):  # type: ignore[no-untyped-def]
    """int32 `[T, 2, 16]` levels, 0 to 31, of qh and qs at pointers `at [T, 1, 1]`."""
    # qblocks of Q5_0 are 2-byte aligned: 16 bits at a time
    halves = (at + 2 * tl.arange(0, 2)[:, None]).to(tl.pointer_type(tl.int16))
    qh = tl.load(halves, mask=mask, other=0).to(tl.int32)  # [T, 2, 1]
    fifth = (qh >> tl.arange(0, 16)) & 1  # [T, 2, 16]
    return nibbles(at + 4, mask) | fifth << 4


@triton.jit
def decode(packed, start, mask):  # type: ignore[no-untyped-def]
    """float32 `[T, 32]` weights of the qblocks at bytes `start [T]`, 0 outside `mask [T]`."""
    at, mask = (packed + start)[:, None, None], mask[:, None, None]
    d = tl.load(at.to(tl.pointer_type(tl.float16)), mask=mask, other=0.0).to(tl.float32)
    q = levels(at + 2, mask) - 16
    return tl.reshape(d * q.to(tl.float32), (start.shape[0], 32))
