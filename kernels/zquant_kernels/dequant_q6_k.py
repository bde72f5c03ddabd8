"""Q6_K: 256 weights in 210 bytes; 6-bit signed levels, sixteen 8-bit scales.

    w[e] = (d * scales[e // 16]) * (q[e] - 32)

    byte 0 ql[128], 128 qh[64], 192 int8 scales[16], 208 half d
    with n = e // 128, k = e % 128 // 32, l = e % 32:
    q[e] = nibble of ql[64 n + 32 (k % 2) + l], low for k < 2, high otherwise,
           + 16 * (bits 2k and 2k + 1 of qh[32 n + l])

Source: ggml `block_q6_K`, `dequantize_row_q6_K`; the oracle in the tests is gguf-py.
"""

import torch

from zquant_kernels.runtime import tl, triton

__all__ = ["QBLOCK", "QBLOCK_BYTES", "decode", "reference"]

QBLOCK = 256
QBLOCK_BYTES = 210


def reference(packed: torch.Tensor) -> torch.Tensor:
    """float32 `[N, K]` weights of uint8 `packed [N, K / 256 * 210]`, in plain torch."""
    qblocks = packed.reshape(-1, QBLOCK_BYTES)
    ql = qblocks[:, :128].reshape(-1, 2, 1, 64)
    low = torch.cat((ql & 15, ql >> 4), dim=2).reshape(-1, 2, 4, 32)
    shift = torch.arange(0, 8, 2, device=packed.device, dtype=torch.uint8)[:, None]
    high = (qblocks[:, 128:192].reshape(-1, 2, 1, 32) >> shift) & 3
    q = (low | high << 4).to(torch.int8) - 32
    d = qblocks[:, 208:].contiguous().view(torch.float16).float()
    scale = d * qblocks[:, 192:208].contiguous().view(torch.int8).float()
    return (scale[..., None] * q.reshape(-1, 16, 16)).reshape(len(packed), -1)


@triton.jit
def levels(at, mask):  # type: ignore[no-untyped-def]
    """int32 `[T, 16, 16]` levels of the qblocks at pointers `at [T]`."""
    at, mask = at[:, None, None, None, None], mask[:, None, None, None, None]
    # k = 2 * i + j; bytes that hold weights of several k are loaded once
    n, i = tl.arange(0, 2)[:, None, None, None], tl.arange(0, 2)[:, None, None]
    j, e = tl.arange(0, 2)[:, None], tl.arange(0, 32)
    ql = tl.load(at + 64 * n + 32 * j + e, mask=mask, other=0).to(tl.int32)  # [T, 2, 1, 2, 32]
    qh = tl.load(at + 128 + 32 * n + e, mask=mask, other=0).to(tl.int32)  # [T, 2, 1, 1, 32]
    q = ((ql >> (4 * i)) & 15) | ((qh >> (4 * i + 2 * j)) & 3) << 4  # [T, 2, 2, 2, 32]
    return tl.reshape(q - 32, (q.shape[0], 16, 16))


@triton.jit
def decode(packed, start, mask):  # type: ignore[no-untyped-def]
    """float32 `[T, 256]` weights of the qblocks at bytes `start [T]`, 0 outside `mask [T]`."""
    q = levels(packed + start, mask)
    at, mask = (packed + start)[:, None, None], mask[:, None, None]
    d = tl.load((at + 208).to(tl.pointer_type(tl.float16)), mask=mask, other=0.0).to(tl.float32)
    g = tl.arange(0, 16)[:, None]
    scales = tl.load(at + 192 + g, mask=mask, other=0).to(tl.int8, bitcast=True)  # [T, 16, 1]
    weights = (d * scales.to(tl.float32)) * q.to(tl.float32)
    return tl.reshape(weights, (start.shape[0], 256))
