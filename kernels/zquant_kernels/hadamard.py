"""Walsh-Hadamard rotation of groups of a row, which spreads outliers over their group.

    out[m, g + j] = 1 / sqrt(G) * sum_i (-1)^popcount(i & j) * x[m, g + i]        i, j in 0..G-1

G is a power of two, g a multiple of it. The matrix is symmetric and orthogonal: rotating twice
gives `x` back, and rotated activations times rotated weights are the product of the plain ones.
Computed as log2(G) stages of sums and differences in float32, then one product, in this order on
every device, so kernels and reference agree bit for bit.

Source: QuaRot (arXiv 2404.00456); the fast transform is textbook.
"""

import math

import torch

from zquant_kernels.runtime import tl, triton

__all__ = ["GROUPS", "group_of", "reference", "rotate"]

GROUPS = (256, 64)  # what the kernels are compiled for, best first; 64 is for small models


def group_of(n_columns: int) -> int:
    """The widest group that divides rows of `n_columns`; 0 is no rotation."""
    return next((group for group in GROUPS if n_columns % group == 0), 0)


def reference(x: torch.Tensor, group: int) -> torch.Tensor:
    """Same contract as `rotate`, in plain torch, on any device: float32 `[..., K]`."""
    shape, h = x.shape, 1
    while h < group:
        pairs = x.reshape(-1, 2, h)
        x = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), dim=1)
        h *= 2
    return x.reshape(shape) * (1 / math.sqrt(group))


@triton.jit
def butterflies(x, N: tl.constexpr, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rotate the columns of `x [N, L]`, N a power of two up to 16, without the final product."""
    for stage in tl.static_range(4):
        if 2**stage < N:
            pairs = tl.reshape(x, (N // 2 ** (stage + 1), 2, 2**stage, L))
            a, b = tl.split(tl.permute(pairs, (0, 2, 3, 1)))
            x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 3, 1, 2)), (N, L))
    return x


@triton.jit
def rotate(x, ROWS: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rotate float32 `x [ROWS, K]`, K a power of two and a multiple of GROUP, 16 to 256.

    What is added is put first: Triton keeps the first dimension in a thread's registers and spreads
    the last over threads, so threads exchange values once between the two halves of the stages.
    """
    R: tl.constexpr = ROWS * K // GROUP
    H: tl.constexpr = GROUP // 16
    x = tl.permute(tl.reshape(x, (R, H, 16)), (2, 0, 1))
    x = butterflies(tl.reshape(x, (16, R * H)), 16, R * H)
    x = tl.permute(tl.reshape(x, (16, R, H)), (2, 1, 0))
    x = butterflies(tl.reshape(x, (H, R * 16)), H, R * 16)
    x = tl.permute(tl.reshape(x, (H, R, 16)), (1, 0, 2))
    return tl.reshape(x, (ROWS, K)) * (1 / GROUP**0.5)
