"""The Qwen3 decoder that turns token ids into prompt embeddings.

The embedding is the residual stream before the last layer (`hidden_states[-2]`), so the last layer,
the final norm and the language-model head are never built. Only real tokens are processed: with
causal attention, padding on the right would not change them.

The residual stream and norms are float32; linears and attention run in `compute_dtype`. Weights of
a layer may be elsewhere until it runs: `weights(name)` is entered around it.

Source: transformers `Qwen3Model`, as facts.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from zquant.layers.attention import attention
from zquant.layers.linear import QuantEmbedding, QuantLinear
from zquant.layers.norm import RMSNorm
from zquant.layers.rope import angles, rotate_half
from zquant.layers.swiglu import input_scale, swiglu
from zquant.models.config import TextEncoderConfig

__all__ = ["TextEncoder"]

Rope = tuple[Tensor, Tensor]


class SelfAttention(nn.Module):
    """Causal grouped-query attention with RMSNorm and rotation on q and k."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.head_dim
        self.head_dim = width
        self.q_proj = QuantLinear(hidden, config.n_heads * width)
        self.k_proj = QuantLinear(hidden, config.n_kv_heads * width)
        self.v_proj = QuantLinear(hidden, config.n_kv_heads * width)
        self.o_proj = QuantLinear(config.n_heads * width, hidden)
        self.q_norm = RMSNorm(width, config.norm_eps)
        self.k_norm = RMSNorm(width, config.norm_eps)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """`[1, T, hidden]` to `[1, T, hidden]`; the result keeps the input's scale."""
        scale = input_scale(x.dtype)
        heads = (-1, self.head_dim)
        q = rotate_half(self.q_norm(self.q_proj(x).unflatten(-1, heads), scale=scale), *rope)
        k = rotate_half(self.k_norm(self.k_proj(x).unflatten(-1, heads), scale=scale), *rope)
        v = self.v_proj(x).unflatten(-1, heads)
        out: Tensor = self.o_proj(attention(q, k, v, causal=True))
        return out


class MLP(nn.Module):
    """down( silu(gate x) * (up x) )."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.gate_proj = QuantLinear(config.hidden_size, config.intermediate_size)
        self.up_proj = QuantLinear(config.hidden_size, config.intermediate_size)
        self.down_proj = QuantLinear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        """`[1, T, hidden]` to `[1, T, hidden]` and its scale."""
        return swiglu(x, self.gate_proj, self.up_proj, self.down_proj)


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, rope: Rope, dtype: torch.dtype) -> Tensor:
        """float32 `[1, T, hidden]` to the same."""
        scale = input_scale(dtype)
        h = (self.input_layernorm(x) * scale).to(dtype)
        x = x + self.self_attn(h, rope).float() / scale
        h = (self.post_attention_layernorm(x) * scale).to(dtype)
        h, out_scale = self.mlp(h)
        out: Tensor = x + h.float() / out_scale
        return out


class Decoder(nn.Module):
    """The part of Qwen3's `model.` that is used."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.embed_tokens = QuantEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.n_layers - 1)])


class TextEncoder(nn.Module):
    """Token ids to prompt embeddings."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.weights: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext()
        self.model = Decoder(config)

    def forward(self, prompts: Sequence[Tensor]) -> list[Tensor]:
        """Embeddings of several prompts, whose weights are brought once for all.

        Args:
            prompts: int64 `[T]` token ids each, T >= 1, on one device.

        Returns:
            float32 `[T, hidden]` for each.
        """
        config = self.config
        longest = max(map(len, prompts))
        table = angles(torch.arange(longest), config.head_dim, config.rope_theta)
        table = table.to(prompts[0].device)
        cos, sin = table.cos(), table.sin()
        streams = [self.model.embed_tokens(ids)[None] for ids in prompts]
        for i, layer in enumerate(self.model.layers):
            with self.weights(f"model.layers.{i}"):
                for at, x in enumerate(streams):
                    n = x.shape[1]
                    streams[at] = layer(x, (cos[:n], sin[:n]), self.compute_dtype)
        return [x[0] for x in streams]
