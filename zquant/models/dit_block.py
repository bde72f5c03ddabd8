"""One block of the Z-Image transformer, in the steps of its fused kernels.

    x += gate_msa * norm2( out( attention( rope(norm(qkv( norm1(x) * scale_msa )) ))))
    x += gate_mlp * ffn_norm2( w2( silu(w1 h) * w3 h )),        h = ffn_norm1(x) * scale_mlp

The residual stream is float32. q, k, v share one input, so do w1 and w3; each input is either in
the compute dtype (exact) or int8 tokens. Attribute names are the checkpoint's.

Source: Z-Image official repository and diffusers `ZImageTransformerBlock`, as facts.
"""

from collections.abc import Sequence
from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from zquant_kernels.fused_norm import fused_norm
from zquant_kernels.fused_qk import fused_qk
from zquant_kernels.fused_residual import Norms, fused_residual, residual

from zquant.layers.attention import attention
from zquant.layers.compute import Compute, QuantTokens, Tokens, as_tokens, enter, split
from zquant.layers.linear import QuantLinear
from zquant.layers.norm import RMSNorm
from zquant.layers.swiglu import input_scale, swiglu
from zquant.models.config import DiTConfig

__all__ = ["EXACT", "Block", "Rope", "ffn_chunk", "why_exact"]

FFN_TOKENS = 4608  # of two bytes: a picture of 1024x1024 with its prompt is one chunk
EXACT = (  # (block, input of its linears, reason): never int8, whatever is asked
    ("context_refiner.*", "*", "runs once per picture: exact costs nothing"),
)

Rope = tuple[Tensor, Tensor]  # cos, sin: float32 [L, head_dim / 2]


def ffn_chunk(dtype: torch.dtype) -> int:
    """Most tokens that go through the feed-forward at a time."""
    return FFN_TOKENS * 2 // dtype.itemsize


def why_exact(block: str, key: str) -> str:
    """Why the linears behind input `key` of a block are never int8; empty when they may be."""
    for pattern, keys, reason in EXACT:
        if fnmatch(block, pattern) and fnmatch(key, keys):
            return reason
    return ""


class Attention(nn.Module):
    """Full self-attention with RMSNorm and rotation on q and k."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.shape = (3, config.n_heads, config.head_dim)
        self.to_q, self.to_k, self.to_v = (QuantLinear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([QuantLinear(dim, dim)])
        self.norm_q = RMSNorm(config.head_dim, config.norm_eps)
        self.norm_k = RMSNorm(config.head_dim, config.norm_eps)

    # three steps instead of one, so that what a step reads is gone before the next one allocates

    def project(self, x: Tokens, compute: Compute) -> Tensor:
        """`[M, dim]` to q, k and v, `[M, 3, heads, head_dim]`."""
        m = len(x.q if isinstance(x, QuantTokens) else x)
        qkv = self.norm_q.weight.new_empty(m, *self.shape, dtype=compute.dtype)
        for i, linear in enumerate((self.to_q, self.to_k, self.to_v)):
            linear(x, out=qkv[:, i].flatten(1))
        return qkv

    def attend(self, qkv: Tensor, rope: Rope, compute: Compute) -> Tensor:
        """q, k and v, rotated in place, M a multiple of the rope's L, to `[M, dim]`."""
        eps = self.norm_q.eps * input_scale(compute.dtype) ** 2
        fused_qk(qkv, self.norm_q.weight, self.norm_k.weight, *rope, eps)
        q, k, v = qkv.view(-1, len(rope[0]), *self.shape).unbind(2)
        return attention(q, k, v, int8=compute.int8_attention).flatten(0, 1)

    def output(self, h: Tensor, group: int | None) -> Tensor:
        """`[M, dim]` to the same; `group` is of the tokens that enter, None where it is exact."""
        out: Tensor = self.to_out[0](enter(h, group))
        return out


