"""The FLUX autoencoder: latents to pictures and back.

Decoder: conv_in, a middle with one single-head attention, then per level `layers_per_block + 1`
residual blocks and a doubling, and GroupNorm, SiLU, conv_out. The encoder mirrors it. Attribute
names are the checkpoint's (diffusers). `quant_conv`s exist in other autoencoders only.

Latents inside the sampler are `(z - shift_factor) * scaling_factor`.

Source: diffusers `AutoencoderKL`, as facts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zquant_kernels.groupnorm_silu import groupnorm_silu

from zquant.models.config import VAEConfig

__all__ = ["VAE"]

NORM_EPS = 1e-6


def _conv(c_in: int, c_out: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, size, padding=size // 2)


def _norm_silu(norm: nn.GroupNorm, x: Tensor, *, reuse: bool = False) -> Tensor:
    """silu(norm(x)) in one pass, in the memory of `x` where nobody else reads it."""
    x = x.contiguous()
    out = x if reuse and not x.requires_grad else None  # gradients read it
    return groupnorm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, out=out)


class ResnetBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))))))."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=NORM_EPS)
        self.conv1 = _conv(c_in, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=NORM_EPS)
        self.conv2 = _conv(c_out, c_out)
        if c_in != c_out:
            self.conv_shortcut = _conv(c_in, c_out, 1)
        self.same = c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        """`[B, c_in, H, W]` to `[B, c_out, H, W]`."""
        h = self.conv1(_norm_silu(self.norm1, x))
        h = self.conv2(_norm_silu(self.norm2, h, reuse=True))
        out: Tensor = h.add_(x if self.same else self.conv_shortcut(x))
        return out


class AttentionBlock(nn.Module):
    """One-head self-attention over all positions, added to its input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same."""
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # [B, 1, H * W, C]
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        out: Tensor = x + self.to_out[0](h)[:, 0].transpose(1, 2).view_as(x)
        return out


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same."""
        out: Tensor = self.resnets[1](self.attentions[0](self.resnets[0](x)))
        return out


class Resample(nn.Module):
    """Doubling (nearest, then conv) or halving (conv, stride 2, padded right and below)."""

    def __init__(self, channels: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        stride, padding = (1, 1) if up else (2, 0)
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, 2H, 2W]` or `[B, C, H / 2, W / 2]`."""
        x = F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1))
        out: Tensor = self.conv(x)
        return out


class Level(nn.Module):
    """The residual blocks of one resolution and the change to the next."""

    def __init__(
        self, c_in: int, c_out: int, n_resnets: int, groups: int, *, up: bool, resample: bool
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(n_resnets)]
        )
        samplers = nn.ModuleList([Resample(c_out, up=up)] if resample else [])
        setattr(self, "upsamplers" if up else "downsamplers", samplers)
        self.steps = [*self.resnets, *samplers]

    def forward(self, x: Tensor) -> Tensor:
        """Run the level."""
        for step in self.steps:
            x = step(x)
        return x


class Decoder(nn.Module):
    """Latents to picture."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        groups, n = config.norm_groups, config.layers_per_block + 1
        channels = list(reversed(config.block_out_channels))
        self.conv_in = _conv(config.latent_channels, channels[0])
        self.mid_block = Middle(channels[0], groups)
        last = len(channels) - 1
        self.up_blocks = nn.ModuleList(
            [
                Level(channels[max(i - 1, 0)], c, n, groups, up=True, resample=i < last)
                for i, c in enumerate(channels)
            ]
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=NORM_EPS)
        self.conv_out = _conv(channels[-1], config.in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, latent_channels, H, W]` to `[B, 3, 8H, 8W]`."""
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            assert isinstance(level, Level)
            for step in level.steps:  # here, so that nobody holds the input of the whole level
                x = step(x)
        out: Tensor = self.conv_out(_norm_silu(self.conv_norm_out, x, reuse=True))
        return out


class Encoder(nn.Module):
    """Picture to the mean and log variance of its latents."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        groups, n = config.norm_groups, config.layers_per_block
        channels = config.block_out_channels
        self.conv_in = _conv(config.in_channels, channels[0])
        last = len(channels) - 1
        self.down_blocks = nn.ModuleList(
            [
                Level(channels[max(i - 1, 0)], c, n, groups, up=False, resample=i < last)
                for i, c in enumerate(channels)
            ]
        )
        self.mid_block = Middle(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=NORM_EPS)
        self.conv_out = _conv(channels[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 3, 8H, 8W]` to `[B, 2 * latent_channels, H, W]`."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        out: Tensor = self.conv_out(_norm_silu(self.conv_norm_out, x, reuse=True))
        return out


class VAE(nn.Module):
    """Decoder, and encoder if it `encodes`; build it on the meta device, load it with `build`."""

    def __init__(self, config: VAEConfig, *, encodes: bool = True) -> None:
        super().__init__()
        self.config = config
        if encodes:
            self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.use_quant_conv:
            if encodes:
                self.quant_conv = _conv(2 * config.latent_channels, 2 * config.latent_channels, 1)
            self.post_quant_conv = _conv(config.latent_channels, config.latent_channels, 1)

    def decode(self, z: Tensor) -> Tensor:
        """Latents as the autoencoder knows them, `[B, C, H, W]`, to a picture in about [-1, 1]."""
        if self.config.use_quant_conv:
            z = self.post_quant_conv(z)
        out: Tensor = self.decoder(z)
        return out

    def encode(self, picture: Tensor) -> Tensor:
        """The mean of the latents of `picture [B, 3, 8H, 8W]` in [-1, 1]."""
        moments = self.encoder(picture)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        return torch.chunk(moments, 2, dim=1)[0]

    def decode_latents(self, latents: Tensor) -> Tensor:
        """The sampler's float32 latents `[B, C, H, W]` to float32 `[B, 3, 8H, 8W]`."""
        config = self.config
        z = latents / config.scaling_factor + config.shift_factor
        return self.decode(z.to(self.decoder.conv_in.weight.dtype)).float()
