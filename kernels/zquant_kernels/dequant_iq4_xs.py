"""IQ4_XS: 256 weights in 136 bytes; the values of IQ4_NL, eight 6-bit signed scales.

    w[e] = (d * (sc[s] - 32)) * VALUES[q[e]]        s = e // 32

    byte 0 half d, 2 little-endian scales_h, 4 scales_l[4], 8 qs[128]
    q[e] = nibble of qs[16 s + e % 16], low for e % 32 < 16, high otherwise
    sc[s] = nibble of scales_l[s // 2], low for even s, high for odd
            + 16 * (bits 2s and 2s + 1 of scales_h)

Source: ggml `block_iq4_xs`, `dequantize_row_iq4_xs`; the oracle in the tests is gguf-py.
"""

import torch

from zquant_kernels.dequant_iq4_nl import look_up, reference_look_up
from zquant_kernels.dequant_q4_0 import nibbles, reference_nibbles
from zquant_kernels.runtime import tl, triton

__all__ = ["QBLOCK", "QBLOCK_BYTES", "decode", "reference"]

QBLOCK = 256
QBLOCK_BYTES = 136


def reference(packed: torch.Tensor) -> torch.Tensor:
    """float32 `[N, K]` weights of uint8 `packed [N, K / 256 * 136]`, in plain torch."""
    qblocks = packed.reshape(-1, QBLOCK_BYTES)
    d = qblocks[:, :2].contiguous().view(torch.float16).float()
    shift = torch.arange(0, 8, 2, device=packed.device, dtype=torch.uint8)
    high = ((qblocks[:, 2:4, None] >> shift) & 3).reshape(-1, 8)
    low = torch.stack((qblocks[:, 4:8] & 15, qblocks[:, 4:8] >> 4), dim=2).reshape(-1, 8)
    scale = d * ((low | high << 4).float() - 32)
    values = reference_look_up(reference_nibbles(qblocks[:, 8:].reshape(-1, 8, 16)))
    return (scale[..., None] * values).reshape(len(packed), -1)


@triton.jit
def decode(packed, start, mask):  # type: ignore[no-untyped-def]
    """float32 `[T, 256]` weights of the qblocks at bytes `start [T]`, 0 outside `mask [T]`."""
    at, mask = (packed + start)[:, None, None, None], mask[:, None, None, None]
    d = tl.load(at.to(tl.pointer_type(tl.float16)), mask=mask, other=0.0).to(tl.float32)
    s = tl.arange(0, 8)[:, None, None]
    high = tl.load((at + 2).to(tl.pointer_type(tl.int16)), mask=mask, other=0).to(tl.int32)
    low = tl.load(at + 4 + s // 2, mask=mask, other=0).to(tl.int32)  # [T, 8, 1, 1]
    sc = ((low >> (4 * (s % 2))) & 15) | ((high >> (2 * s)) & 3) << 4
    values = look_up(nibbles(at + 8 + 16 * s, mask))  # [T, 8, 2, 16]
    return tl.reshape((d * (sc - 32).to(tl.float32)) * values, (start.shape[0], 256))
