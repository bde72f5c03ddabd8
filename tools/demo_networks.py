"""The demo model while it is trained: zquant's own networks with trainable weights.

The modules are those of `zquant.models`, so training and painting share the forward pass; only the
packed linears are exchanged for torch's, and a block's fused kernels, which know no gradients and
one timestep only, for plain operations (`_run_block`). What is here besides is the batch: many
captions and many timesteps at once, which the engine never needs.
"""

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from demo_scenes import all_texts
from torch import Tensor, nn

from zquant import sampling
from zquant.layers.attention import attention
from zquant.layers.linear import QuantEmbedding, QuantLinear
from zquant.layers.norm import RMSNorm
from zquant.layers.rope import angles
from zquant.models.config import DiTConfig, TextEncoderConfig, VAEConfig
from zquant.models.dit import DiT, patchify, unpatchify
from zquant.models.dit_block import Block, Rope
from zquant.models.text_encoder import TextEncoder
from zquant.models.tokenizer import NORMAL, Tokenizer, Vocabulary, prompt_ids
from zquant.models.vae import VAE

__all__ = ["CAPTION_TOKENS", "DIT", "STEPS", "VAE_CONFIG", "Painter", "cut_vocabulary"]
__all__ += ["new_vae", "reseed", "text_config"]

CAPTION_TOKENS = 32  # one multiple of the DiT's padding; every caption of the grammar fits
STEPS, SHIFT = 8, 3.0

VAE_CONFIG = VAEConfig(
    in_channels=3,
    latent_channels=16,
    block_out_channels=(16, 32, 64, 64),
    layers_per_block=1,
    norm_groups=8,
    use_quant_conv=False,
    scaling_factor=0.3611,
    shift_factor=0.1159,
)
DIT = DiTConfig(
    dim=192,
    n_layers=6,
    n_refiner_layers=1,
    n_heads=3,
    in_channels=16,
    patch_size=2,
    cap_feat_dim=256,
    axes_dims=(16, 24, 24),
    rope_theta=256.0,
    norm_eps=1e-5,
    t_scale=1000.0,
)


def text_config(vocab_size: int) -> TextEncoderConfig:
    """The text encoder; its last layer is there for the file format and never runs, as in Qwen3."""
    return TextEncoderConfig(
        vocab_size=vocab_size,
        hidden_size=DIT.cap_feat_dim,
        intermediate_size=512,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        head_dim=64,
        rope_theta=1e6,
        norm_eps=1e-6,
    )


def cut_vocabulary() -> Vocabulary:
    """Qwen's vocabulary without what the grammar never uses; ids are renumbered.

    All single bytes stay, so any prompt can be encoded. A merge stays if a token of the grammar is
    built from it; their order is kept, so captions fall into the same tokens as with the whole
    vocabulary.
    """
    whole = Vocabulary.bundled()
    tokenizer = Tokenizer(whole)
    pairs = {a + b: (a, b) for a, b in reversed(whole.merges)}
    wanted: set[str] = set()

    def want(token: str) -> None:
        if token in wanted:
            return
        wanted.add(token)
        for part in pairs.get(token, ()):
            want(part)

    for text in all_texts():
        for i in prompt_ids(tokenizer, text).ids:
            if whole.types[i] == NORMAL:
                want(whole.tokens[i])
    tokens = list(whole.tokens[:256])  # the bytes
    merges = []
    for a, b in whole.merges:
        if a + b in wanted and pairs[a + b] == (a, b):
            merges.append((a, b))
            tokens.append(a + b)
    added = [i for i, kind in enumerate(whole.types) if kind != NORMAL]
    types = [NORMAL] * len(tokens) + [whole.types[i] for i in added]
    return Vocabulary(tokens=tokens + [whole.tokens[i] for i in added], merges=merges, types=types)


def reseed(seed: int) -> random.Random:
    """Seed torch, and a generator for scenes."""
    torch.manual_seed(seed)
    return random.Random(seed)


def new_vae() -> VAE:
    """The autoencoder with torch's initial weights; gradients need no settings of ours."""
    return VAE(VAE_CONFIG).float()


def _trainable(module: nn.Module) -> nn.Module:
    """Exchange packed linears for torch's, and set initial weights."""
    for owner in list(module.modules()):
        for name, child in list(owner.named_children()):
            n_in, n_out = getattr(child, "in_features", 0), getattr(child, "out_features", 0)
            new: nn.Module
            if isinstance(child, QuantLinear):
                new = nn.Linear(n_in, n_out, bias=child.bias is not None)
                nn.init.normal_(new.weight, std=n_in**-0.5)
                if new.bias is not None:
                    nn.init.zeros_(new.bias)
            elif isinstance(child, QuantEmbedding):
                new = nn.Embedding(n_out, n_in)
            else:
                continue
            owner._modules[name] = new  # a ModuleList has no other way to name an entry
        if isinstance(owner, RMSNorm):
            nn.init.ones_(owner.weight)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    return module


