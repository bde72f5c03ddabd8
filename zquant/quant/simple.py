"""What the 32-weight types Q4_0, Q5_0 and Q8_0 share: one float16 scale, signed largest weight.

Source: ggml `quantize_row_q4_0_ref` and its siblings.
"""

import torch

__all__ = ["inverse", "signed_levels"]


def inverse(d: torch.Tensor) -> torch.Tensor:
    """1/d, and 0 where d is 0; one rounding."""
    return torch.div(torch.tensor(1.0), d).masked_fill_(d == 0, 0)


def signed_levels(qblocks: torch.Tensor, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and levels of a symmetric type with levels 0..2*half-1, `half` meaning 0.

    The weight of largest magnitude is stored exactly as level 0, so the scale carries its sign.

    Args:
        qblocks: float32 `[n, 32]`, CPU, contiguous.
        half: 8 for four bits, 16 for five.

    Returns:
        d, float32 `[n, 1]`, and q, uint8 `[n, 32]`.
    """
    lo, hi = qblocks.amin(dim=1, keepdim=True), qblocks.amax(dim=1, keepdim=True)
    largest = torch.where(hi > -lo, hi, lo)
    tied = torch.nonzero((hi == -lo).flatten()).flatten()
    if tied.numel():  # the first of equal magnitudes decides the sign
        rows = qblocks[tied]
        largest[tied] = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    # ggml's largest starts as +0; the sum turns a -0 that came first into that
    d = torch.div(largest + 0.0, torch.tensor(-float(half)))
    q = (qblocks * inverse(d)).add_(half + 0.5)
    return d, q.to(torch.uint8).clamp_(max=2 * half - 1)
