"""Q8_0: 32 int8 weights share one float16 scale; 34 bytes.

    byte 0 half d, 2 int8 q[32]
    w[e] = d * q[e]

Source: ggml `block_q8_0`, `quantize_row_q8_0_ref`, `dequantize_row_q8_0`.
"""

import numpy as np
import numpy.typing as npt
import torch

from zquant.quant.simple import inverse

__all__ = ["dequantize", "quantize"]

# truncating v + this * sign(v) rounds halves away from zero and nothing else up; 0.5 itself would
# carry 0.49999997 to 1
BELOW_HALF = float(np.nextafter(np.float32(0.5), np.float32(0)))


def quantize(
    weights: npt.NDArray[np.float32],
    importance: npt.NDArray[np.float32] | None = None,  # noqa: ARG001
) -> npt.NDArray[np.uint8]:
    """Quantize float32 `[N, K]`, contiguous, K a multiple of 32, to uint8 `[N, 34*K/32]`.

    Rounding needs no search: `importance` is ignored, as in ggml.
    """
    qblocks = torch.from_numpy(weights).reshape(-1, 32)
    scratch = qblocks.abs()
    d = torch.div(scratch.amax(dim=1, keepdim=True), torch.tensor(127.0))
    q = torch.mul(qblocks, inverse(d), out=scratch)
    q.add_(torch.copysign(torch.tensor(BELOW_HALF), q))
    packed = torch.empty(len(qblocks), 34, dtype=torch.uint8)
    packed.view(torch.float16)[:, :1].copy_(d)
    packed.view(torch.int8)[:, 2:].copy_(q)
    result: npt.NDArray[np.uint8] = packed.numpy()
    return result.reshape(len(weights), -1)


def dequantize(qblocks: torch.Tensor, out: torch.Tensor) -> None:
    """Decode uint8 `[n, 34]` into float32 `out [n, 32]`, both contiguous on one device."""
    d = qblocks[:, :2].contiguous().view(torch.float16).float()
    out.copy_(qblocks.view(torch.int8)[:, 2:]).mul_(d)
