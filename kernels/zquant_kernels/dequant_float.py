"""Decode BF16 and F16 as if they were qblocks, so that int8 rows can be made of them as well.

    w[e] = the value

A qblock is one value of 2 bytes, without a scale; `decode` takes 16 neighbours at a time.

Source: ggml `ggml_bf16_to_fp32`, `ggml_fp16_to_fp32`.
"""

import torch

from zquant_kernels.runtime import tl, triton

__all__ = [
    "CHUNK",
    "QBLOCK",
    "QBLOCK_BYTES",
    "decode_bf16",
    "decode_f16",
    "reference_bf16",
    "reference_f16",
]

QBLOCK = 1
QBLOCK_BYTES = 2
CHUNK = 16  # values that `decode` gives for one start


def reference_bf16(packed: torch.Tensor) -> torch.Tensor:
    """float32 `[N, K]` of uint8 `packed [N, 2 K]`, in plain torch."""
    return packed.view(torch.bfloat16).float()


def reference_f16(packed: torch.Tensor) -> torch.Tensor:
    """float32 `[N, K]` of uint8 `packed [N, 2 K]`, in plain torch."""
    return packed.view(torch.float16).float()


@triton.jit
def decode_bf16(packed, start, mask):  # type: ignore[no-untyped-def]
    """float32 `[T, 16]` values from bytes `start [T]` on, 0 outside `mask [T]`."""
    # as integers: bfloat16 is the upper half of float32
    at = (packed + start).to(tl.pointer_type(tl.uint16))[:, None] + tl.arange(0, 16)[None, :]
    bits = tl.load(at, mask=mask[:, None], other=0).to(tl.uint32) << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def decode_f16(packed, start, mask):  # type: ignore[no-untyped-def]
    """float32 `[T, 16]` values from bytes `start [T]` on, 0 outside `mask [T]`."""
    at = (packed + start).to(tl.pointer_type(tl.float16))[:, None] + tl.arange(0, 16)[None, :]
    return tl.load(at, mask=mask[:, None], other=0.0).to(tl.float32)
