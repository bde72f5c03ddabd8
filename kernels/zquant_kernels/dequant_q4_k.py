"""Q4_K: 256 weights in 144 bytes; 4-bit levels, eight 6-bit scales and minimums.

    w[e] = (d * sc[s]) * q[e] - dmin * mn[s]        s = e // 32

    byte 0 half d, 2 half dmin, 4 scales[12], 16 qs[128]
    q[e] = nibble of qs[32 * (e // 64) + e % 32], low for even e // 32, high for odd
    sc[s], mn[s] = low 6 bits of scales[s], scales[s + 4]                                   s < 4
                   scales[s + 4] & 15 | scales[s - 4] >> 6 << 4,
                   scales[s + 4] >> 4 | scales[s] >> 6 << 4                                 s >= 4

Source: ggml `block_q4_K`, `get_scale_min_k4`, `dequantize_row_q4_K`; the oracle in the tests is
gguf-py.
"""

import torch

from zquant_kernels.dequant_q4_1 import load_units
from zquant_kernels.runtime import tl, triton

__all__ = [
    "QBLOCK",
    "QBLOCK_BYTES",
    "decode",
    "load_scales",
    "nibbles",
    "reference",
    "reference_scales",
]

QBLOCK = 256
QBLOCK_BYTES = 144


def reference(packed: torch.Tensor) -> torch.Tensor:
    """float32 `[N, K]` weights of uint8 `packed [N, K / 256 * 144]`, in plain torch."""
    qblocks = packed.reshape(-1, QBLOCK_BYTES)
    scale, minimum = reference_scales(qblocks)
    qs = qblocks[:, 16:].reshape(-1, 4, 1, 32)
    q = torch.cat((qs & 15, qs >> 4), dim=2).reshape(-1, 8, 32)
    return (scale * q - minimum).reshape(len(packed), -1)


def reference_scales(qblocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 `[n, 8, 1]` scales and minimums of uint8 qblocks `[n, at least 16]`."""
    units = qblocks[:, :4].contiguous().view(torch.float16).float()  # d, dmin
    low, middle, high = qblocks[:, 4:16].int().reshape(-1, 3, 4).unbind(1)
    sc = torch.cat((low & 63, high & 15 | low >> 6 << 4), dim=1)
    mn = torch.cat((middle & 63, high >> 4 | middle >> 6 << 4), dim=1)
    return (units[:, :1] * sc)[..., None], (units[:, 1:] * mn)[..., None]


@triton.jit
def load_scales(at, mask):  # type: ignore[no-untyped-def]
    """float32 `[T, 8, 1]` scales and minimums of the qblocks at pointers `at [T, 1, 1]`."""
    d, dmin = load_units(at, mask)
    s = tl.arange(0, 8)[:, None]
    b = at + 4 + s % 4  # [T, 8, 1]
    low = tl.load(b, mask=mask, other=0).to(tl.int32)
    middle = tl.load(b + 4, mask=mask, other=0).to(tl.int32)
    high = tl.load(b + 8, mask=mask, other=0).to(tl.int32)
    sc = tl.where(s < 4, low & 63, (high & 15) | ((low >> 6) << 4))
    mn = tl.where(s < 4, middle & 63, (high >> 4) | ((middle >> 6) << 4))
    return d * sc.to(tl.float32), dmin * mn.to(tl.float32)


@triton.jit
def nibbles(at, mask):  # type: ignore[no-untyped-def]
    """int32 `[T, 8, 32]`: of every 32 of the bytes at `at [T]` the low halves, then the high."""
    at, mask = at[:, None, None, None], mask[:, None, None, None]
    p, h = tl.arange(0, 4)[:, None, None], tl.arange(0, 2)[:, None]
    qs = tl.load(at + p * 32 + tl.arange(0, 32), mask=mask, other=0).to(tl.int32)  # [T, 4, 1, 32]
    return tl.reshape((qs >> (4 * h)) & 15, (qs.shape[0], 8, 32))


@triton.jit
def decode(packed, start, mask):  # type: ignore[no-untyped-def]
    """float32 `[T, 256]` weights of the qblocks at bytes `start [T]`, 0 outside `mask [T]`."""
    at = packed + start
    scale, minimum = load_scales(at[:, None, None], mask[:, None, None])
    q = nibbles(at + 16, mask)
    return tl.reshape(scale * q.to(tl.float32) - minimum, (start.shape[0], 256))
