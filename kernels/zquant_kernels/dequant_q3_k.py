"""Q3_K: 256 weights in 110 bytes; 3-bit signed levels, sixteen 6-bit signed scales.

    w[e] = (d * (sc[s] - 32)) * (q[e] - 4)        s = e // 16

    byte 0 hmask[32], 32 qs[64], 96 scales[12], 108 half d
    q[e] = pair of bits of qs as in Q2_K, plus 4 if bit e // 32 of hmask[e % 32] is set
    sc[s] = nibble of scales[s % 8], low for s < 8, high otherwise
            + 16 * (bits 2i and 2i + 1 of scales[8 + s % 4], i = s // 4)

Source: ggml `block_q3_K`, `dequantize_row_q3_K`; the oracle in the tests is gguf-py.
"""

import torch

from zquant_kernels.dequant_q2_k import pairs, reference_pairs
from zquant_kernels.runtime import tl, triton

__all__ = ["QBLOCK", "QBLOCK_BYTES", "decode", "reference"]

QBLOCK = 256
QBLOCK_BYTES = 110


def reference(packed: torch.Tensor) -> torch.Tensor:
    """float32 `[N, K]` weights of uint8 `packed [N, K / 256 * 110]`, in plain torch."""
    qblocks = packed.reshape(-1, QBLOCK_BYTES)
    bit = torch.arange(8, device=packed.device, dtype=torch.uint8)[:, None]
    third = (qblocks[:, None, :32] >> bit) & 1  # [n, 8, 32]
    q = (reference_pairs(qblocks[:, 32:96]).reshape(-1, 8, 32) | third << 2).to(torch.int8) - 4
    low, high = qblocks[:, 96:104], (qblocks[:, None, 104:108] >> bit[::2]) & 3  # [n, 4, 4]
    sc = torch.cat((low & 15, low >> 4), dim=1) | high.reshape(-1, 16) << 4
    d = qblocks[:, 108:].contiguous().view(torch.float16).float()
    scale = d * (sc.to(torch.int8) - 32)
    return (scale[..., None] * q.reshape(-1, 16, 16)).reshape(len(packed), -1)


@triton.jit
def load_scales(at, mask):  # type: ignore[no-untyped-def]
    """float32 `[T, 16, 1]` scales of the qblocks at pointers `at [T, 1, 1]`."""
    d = tl.load((at + 108).to(tl.pointer_type(tl.float16)), mask=mask, other=0.0).to(tl.float32)
    s = tl.arange(0, 16)[:, None]
    low = tl.load(at + 96 + s % 8, mask=mask, other=0).to(tl.int32)  # [T, 16, 1]
    high = tl.load(at + 104 + s % 4, mask=mask, other=0).to(tl.int32)
    sc = ((low >> (4 * (s // 8))) & 15) | ((high >> (2 * (s // 4))) & 3) << 4
    return d * (sc - 32).to(tl.float32)


@triton.jit
def decode(packed, start, mask):  # type: ignore[no-untyped-def]
    """float32 `[T, 256]` weights of the qblocks at bytes `start [T]`, 0 outside `mask [T]`."""
    at, mask = (packed + start)[:, None, None], mask[:, None, None]
    scale = load_scales(at, mask)
    at, mask = at[:, None], mask[:, None]
    hmask = tl.load(at + tl.arange(0, 32), mask=mask, other=0).to(tl.int32)  # [T, 1, 1, 32]
    bit = 4 * tl.arange(0, 2)[:, None, None] + tl.arange(0, 4)[:, None]
    q = (pairs(at + 32, mask) | ((hmask << 2) >> bit) & 4) - 4  # [T, 2, 4, 32]
    q = tl.reshape(q, (start.shape[0], 16, 16))
    return tl.reshape(scale * q.to(tl.float32), (start.shape[0], 256))
