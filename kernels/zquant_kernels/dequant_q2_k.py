"""Q2_K: 256 weights in 84 bytes; 2-bit levels, sixteen 4-bit scales and minimums.

    w[e] = (d * sc[s]) * q[e] - dmin * mn[s]        s = e // 16

    byte 0 scales[16], 16 qs[64], 80 half d, 82 half dmin
    sc[s], mn[s] = low, high nibble of scales[s]
    q[e] = bits 2j and 2j + 1 of qs[32 (e // 128) + e % 32], j = e % 128 // 32

Source: ggml `block_q2_K`, `dequantize_row_q2_K`; the oracle in the tests is gguf-py.
"""

import torch

from zquant_kernels.dequant_q4_1 import load_units
from zquant_kernels.runtime import tl, triton

__all__ = ["QBLOCK", "QBLOCK_BYTES", "decode", "pairs", "reference", "reference_pairs"]

QBLOCK = 256
QBLOCK_BYTES = 84


def reference(packed: torch.Tensor) -> torch.Tensor:
    """float32 `[N, K]` weights of uint8 `packed [N, K / 256 * 84]`, in plain torch."""
    qblocks = packed.reshape(-1, QBLOCK_BYTES)
    units = qblocks[:, 80:].contiguous().view(torch.float16).float()  # d, dmin
    scale, minimum = units[:, :1] * (qblocks[:, :16] & 15), units[:, 1:] * (qblocks[:, :16] >> 4)
    q = reference_pairs(qblocks[:, 16:80]).reshape(-1, 16, 16)
    return (scale[..., None] * q - minimum[..., None]).reshape(len(packed), -1)


def reference_pairs(qs: torch.Tensor) -> torch.Tensor:
    """uint8 `[n, 2, 4, 32]`: of every 32 of the bytes `qs [n, 64]` their pairs of bits."""
    shift = torch.arange(0, 8, 2, device=qs.device, dtype=torch.uint8)[:, None]
    return (qs.reshape(-1, 2, 1, 32) >> shift) & 3


@triton.jit
def pairs(at, mask):  # type: ignore[no-untyped-def]
    """int32 `[T, 2, 4, 32]`: of every 32 of the 64 bytes at `at [T, 1, 1, 1]` their pairs of bits.

    The lowest pairs of 32 bytes are 32 neighbours, the next pairs the next.
    """
    bytes_at = at + 32 * tl.arange(0, 2)[:, None, None] + tl.arange(0, 32)
    qs = tl.load(bytes_at, mask=mask, other=0).to(tl.int32)  # [T, 2, 1, 32]
    return (qs >> (2 * tl.arange(0, 4)[:, None])) & 3


@triton.jit
def decode(packed, start, mask):  # type: ignore[no-untyped-def]
    """float32 `[T, 256]` weights of the qblocks at bytes `start [T]`, 0 outside `mask [T]`."""
    at, mask = (packed + start)[:, None, None], mask[:, None, None]
    d, dmin = load_units(at + 80, mask)
    b = tl.load(at + tl.arange(0, 16)[:, None], mask=mask, other=0)  # [T, 16, 1]
    scale, minimum = d * (b & 15).to(tl.float32), dmin * (b >> 4).to(tl.float32)
    q = tl.reshape(pairs(at[:, None] + 16, mask[:, None]), (start.shape[0], 16, 16))
    return tl.reshape(scale * q.to(tl.float32) - minimum, (start.shape[0], 256))
