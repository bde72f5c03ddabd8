"""Dequantize Q8_0: 32 int8 weights share one float16 scale.

    w[n, k] = scale[n, k // 32] * q[n, k]

Packed layout of a qblock, 34 bytes: float16 scale, 32 x int8. Qblocks are 2-byte aligned, so the
kernel gets two views of the same bytes: `scale` as float16 (17 per qblock) and `q` as int8 (34).
Scale times weight is exact in float32 (11 + 8 bits); the only rounding is the cast at the end.

Source: ggml `block_q8_0`; the oracle in the tests is gguf-py.
"""

from contextlib import nullcontext
from typing import Any

import torch

from zquant_kernels.runtime import tl, triton, why_not

__all__ = ["COMPILE_CASES", "dequant_q8_0", "kernel", "reference"]

QBLOCK = 32  # weights per scale, fixed by the format
QBLOCK_BYTES = 34
TILE = 128  # qblocks per program
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COMPILE_CASES: list[tuple[dict[str, str], dict[str, int]]] = [  # all that can be launched
    (
        {"q": "*i8", "scale": "*fp16", "out": out, "n_qblocks": "i32"},
        {"QBLOCK": QBLOCK, "QBLOCK_BYTES": QBLOCK_BYTES, "TILE": TILE},
    )
    for out in ("*bf16", "*fp16", "*fp32")
]


def reference(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Same contract as `dequant_q8_0`, in plain torch, on any device."""
    n, row_bytes = packed.shape
    qblocks = packed.reshape(n, row_bytes // QBLOCK_BYTES, QBLOCK_BYTES)
    scale = qblocks[:, :, :2].contiguous().view(torch.float16).float()  # [N, K / 32, 1]
    q = qblocks[:, :, 2:].view(torch.int8).float()  # [N, K / 32, 32]
    return (scale * q).flatten(1).to(dtype)


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    q, scale, out, n_qblocks, QBLOCK: tl.constexpr, QBLOCK_BYTES: tl.constexpr, TILE: tl.constexpr
):
    """One program decodes `TILE` qblocks."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)  # [TILE]
    k = tl.arange(0, QBLOCK)  # [QBLOCK]
    mask = i < n_qblocks
    s = tl.load(scale + i * (QBLOCK_BYTES // 2), mask=mask, other=0.0).to(tl.float32)
    at = i[:, None] * QBLOCK_BYTES + 2 + k[None, :]  # [TILE, QBLOCK]
    w = tl.load(q + at, mask=mask[:, None], other=0).to(tl.float32) * s[:, None]
    to = out + i[:, None] * QBLOCK + k[None, :]
    tl.store(to, w.to(out.dtype.element_ty), mask=mask[:, None])


def dequant_q8_0(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Decode the rows of a Q8_0 tensor.

    Args:
        packed: uint8 `[N, K / 32 * 34]`, contiguous, on any device: the bytes of a GGUF tensor.
        dtype: bfloat16, float16 or float32.

    Returns:
        `dtype` `[N, K]` on the device of `packed`. Where kernels cannot run (see
        `runtime.why_not`) it is the reference's, which has the same bits.

    Raises:
        ValueError: `packed` or `dtype` is none of these.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] % QBLOCK_BYTES:
        raise ValueError(
            f"dequant_q8_0 needs uint8 [N, {QBLOCK_BYTES} * n];"
            f" got {packed.dtype} {list(packed.shape)}"
        )
    if not packed.is_contiguous() or packed.data_ptr() % 2:
        raise ValueError("dequant_q8_0 needs contiguous bytes at an even address")
    if dtype not in DTYPES:
        raise ValueError(f"dequant_q8_0 gives bfloat16, float16 or float32, not {dtype}")
    n_qblocks = packed.numel() // QBLOCK_BYTES
    if n_qblocks == 0 or why_not(packed.device):
        return reference(packed, dtype)
    n, k = packed.shape[0], packed.shape[1] // QBLOCK_BYTES * QBLOCK
    out = torch.empty(n, k, dtype=dtype, device=packed.device)
    grid = (-(-n_qblocks // TILE),)
    launch: Any = kernel[grid]
    with torch.cuda.device(packed.device) if packed.is_cuda else nullcontext():
        launch(
            packed.view(torch.int8),
            packed.view(-1).view(torch.float16),
            out,
            n_qblocks,
            QBLOCK=QBLOCK,
            QBLOCK_BYTES=QBLOCK_BYTES,
            TILE=TILE,
        )
    return out
