"""RMSNorm over each head of q and k, then rotary position embedding, in place.

    y[d] = x[d] / sqrt(mean_d(x^2) + eps) * weight[d]        per token m and head, weight of q or k
    (y[2p], y[2p + 1]) -> (a cos - b sin, a sin + b cos)     a = y[2p], b = y[2p + 1],
                                                             cos, sin [m % L, p]

q, k and v of a token lie side by side; v is not touched. All arithmetic is float32, and the only
rounding is the cast at the end.

Source: Z-Image attention; RMSNorm is `zquant.layers.norm.rms_norm`, angles are those of
`zquant.layers.rope`, rotation as in RoFormer (arXiv 2104.09864).
"""

from typing import Any

import torch

from zquant_kernels.runtime import CompileCase, on_device, tl, triton, why_not

__all__ = ["COMPILE_CASES", "fused_qk", "kernel", "reference"]

TILE = 2048  # elements per program: whole heads of one token
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
REFERENCE_TOKENS = 256  # tokens whose float32 heads exist at a time in the reference
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COMPILE_CASES: list[CompileCase] = []


def reference(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> None:
    """Same contract as `fused_qk`, in plain torch, on any device."""
    weight = torch.stack((q_weight, k_weight))[:, None]  # [2, 1, head_dim]
    positions = torch.arange(len(qkv), device=qkv.device) % len(cos)
    for at in range(0, len(qkv), REFERENCE_TOKENS):
        rows = slice(at, at + REFERENCE_TOKENS)
        x = qkv[rows, :2].float()  # [M, 2, heads, head_dim]
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
        a, b = y.view(*y.shape[:-1], -1, 2).unbind(-1)
        c, s = (table[positions[rows]][:, None, None] for table in (cos, sin))
        qkv[rows, :2] = torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2)


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    qkv, q_weight, k_weight, cos, sin, L, heads, stride, eps,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One program computes `HEADS` heads of one token; `D` is a power of two that holds a head."""
    m = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]  # [HEADS, 1], q then k
    d = tl.arange(0, D)[None, :]  # [1, D]
    p = tl.arange(0, D // 2)[None, :]  # [1, D / 2]
    at = qkv + m * stride + h * HEAD_DIM + d  # [HEADS, D]
    mask = (h < 2 * heads) & (d < HEAD_DIM)
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)  # [HEADS]
    q_w = tl.load(q_weight + d, mask=d < HEAD_DIM, other=0.0)
    k_w = tl.load(k_weight + d, mask=d < HEAD_DIM, other=0.0)
    y = x * inverse[:, None] * tl.where(h < heads, q_w, k_w)
    a, b = tl.split(tl.reshape(y, (HEADS, D // 2, 2)))  # [HEADS, D / 2]
    angle = (m % L) * (HEAD_DIM // 2) + p
    c = tl.load(cos + angle, mask=p < HEAD_DIM // 2, other=0.0)
    s = tl.load(sin + angle, mask=p < HEAD_DIM // 2, other=0.0)
    y = tl.reshape(tl.join(a * c - b * s, a * s + b * c), (HEADS, D))
    tl.store(at, y.to(qkv.dtype.element_ty), mask=mask)


COMPILE_CASES += [
    CompileCase(
        kernel=kernel,
        types={
            **dict.fromkeys(("q_weight", "k_weight", "cos", "sin"), "*fp32"), "qkv": qkv,
            "L": "i32", "heads": "i32", "stride": "i32", "eps": "fp32",
        },
        constants={"HEAD_DIM": 128, "HEADS": TILE // 128, "D": 128},
        options=OPTIONS,
        aligned=("qkv", "q_weight", "k_weight", "cos", "sin", "stride"),
    )
    for qkv in ("*bf16", "*fp16", "*fp32")
]  # fmt: skip


def fused_qk(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> None:
    """Normalize and rotate q and k in place.

    Args:
        qkv: bfloat16, float16 or float32 `[M, 3, heads, head_dim]`, head_dim even and at most
            2048; a token's q, k and v are contiguous, tokens may be further apart. q and k are
            overwritten.
        q_weight: float32 `[head_dim]`, contiguous.
        k_weight: likewise.
        cos: float32 `[L, head_dim / 2]`, contiguous, M a multiple of L: token m has position
            m % L.
        sin: likewise.
        eps: added to the mean squares.

    Raises:
        ValueError: an argument is none of these.
    """
    _check(qkv, q_weight, k_weight, cos, sin)
    m, _, heads, head_dim = qkv.shape
    if m == 0 or why_not(qkv.device):
        reference(qkv, q_weight, k_weight, cos, sin, eps)
        return
    d = triton.next_power_of_2(head_dim)
    launch: Any = kernel[(m, -(-2 * heads // (TILE // d)))]
    with on_device(qkv):
        launch(
            qkv, q_weight, k_weight, cos, sin, len(cos), heads, qkv.stride(0), eps,
            HEAD_DIM=head_dim, HEADS=TILE // d, D=d, **OPTIONS,
        )  # fmt: skip


def _check(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> None:
    """Raise ValueError for what the kernel does not expect."""
    if qkv.ndim != 4 or qkv.dtype not in DTYPES or qkv.shape[1] != 3 or 0 in qkv.shape[2:]:
        raise ValueError(
            "fused_qk needs bfloat16, float16 or float32 [M, 3, heads, head_dim];"
            f" got {qkv.dtype} {list(qkv.shape)}"
        )
    m, _, heads, head_dim = qkv.shape
    if head_dim % 2 or head_dim > TILE:
        raise ValueError(f"fused_qk needs an even head_dim of at most {TILE}; got {head_dim}")
    packed = (heads * head_dim, head_dim, 1)
    if qkv.stride()[1:] != packed or (m > 1 and qkv.stride(0) < 3 * packed[0]):
        raise ValueError(
            f"fused_qk needs q, k and v of a token contiguous; got strides {qkv.stride()}"
            f" for {list(qkv.shape)}"
        )
    length = len(cos) if cos.ndim else 0
    if length == 0 or m % length:
        raise ValueError(f"fused_qk needs M to be a multiple of L; got M = {m} and L = {length}")
    for name, tensor, shape in (
        ("q_weight", q_weight, (head_dim,)),
        ("k_weight", k_weight, (head_dim,)),
        ("cos", cos, (length, head_dim // 2)),
        ("sin", sin, (length, head_dim // 2)),
    ):
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
            raise ValueError(
                f"fused_qk needs {name} float32 {list(shape)};"
                f" got {tensor.dtype} {list(tensor.shape)}"
            )
        if not tensor.is_contiguous() or tensor.device != qkv.device:
            raise ValueError(
                f"fused_qk needs {name} contiguous and on {qkv.device};"
                f" got strides {tensor.stride()} on {tensor.device}"
            )
