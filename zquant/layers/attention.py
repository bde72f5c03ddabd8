"""Scaled dot-product attention over `[B, L, heads, head_dim]`, never with a mask tensor.

torch's own kernels do the work (flash or memory-efficient on a GPU, blocked on a CPU), unless int8
scores are asked for. Sequences here have no padding to hide, and causal order needs no mask tensor
either.
"""

import torch.nn.functional as F
from torch import Tensor
from zquant_kernels.attention_int8 import attention_int8

__all__ = ["attention"]


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, int8: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v.

    Args:
        q: `[B, L, heads, head_dim]`.
        k: `[B, L, kv_heads, head_dim]`; query head i uses kv head i // (heads / kv_heads).
        v: as `k`.
        causal: position l sees positions up to l only.
        int8: multiply q and k as int8 (`zquant_kernels.attention_int8`); not with `causal`.

    Returns:
        `[B, L, heads * head_dim]` in the dtype of `v`.
    """
    if int8:
        assert not causal
        return attention_int8(q, k, v).flatten(2)
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
