"""Q4_0: 32 4-bit weights share one float16 scale; 18 bytes.

    w[e] = d * (q[e] - 8)

    byte 0 half d, 2 qs[16];  q[e] = low nibble of qs[e] for e < 16, high of qs[e - 16] otherwise

Source: ggml `block_q4_0`; the oracle in the tests is gguf-py.
"""

import torch

from zquant_kernels.runtime import tl, triton

__all__ = ["QBLOCK", "QBLOCK_BYTES", "decode", "nibbles", "reference", "reference_nibbles"]

QBLOCK = 32
QBLOCK_BYTES = 18


def reference(packed: torch.Tensor) -> torch.Tensor:
    """float32 `[N, K]` weights of uint8 `packed [N, K / 32 * 18]`, in plain torch."""
    qblocks = packed.reshape(-1, QBLOCK_BYTES)
    d = qblocks[:, :2].contiguous().view(torch.float16).float()
    q = reference_nibbles(qblocks[:, 2:]).float() - 8
    return (d * q).reshape(len(packed), -1)


def reference_nibbles(qs: torch.Tensor) -> torch.Tensor:
    """uint8 `[..., 32]`: the low halves of uint8 `qs [..., 16]`, then the high."""
    return torch.cat((qs & 15, qs >> 4), dim=-1)


@triton.jit
def nibbles(at, mask):  # type: ignore[no-untyped-def]
    """int32 `[..., 2, 16]`: the low halves of 16 bytes at `at [..., 1, 1]`, then the high."""
    qs = tl.load(at + tl.arange(0, 16), mask=mask, other=0).to(tl.int32)  # [..., 1, 16]
    return (qs >> (4 * tl.arange(0, 2)[:, None])) & 15


@triton.jit
def decode(packed, start, mask):  # type: ignore[no-untyped-def]
    """float32 `[T, 32]` weights of the qblocks at bytes `start [T]`, 0 outside `mask [T]`."""
    at, mask = (packed + start)[:, None, None], mask[:, None, None]
    d = tl.load(at.to(tl.pointer_type(tl.float16)), mask=mask, other=0.0).to(tl.float32)
    q = nibbles(at + 2, mask) - 8
    return tl.reshape(d * q.to(tl.float32), (start.shape[0], 32))
