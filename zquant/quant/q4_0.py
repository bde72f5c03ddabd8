"""Q4_0: 32 4-bit weights share one float16 scale; 18 bytes.

    byte 0 half d, 2 qs[16]
    w[e] = d * (q[e] - 8), q[e] = low nibble of qs[e] for e < 16, high nibble of qs[e-16] otherwise

Source: ggml `block_q4_0`, `quantize_row_q4_0_ref`, `dequantize_row_q4_0`.
"""

import numpy as np
import numpy.typing as npt
import torch

from zquant.quant.simple import signed_levels

__all__ = ["dequantize", "quantize"]

HALF = 8  # the level that means 0


def quantize(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Quantize float32 `[N, K]`, contiguous, K a multiple of 32, to uint8 `[N, 18*K/32]`."""
    d, q = signed_levels(torch.from_numpy(weights).reshape(-1, 32), HALF)
    packed = torch.empty(len(q), 18, dtype=torch.uint8)
    packed.view(torch.float16)[:, :1].copy_(d)
    torch.bitwise_or(q[:, :16], q[:, 16:] << 4, out=packed[:, 2:])
    result: npt.NDArray[np.uint8] = packed.numpy()
    return result.reshape(len(weights), -1)


def dequantize(qblocks: torch.Tensor, out: torch.Tensor) -> None:
    """Decode uint8 `[n, 18]` into float32 `out [n, 32]`, both contiguous on one device."""
    d = qblocks[:, :2].contiguous().view(torch.float16).float()
    qs = qblocks[:, 2:]
    q = torch.empty(len(qblocks), 2, 16, dtype=torch.uint8, device=qblocks.device)
    torch.bitwise_and(qs, 15, out=q[:, 0])
    torch.bitwise_right_shift(qs, 4, out=q[:, 1])
    out.copy_(q.view(torch.int8).sub_(HALF).view(-1, 32)).mul_(d)
