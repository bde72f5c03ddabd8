"""Q5_0: 32 5-bit weights share one float16 scale; 22 bytes.

    byte 0 half d, 2 u32 qh, 6 qs[16]
    w[e] = d * (q[e] - 16), q[e] = nibble as in Q4_0, plus 16 if bit e of qh is set

Source: ggml `block_q5_0`, `quantize_row_q5_0_ref`, `dequantize_row_q5_0`.
"""

import numpy as np
import numpy.typing as npt
import torch

from zquant.quant.simple import signed_levels

__all__ = ["dequantize", "quantize"]

HALF = 16  # the level that means 0


def quantize(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Quantize float32 `[N, K]`, contiguous, K a multiple of 32, to uint8 `[N, 22*K/32]`."""
    d, q = signed_levels(torch.from_numpy(weights).reshape(-1, 32), HALF)
    packed = torch.empty(len(q), 22, dtype=torch.uint8)
    packed.view(torch.float16)[:, :1].copy_(d)
    fifth = np.packbits((q > 15).numpy(), axis=1, bitorder="little")
    packed[:, 2:6].copy_(torch.from_numpy(fifth))
    torch.bitwise_or(q[:, :16] & 15, q[:, 16:] << 4, out=packed[:, 6:])
    result: npt.NDArray[np.uint8] = packed.numpy()
    return result.reshape(len(weights), -1)


def dequantize(qblocks: torch.Tensor, out: torch.Tensor) -> None:
    """Decode uint8 `[n, 22]` into float32 `out [n, 32]`, both contiguous on one device."""
    d = qblocks[:, :2].contiguous().view(torch.float16).float()
    bits = torch.arange(8, dtype=torch.uint8, device=qblocks.device)
    fifth = (qblocks[:, 2:6, None] >> bits).bitwise_and_(1).bitwise_left_shift_(4)  # [n, 4, 8]
    q = fifth.view(-1, 2, 16)
    q[:, 0].bitwise_or_(qblocks[:, 6:] & 15)
    q[:, 1].bitwise_or_(qblocks[:, 6:] >> 4)
    out.copy_(q.view(torch.int8).sub_(HALF).view(-1, 32)).mul_(d)