class FeedForward(nn.Module):
    """w2( silu(w1 x) * (w3 x) )."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.w1 = QuantLinear(config.dim, config.hidden_dim)
        self.w2 = QuantLinear(config.hidden_dim, config.dim)
        self.w3 = QuantLinear(config.dim, config.hidden_dim)

    def forward(self, x: Tokens, group: int | None) -> tuple[Tensor, float]:
        """`[M, dim]` to `[M, dim]` and its scale; `group` as in `swiglu`.

        Tokens go through in equal chunks of at most `ffn_chunk`, since the inner activations of a
        large picture would be the largest of all. Chunks follow from the picture's size alone.
        """
        chunks = split(x, ffn_chunk(x.dtype))
        if len(chunks) == 1:
            return swiglu(x, self.w1, self.w3, self.w2, group)
        m = len(x.q if isinstance(x, QuantTokens) else x)
        out = torch.empty(m, self.w2.out_features, dtype=x.dtype, device=self.w2.weight.device)
        for chunk, rows in zip(chunks, out.tensor_split(len(chunks)), strict=True):
            _, scale = swiglu(chunk, self.w1, self.w3, self.w2, group, out=rows)
        return out, scale


class Block(nn.Module):
    """One transformer block: the unit of streaming.

    Attributes:
        groups: input of its linears ("qkv", "out", "w13", "w2") -> rotation of the tokens there,
            None where they stay in the compute dtype.
    """

    def __init__(self, config: DiTConfig, *, modulated: bool) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2 = (
            RMSNorm(config.dim, config.norm_eps) for _ in range(4)
        )
        if modulated:
            projection = QuantLinear(config.adaln_dim, 4 * config.dim, bias=True)
            self.adaLN_modulation = nn.ModuleList([projection])
        self.groups: dict[str, int | None] = dict.fromkeys(("qkv", "out", "w13", "w2"))

    def use(self, compute: Compute, name: str) -> None:
        """Prepare for that way of computing; `name` is the block's in the checkpoint."""
        for key, linears in self.inputs().items():
            exact = not compute.int8 or why_exact(name, key) != ""
            if exact or not all(linear.fits_int8 for linear in linears):
                self.groups[key] = None
                continue
            self.groups[key] = group = compute.group(linears[0].in_features)
            for linear in linears:
                linear.use_int8(group)

    def inputs(self) -> dict[str, list[QuantLinear]]:
        """The linears that share each input."""
        attention, ffn = self.attention, self.feed_forward
        out = attention.to_out[0]
        assert isinstance(out, QuantLinear)
        return {
            "qkv": [attention.to_q, attention.to_k, attention.to_v],
            "out": [out],
            "w13": [ffn.w1, ffn.w3],
            "w2": [ffn.w2],
        }

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        modulation: Sequence[Tensor] | None,
        compute: Compute,
        sums: Tensor | None = None,
    ) -> Tensor:
        """One block.

        Args:
            x: float32 `[B, L, dim]`, contiguous, the residual stream; overwritten and returned.
            rope: tables of `L` tokens.
            modulation: four float32 `[dim]` vectors, or None for the context refiner.
            compute: of the linears and the attention.
            sums: float32 `[2]`, contiguous; gets the sum of the stream after attention and after
                the feed-forward, which is finite only if every number is.
        """
        factor = input_scale(compute.dtype)
        scale_msa, gate_msa, scale_mlp, gate_mlp = modulation or (None,) * 4
        groups = self.groups if compute.int8 else dict.fromkeys(self.groups)
        eps, r = self.attention_norm1.eps, x.view(-1, x.shape[-1])
        dtype, group = _entry(compute, groups["qkv"])
        weight = self.attention_norm1.weight
        # temporaries have no name here: each is gone as soon as the step that reads it is done
        qkv = self.attention.project(
            as_tokens(
                *fused_norm(r, weight, scale_msa, eps, dtype, factor=factor, group=group),
                group,
                compute.dtype,
            ),
            compute,
        )
        branch = self.attention.attend(qkv, rope, compute)
        del qkv
        branch = self.attention.output(branch, groups["out"])
        norms = Norms(
            h_weight=self.attention_norm2.weight,
            gate=gate_msa,
            weight=self.ffn_norm1.weight,
            modulation=scale_mlp,
            h_eps=eps * factor**2,
            eps=eps,
            factor=factor,
        )
        dtype, group = _entry(compute, groups["w13"])
        _, values, scale = fused_residual(r, branch, norms, dtype, group=group, out=r)
        if sums is not None:
            torch.sum(r, dim=(0, 1), out=sums[0])
        del branch
        tokens = as_tokens(values, scale, group, compute.dtype)
        del values, scale
        branch, out_scale = self.feed_forward(tokens, groups["w2"])
        h_eps = eps * out_scale**2
        residual(r, branch, self.ffn_norm2.weight, gate_mlp, h_eps, out=r)
        if sums is not None:
            torch.sum(r, dim=(0, 1), out=sums[1])
        return x


def _entry(compute: Compute, group: int | None) -> tuple[torch.dtype, int]:
    """Dtype and rotation of tokens whose linears have that group."""
    return (compute.dtype, 0) if group is None else (torch.int8, group)
