"""Decode latents in stripes of rows: the untiled picture, without seams, in less memory.

A feature map is a list of stripes. The layer that reads it last frees them one by one while the
stripes of the next map come up: the two share the room of the larger. Each stripe of a convolution
reads one row beyond its ends; zeros are added only at the true borders.

GroupNorm wants the whole map. Every stripe leaves the count n, the mean and M2, the sum of squared
differences from that mean, of each group when it is made; Chan's formula joins them exactly,

    mean = sum(n_i mean_i) / sum(n_i)      M2 = sum(M2_i + n_i (mean_i - mean)^2)

so that the picture differs from `VAE.decode_latents` by rounding alone. What is never whole: the
normalized map, and the doubled one before its convolution. What is: keys and values of the one
attention, at the size of the latents; queries come in stripes. `vae_memory` has the arithmetic.

Lower levels are narrower, so their stripes are higher: all levels work on about as many numbers.

Source: `zquant.models.vae`; Chan, Golub, LeVeque 1979.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zquant.models.config import VAEConfig
from zquant.models.vae import VAE

__all__ = ["QUERIES", "decode_striped", "spans", "stripe_lines"]

QUERIES = 2048  # of the attention at a time: enough to fill a GPU


def decode_striped(vae: VAE, latents: Tensor, *, rows: int, store: torch.device | str) -> Tensor:
    """What `vae.decode_latents` computes, in stripes.

    Args:
        vae: on the device of `latents`, in any float dtype.
        latents: float32 `[1, C, H, W]` of the sampler.
        rows: of the picture that a stripe of the last level makes, a multiple of `config.scale`,
            which is 8; the memory of the work is proportional to it.
        store: where feature maps wait between layers: the device of `vae`, or "cpu", which leaves
            only stripes and weights on a GPU and copies every stripe down and up.

    Returns:
        float32 `[1, 3, 8H, 8W]`, about in [-1, 1], on the CPU.

    Raises:
        ValueError: `rows` or the shape of `latents` is another.
    """
    config = vae.config
    if rows < 1 or rows % config.scale:
        raise ValueError(f"rows must be a positive multiple of {config.scale}; got {rows}")
    if latents.ndim != 4 or latents.shape[:2] != (1, config.latent_channels) or not latents.numel():
        raise ValueError(
            f"stripes need latents [1, {config.latent_channels}, H, W], one picture at a time; "
            f"got {list(latents.shape)}"
        )
    with torch.no_grad():
        z = latents / config.scaling_factor + config.shift_factor
        z = z.to(vae.decoder.conv_in.weight.dtype)
        if config.use_quant_conv:
            z = vae.post_quant_conv(z)
        return _Stripes(vae, z.device, torch.device(store), rows).decode(z)


def spans(height: int, lines: int) -> Iterator[tuple[int, int]]:
    """First row and end of every stripe of `lines` rows, the last perhaps lower."""
    for start in range(0, height, lines):
        yield start, min(start + lines, height)


def stripe_lines(config: VAEConfig, rows: int) -> list[int]:
    """Rows of a stripe at each level of the decoder, the level of the latents first."""
    channels = list(reversed(config.block_out_channels))
    widest = [max(channels[max(i - 1, 0)], c) for i, c in enumerate(channels)]
    last = len(channels) - 1
    return [max(1, (rows * widest[-1] << last - i) // c) for i, c in enumerate(widest)]


class _Map:
    """A feature map `[1, C, height, width]` as stripes in the store, and its norm's statistics.

    `groups` 0 is for a map that no norm reads.
    """

    def __init__(self, device: torch.device, store: torch.device, groups: int = 0) -> None:
        self.device, self.store, self.groups = device, store, groups
        self.height = 0
        self.stripes: list[tuple[int, Tensor]] = []  # first row, [1, C, n, width]
        self.moments: list[Tensor] = []  # [3, groups]

    def append(self, stripe: Tensor) -> None:
        """Add rows `[1, C, n, width]` below; they are not to be written to afterwards."""
        if self.groups:
            self.moments.append(_moments(stripe, self.groups))
        self.stripes.append((self.height, stripe.to(self.store)))
        self.height += stripe.shape[2]

    def read(self, start: int, stop: int) -> Tensor:
        """Those of the rows that exist, on the device; perhaps the stripe itself: do not write."""
        parts = [
            stripe[:, :, max(start - at, 0) : stop - at]
            for at, stripe in self.stripes
            if at < stop and start < at + stripe.shape[2]
        ]
        # joined where they lie: one copy goes up, and nothing twice on the device
        return (torch.cat(parts, 2) if len(parts) > 1 else parts[0]).to(self.device)

    def drop(self, before: int) -> None:
        """Free the stripes that lie wholly above row `before`."""
        while self.stripes and self.stripes[0][0] + self.stripes[0][1].shape[2] <= before:
            del self.stripes[0]

    def affine(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """float32 scale and shift `[C, 1, 1]` that are `norm` over the whole map."""
        count, mean, m2 = torch.stack(self.moments).unbind(1)  # [stripes, groups]
        total = count.sum(0)
        center = (count * mean).sum(0) / total
        variance = (m2 + count * (mean - center).square()).sum(0) / total
        width = norm.num_channels // norm.num_groups
        each = torch.rsqrt(variance + norm.eps).repeat_interleave(width)
        scale = norm.weight.double() * each
        shift = norm.bias.double() - center.repeat_interleave(width) * scale
        return scale.float()[:, None, None], shift.float()[:, None, None]


def _moments(stripe: Tensor, groups: int) -> Tensor:
    """float64 `[3, groups]`: count, mean and M2 of every group."""
    variance, mean = torch.var_mean(stripe.float().reshape(groups, -1), dim=1, correction=0)
    count = torch.full_like(mean, stripe.numel() // groups, dtype=torch.float64)
    return torch.stack((count, mean.double(), variance.double() * count))


def _bordered(rows: Tensor, start: int, stop: int, height: int) -> Tensor:
    """With zeros above and below where `start` and `stop` are the map's borders."""
    top, bottom = int(start == 0), int(stop == height)
    return F.pad(rows, (0, 0, top, bottom)) if top or bottom else rows


