"""RMSNorm, computed in float32.

out = x / sqrt(mean(x^2) + eps) * weight
"""

import torch
from torch import Tensor, nn

__all__ = ["RMSNorm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis; float32 inside, float32 `[..., D]` out."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class RMSNorm(nn.Module):
    """RMSNorm over the last axis.

    Attributes:
        weight: float32 `[dim]`.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        """Normalize `x [..., dim]` of any dtype; float32 out.

        `scale` tells that `x` is `scale` times the true activation: a norm forgets a factor except
        for `eps`, which is scaled along.
        """
        return rms_norm(x, self.weight, self.eps * scale**2)
