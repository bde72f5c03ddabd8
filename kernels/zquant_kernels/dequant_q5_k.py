"""Q5_K: 256 weights in 176 bytes; 5-bit levels, eight 6-bit scales and minimums.

    w[e] = (d * sc[s]) * q[e] - dmin * mn[s]        s = e // 32

    byte 0 half d, 2 half dmin, 4 scales[12] as in Q4_K, 16 qh[32], 48 qs[128]
    q[e] = nibble as in Q4_K, plus 16 if bit s of qh[e % 32] is set

Source: ggml `block_q5_K`, `dequantize_row_q5_K`; the oracle in the tests is gguf-py.
"""

import torch

from zquant_kernels.dequant_q4_k import load_scales, nibbles, reference_scales
from zquant_kernels.runtime import tl, triton

__all__ = ["QBLOCK", "QBLOCK_BYTES", "decode", "reference"]

QBLOCK = 256
QBLOCK_BYTES = 176


def reference(packed: torch.Tensor) -> torch.Tensor:
    """float32 `[N, K]` weights of uint8 `packed [N, K / 256 * 176]`, in plain torch."""
    qblocks = packed.reshape(-1, QBLOCK_BYTES)
    scale, minimum = reference_scales(qblocks)
    qs = qblocks[:, 48:].reshape(-1, 4, 1, 32)
    nibbles = torch.cat((qs & 15, qs >> 4), dim=2).reshape(-1, 8, 32)
    bit = torch.arange(8, device=packed.device, dtype=torch.uint8)[:, None]
    fifth = (qblocks[:, None, 16:48] >> bit) & 1
    return (scale * (nibbles | fifth << 4) - minimum).reshape(len(packed), -1)


@triton.jit
def decode(packed, start, mask):  # type: ignore[no-untyped-def]
    """float32 `[T, 256]` weights of the qblocks at bytes `start [T]`, 0 outside `mask [T]`."""
    at = packed + start
    at3, mask3 = at[:, None, None], mask[:, None, None]
    scale, minimum = load_scales(at3, mask3)
    qh = tl.load(at3 + 16 + tl.arange(0, 32), mask=mask3, other=0).to(tl.int32)  # [T, 1, 32]
    fifth = (qh >> tl.arange(0, 8)[:, None]) & 1  # [T, 8, 32]
    q = nibbles(at + 48, mask) | fifth << 4
    return tl.reshape(scale * q.to(tl.float32) - minimum, (start.shape[0], 256))