def _conv(conv: Any, rows: Tensor) -> Tensor:
    """The 3x3 convolution of rows that bring their neighbours along."""
    return F.conv2d(rows, conv.weight, conv.bias, padding=(0, 1))


class _Stripes:
    """The decoder of `vae`, layer by layer over stripes; the layers are read, never called."""

    def __init__(self, vae: VAE, device: torch.device, store: torch.device, rows: int) -> None:
        self.decoder, self.groups = vae.decoder, vae.config.norm_groups
        self.device, self.store = device, store
        self.lines = stripe_lines(vae.config, rows)

    def decode(self, z: Tensor) -> Tensor:
        """The picture of `z [1, C, H, W]`."""
        middle, levels = self.decoder.mid_block, cast(Any, self.decoder.up_blocks)
        x = self._resnet(middle.resnets[0], self._first(z), self.lines[0])
        x = self._attention(middle.attentions[0], x)
        x = self._resnet(middle.resnets[1], x, self.lines[0])
        for i, level in enumerate(levels):
            for block in level.resnets:
                x = self._resnet(block, x, self.lines[i])
            for sampler in level.upsamplers:
                x = self._double(sampler.conv, x, self.lines[i + 1])
        return self._picture(x)

    def _map(self, groups: int = 0) -> _Map:
        return _Map(self.device, self.store, groups)

    def _first(self, z: Tensor) -> _Map:
        """The first convolution."""
        x = self._map(self.groups)
        for start, stop in spans(z.shape[2], self.lines[0]):
            rows = z[:, :, max(start - 1, 0) : stop + 1]
            x.append(_conv(self.decoder.conv_in, _bordered(rows, start, stop, z.shape[2])))
        return x

    def _normed_conv(
        self, x: _Map, norm: tuple[Tensor, Tensor], conv: Any, span: tuple[int, int], *, last: bool
    ) -> Tensor:
        """Rows `span` of conv(silu(norm(x))); the `last` reader of `x` frees what it has read."""
        (start, stop), (scale, shift) = span, norm
        rows = x.read(start - 1, stop + 1)
        if last:
            x.drop(stop - 1)
        y = (rows * scale).add_(shift)
        del rows
        y = F.silu(y, inplace=True).to(conv.weight.dtype)
        y = _bordered(y, start, stop, x.height)
        return _conv(conv, y)

    def _resnet(self, block: Any, x: _Map, lines: int) -> _Map:
        """`x + conv2(silu(norm2(conv1(silu(norm1(x))))))`, rows of conv1 before any of conv2."""
        norm = x.affine(block.norm1)
        h, skip = self._map(self.groups), x if block.same else self._map()
        for start, stop in spans(x.height, lines):
            if not block.same:
                skip.append(block.conv_shortcut(x.read(start, stop)))
            last = not block.same
            h.append(self._normed_conv(x, norm, block.conv1, (start, stop), last=last))
        if not block.same:
            x.drop(x.height)
        norm = h.affine(block.norm2)
        out = self._map(self.groups)
        for start, stop in spans(h.height, lines):
            y = self._normed_conv(h, norm, block.conv2, (start, stop), last=True)
            out.append(y.add_(skip.read(start, stop)))
            skip.drop(stop)
            del y
        return out

    def _attention(self, block: Any, x: _Map) -> _Map:
        """`x` + attention over all positions of norm(x)."""
        scale, shift = x.affine(block.group_norm)
        like = x.stripes[0][1]
        channels, width, dtype = like.shape[1], like.shape[3], like.dtype
        size = (1, 1, x.height * width, channels)
        keys, values = (torch.empty(size, dtype=dtype, device=self.device) for _ in range(2))

        def tokens(rows: Tensor) -> Tensor:
            """`[1, n * width, C]`."""
            return (rows * scale).add_(shift).to(dtype).flatten(2).transpose(1, 2)

        lines = max(1, QUERIES // width)
        for start, stop in spans(x.height, lines):
            h = tokens(x.read(start, stop))
            keys[:, 0, start * width : stop * width] = block.to_k(h)
            values[:, 0, start * width : stop * width] = block.to_v(h)
            del h
        out = self._map(self.groups)
        for start, stop in spans(x.height, lines):
            rows = x.read(start, stop)
            x.drop(stop)
            h = block.to_q(tokens(rows))[:, None]
            h = F.scaled_dot_product_attention(h, keys, values)[:, 0]
            out.append(rows + block.to_out[0](h).transpose(1, 2).view_as(rows))
            del h, rows
        return out

    def _double(self, conv: Any, x: _Map, lines: int) -> _Map:
        """The convolution of every pixel doubled, in stripes of `lines` of its own rows."""
        out, height = self._map(self.groups), 2 * x.height
        for start, stop in spans(height, lines):
            first, end = max(start - 1, 0), min(stop + 1, height)
            rows = x.read(first // 2, (end + 1) // 2)
            x.drop((stop - 1) // 2)
            # row i of the doubled map is row i // 2
            at = torch.arange(first, end, device=self.device) // 2 - first // 2
            rows = F.interpolate(rows.index_select(2, at), scale_factor=(1.0, 2.0))
            rows = _bordered(rows, start, stop, height)
            rows = _conv(conv, rows)
            out.append(rows)
            del rows
        return out

    def _picture(self, x: _Map) -> Tensor:
        """SiLU, the last convolution, and its rows in float32 on the CPU."""
        conv, norm = self.decoder.conv_out, x.affine(self.decoder.conv_norm_out)
        width = x.stripes[0][1].shape[3]
        picture = torch.empty(1, conv.out_channels, x.height, width)
        for start, stop in spans(x.height, self.lines[-1]):
            span = (start, stop)
            picture[:, :, start:stop] = self._normed_conv(x, norm, conv, span, last=True)
        return picture