class Painter(nn.Module):
    """Text encoder and DiT, trained together."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.tokenizer = Tokenizer(vocabulary)
        self.text_encoder = TextEncoder(text_config(len(vocabulary.tokens)))
        self.dit = DiT(DIT)
        _trainable(self)
        for token in (self.dit.x_pad_token, self.dit.cap_pad_token):
            nn.init.normal_(token, std=0.02)
        for name, parameter in self.dit.named_parameters():
            if "adaLN_modulation" in name or "all_final_layer" in name:
                nn.init.zeros_(parameter)
        with torch.no_grad():  # gates open a little, or the blocks learn nothing at first
            for block in [*self.dit.noise_refiner, *self.dit.layers]:
                bias = block.adaLN_modulation[0].bias.view(4, -1)
                bias[1::2] = 0.25
        self.ropes = self.dit.ropes(CAPTION_TOKENS, 16, 16, torch.device("cpu"))

    def ids(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """int64 ids and bool mask `[B, CAPTION_TOKENS]` of prompts that fit."""
        ids = torch.zeros(len(prompts), CAPTION_TOKENS, dtype=torch.long)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, prompt in enumerate(prompts):
            row = prompt_ids(self.tokenizer, prompt).ids
            assert len(row) <= CAPTION_TOKENS, prompt
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        return ids, mask

    def caption(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Refined caption tokens float32 `[B, CAPTION_TOKENS, dim]`; see `ids`."""
        config = self.text_encoder.config
        table = angles(torch.arange(CAPTION_TOKENS), config.head_dim, config.rope_theta)
        x = self.text_encoder.model.embed_tokens(ids)
        for layer in self.text_encoder.model.layers:
            x = layer(x, (table.cos(), table.sin()), torch.float32)
        for layer in self.dit.cap_embedder:
            x = layer(x)
        x = torch.where(mask[..., None], x, self.dit.cap_pad_token)
        for block in self.dit.context_refiner:
            x = _run_block(block, x, self.ropes[2], (1.0, 1.0, 1.0, 1.0))
        return x

    def velocity(self, latents: Tensor, sigmas: Tensor, caption: Tensor) -> Tensor:
        """Change of the latents per sigma, float32 `[B, 16, 16, 16]`, at `sigmas [B]`."""
        dit, (rope, image_rope, _) = self.dit, self.ropes
        c = dit.t_embedder((1 - sigmas) * dit.config.t_scale)
        x = next(iter(dit.all_x_embedder.values()))(patchify(latents))
        n_image = x.shape[1]
        for block in dit.noise_refiner:
            x = _run_block(block, x, image_rope, _modulation(block, c))
        x = torch.cat((x, caption), dim=1)
        for block in dit.layers:
            x = _run_block(block, x, rope, _modulation(block, c))
        final = next(iter(dit.all_final_layer.values()))
        x = final(x[:, :n_image], final.modulate(c)[:, None])
        return -unpatchify(x, *latents.shape[-2:])

    def loss(self, clean: Tensor, prompts: Sequence[str], generator: torch.Generator) -> Tensor:
        """Flow-matching loss, timesteps spread as the sampler's are."""
        noise = torch.randn(clean.shape, generator=generator)
        # stratified over the batch: the same mean, less noise
        u = (
            torch.randperm(len(clean), generator=generator) + torch.rand((), generator=generator)
        ) / len(clean)
        sigmas = SHIFT * u / (1 + (SHIFT - 1) * u)
        s = sigmas[:, None, None, None]
        velocity = self.velocity(
            (1 - s) * clean + s * noise, sigmas, self.caption(*self.ids(prompts))
        )
        return F.mse_loss(velocity, noise - clean)

    @torch.no_grad()
    def paint(self, prompts: Sequence[str], seed: int = 0) -> Tensor:
        """Final latents `[B, 16, 16, 16]`, by the engine's sampler."""
        caption = self.caption(*self.ids(prompts))
        schedule = sampling.sigmas(STEPS, SHIFT)
        x = torch.cat(
            [sampling.initial_noise((1, 16, 16, 16), seed + i) for i in range(len(prompts))]
        )

        def velocity(x: Tensor, step: int) -> Tensor:
            return self.velocity(x, schedule[step].expand(len(x)), caption)

        return sampling.denoise(velocity, x, schedule, lambda *_: None)


def _run_block(block: Block, x: Tensor, rope: Rope, modulation: Sequence[Tensor | float]) -> Tensor:
    """`Block.forward` of `x [B, L, dim]` with gradients; modulation `[B, 1, dim]` or numbers."""
    scale_msa, gate_msa, scale_mlp, gate_mlp = modulation
    attend, ffn = block.attention, block.feed_forward
    h, heads = block.attention_norm1(x) * scale_msa, attend.shape[1:]
    q, k, v = (linear(h).unflatten(-1, heads) for linear in (attend.to_q, attend.to_k, attend.to_v))
    q, k = _rotate_pairs(attend.norm_q(q), *rope), _rotate_pairs(attend.norm_k(k), *rope)
    x = x + block.attention_norm2(attend.to_out[0](attention(q, k, v))) * gate_msa
    h = block.ffn_norm1(x) * scale_mlp
    out: Tensor = x + block.ffn_norm2(ffn.w2(F.silu(ffn.w1(h)) * ffn.w3(h))) * gate_mlp
    return out


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs `(2p, 2p + 1)` of `x [B, L, heads, d]` by `cos, sin [L, d / 2]`."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def _modulation(block: Block, c: Tensor) -> tuple[Tensor, ...]:
    m = block.adaLN_modulation[0](c).unflatten(-1, (4, 1, -1))  # [B, 4, 1, dim]
    return 1 + m[:, 0], m[:, 1].tanh(), 1 + m[:, 2], m[:, 3].tanh()
