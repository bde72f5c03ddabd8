"""What decoding takes: bytes alive at once, by arithmetic alone, of the whole way and of stripes.

Counted are the tensors that `VAE.decode_latents` and `decode_striped` make, at the moment when
their sum is largest, the picture included. Not counted: weights (`weight_bytes`), the latents the
caller holds, what a library takes for itself during one convolution, and the allocator's rounding.
Attention is taken to be fused, so that scores are never stored.

With M for a map of 128 channels at the picture's size, the FLUX decoder takes 5.5 M whole: at its
last doubling it holds the level's input (1), x (0.5), x doubled (2) and the result (2). In stripes
it takes 2 M: the 256 channels that the last level begins with, or two maps of 128.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from zquant.models.build import on_meta
from zquant.models.config import VAEConfig
from zquant.models.vae import VAE
from zquant.models.vae_stripes import QUERIES, spans, stripe_lines

__all__ = ["decoder_flops", "fitting_rows", "striped_bytes", "weight_bytes", "whole_bytes"]

FLOAT32 = 4  # bytes; norms and their statistics are computed in it
MOST_ROWS = 128  # of a stripe


def weight_bytes(config: VAEConfig, itemsize: int) -> int:
    """Bytes of the weights of a `VAE` that only decodes."""
    vae = on_meta(lambda: VAE(config, encodes=False))
    return itemsize * sum(p.numel() for p in vae.parameters())


def decoder_flops(config: VAEConfig, height: int, width: int) -> float:
    """Operations of decoding latents `[1, C, height, width]`: two for each product of a layer."""
    channels = list(reversed(config.block_out_channels))
    area, c = height * width, channels[0]
    # conv_in; the middle: two residual blocks of two convolutions, and attention
    products = area * 9 * config.latent_channels * c
    products += area * (36 * c**2 + 4 * c**2 + 2 * area * c)
    if config.use_quant_conv:
        products += area * config.latent_channels**2
    for i, c in enumerate(channels):
        before = channels[max(i - 1, 0)]
        first = 9 * (before * c + c**2) + (before * c if before != c else 0)
        products += area * (first + config.layers_per_block * 18 * c**2)
        if i + 1 < len(channels):
            area *= 4
            products += area * 9 * c**2
    return 2.0 * (products + area * 9 * channels[-1] * config.in_channels)


def whole_bytes(config: VAEConfig, height: int, width: int, itemsize: int) -> int:
    """Most bytes at once of `VAE.decode_latents`, all on its device.

    Args:
        config: of the autoencoder.
        height: of the latents; 1 of them is 8 pixels.
        width: likewise.
        itemsize: bytes of an activation: 4 or 2, as of a weight.
    """
    channels = list(reversed(config.block_out_channels))
    size = height * width * itemsize  # of a map of one channel
    latents = height * width * config.latent_channels * (FLOAT32 + 2 * itemsize)
    # the attention: two inputs, norm, query, key, value, result
    peaks = [7 * channels[0] * size]
    for i, c_out in enumerate(channels):
        x, y = channels[max(i - 1, 0)] * size, c_out * size
        peaks.append(_whole_resnet(x, y, config.norm_groups, itemsize))
        if config.layers_per_block > 0:
            peaks.append(_whole_resnet(y, y, config.norm_groups, itemsize))
        if i + 1 < len(channels):
            peaks.append(y + 2 * 4 * y)
            size *= 4
    peaks.append(2 * channels[-1] * size)
    # and the float32 weight and bias of a norm
    return latents + max(peaks) + 2 * FLOAT32 * max(channels)


def _whole_resnet(x: int, y: int, groups: int, itemsize: int) -> int:
    """Of maps of `x` bytes to maps of `y`."""
    # the plain norm of a halved dtype holds three float32 tensors of a group
    a, b = (0 if itemsize == FLOAT32 else 3 * FLOAT32 * m // (groups * itemsize) for m in (x, y))
    # norm1; conv1; norm2, which is not in place in float32; conv2, shortcut
    return x + max(x + a, x + y, y + b, 2 * y)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moment:
    """Bytes alive at once: in the store, on the device; and on their way between the two."""

    maps: int
    work: int
    moved: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Level:
    """Maps of one resolution, in stripes of `lines` rows."""

    height: int
    width: int
    lines: int
    itemsize: int

    def row(self, channels: int) -> int:
        """Bytes of a row."""
        return self.width * channels * self.itemsize

    def left(self, before: int, lines: int = 0) -> int:
        """Rows left when every stripe (of `lines`) that ends at `before` or above is freed."""
        lines = lines or self.lines
        return self.height - min(max(before, 0) // lines * lines, self.height)

    def steps(self, lines: int = 0) -> list[tuple[int, int]]:
        """Stripes that may take most: between them, bytes grow or shrink evenly."""
        every = list(spans(self.height, lines or self.lines))
        return sorted({*every[:2], *every[-2:]})

    def conv(
        self, c_in: int, c_out: int, maps: int, step: tuple[int, int], *, last: bool = True
    ) -> _Moment:
        """Norm, SiLU, convolution and the statistics of the result; the `last` reader frees."""
        n = step[1] - step[0]
        inside = min(step[1] + 1, self.height) - max(step[0] - 1, 0)
        padded, made = (n + 2) * self.row(c_in), n * self.row(c_out)
        normed = inside * self.width * c_in * FLOAT32
        # a stripe and its neighbours are joined, unless it has none
        joined = inside * self.row(c_in) if self.lines < self.height else 0
        freed = (self.left(step[0] - 1) - self.left(step[1] - 1)) * self.row(c_in) if last else 0
        return _Moment(
            maps=maps,
            work=max(normed + padded, padded + made, made + self.spare(made)),
            moved=max(freed + joined, made),
        )

    def spare(self, made: int) -> int:
        """A float32 copy for the statistics, or what is added."""
        return made if self.itemsize == FLOAT32 else made * FLOAT32 // self.itemsize


def striped_bytes(
    config: VAEConfig, height: int, width: int, itemsize: int, *, rows: int, stored: bool
) -> tuple[int, int]:
    """Most bytes at once of `decode_striped`: on the device, and on the host.

    Args:
        config: see `whole_bytes`; likewise `height`, `width` and `itemsize`.
        height: see `config`.
        width: see `config`.
        itemsize: see `config`.
        rows: as `decode_striped` is given them.
        stored: whole maps are kept on the device, too. On a CPU both numbers are of one memory.
    """
    moments = list(_moments(config, height, width, itemsize, rows))
    latents = height * width * config.latent_channels * (FLOAT32 + itemsize)
    # float64: count, mean and M2 of three maps; as much again to join them; scale and shift
    n_stripes = max(-(-(height << i) // n) for i, n in enumerate(stripe_lines(config, rows)))
    latents += 144 * n_stripes * config.norm_groups + 48 * max(config.block_out_channels)
    picture = height * width * config.scale**2 * config.in_channels * FLOAT32
    if stored:
        return latents + max(m.maps + m.work for m in moments), picture
    return latents + max(m.work for m in moments), max(m.maps + m.moved for m in moments)


def fitting_rows(
    config: VAEConfig, height: int, width: int, itemsize: int, *, device_bytes: int, stored: bool
) -> int | None:
    """The highest sensible stripe whose decoding takes no more than `device_bytes`.

    Args:
        config: see `striped_bytes`; likewise the sizes and `stored`.
        height: see `config`.
        width: see `config`.
        itemsize: see `config`.
        device_bytes: free for activations: without the weights.
        stored: see `config`.

    Returns:
        Rows of the picture, a power of two times `config.scale`; None if even that is too much.
    """
    rows = config.scale
    while rows < min(MOST_ROWS, height * config.scale):
        rows *= 2
    while rows >= config.scale:
        needed, _ = striped_bytes(config, height, width, itemsize, rows=rows, stored=stored)
        if needed <= device_bytes:
            return rows
        rows //= 2
    return None


def _moments(
    config: VAEConfig, height: int, width: int, itemsize: int, rows: int
) -> Iterator[_Moment]:
    """Of the whole decoder, in its order."""
    channels = list(reversed(config.block_out_channels))
    levels = [
        _Level(height=height << i, width=width << i, lines=lines, itemsize=itemsize)
        for i, lines in enumerate(stripe_lines(config, rows))
    ]
    queries = max(1, QUERIES // width)
    yield from _resnet(levels[0], channels[0], channels[0])
    yield from _attention(levels[0], channels[0], queries)
    yield from _resnet(levels[0], channels[0], channels[0], queries)
    for i, (level, c_out) in enumerate(zip(levels, channels, strict=True)):
        yield from _resnet(level, channels[max(i - 1, 0)], c_out)
        yield from _resnet(level, c_out, c_out)
        if level is not levels[-1]:
            yield from _double(level, levels[i + 1], c_out)
    picture = levels[-1].height * levels[-1].width * config.in_channels * FLOAT32
    for step in levels[-1].steps():
        left = levels[-1].left(step[1] - 1) * levels[-1].row(channels[-1])
        last = levels[-1].conv(channels[-1], config.in_channels, left, step)
        yield _Moment(maps=last.maps, work=last.work, moved=last.moved + picture)


def _resnet(level: _Level, c_in: int, c_out: int, lines: int = 0) -> Iterator[_Moment]:
    """The maps it reads may have stripes of other `lines`."""
    x, y = level.row(c_in), level.row(c_out)
    for start, stop in level.steps():
        if c_in == c_out:
            maps = level.height * x + start * y
            yield level.conv(c_in, c_out, maps, (start, stop), last=False)
            continue
        n = stop - start
        maps = level.left(start - 1) * x + 2 * start * y
        yield _Moment(maps=maps, work=n * (x + y + level.spare(y)), moved=n * x)
        maps = level.left(stop - 1) * x + (start + stop) * y
        yield level.conv(c_in, c_out, maps, (start, stop))
    for start, stop in level.steps():
        maps = (level.left(stop - 1) + level.left(start, lines) + start) * y
        yield level.conv(c_out, c_out, maps, (start, stop))


def _attention(level: _Level, channels: int, lines: int) -> Iterator[_Moment]:
    """Queries come in stripes of `lines`, whatever the level's are."""
    row = level.row(channels)
    for start, stop in level.steps(lines):
        n = (stop - start) * row
        # keys and values; rows, result, sum and its float32 copy, or rows, result, projection twice
        work = 2 * level.height * row + 3 * n + level.spare(n)
        yield _Moment(maps=level.height * row, work=work, moved=n)
        freed = (level.left(start) - level.left(stop)) * row
        yield _Moment(maps=(level.left(stop) + start) * row, work=work, moved=freed + n)


def _double(level: _Level, above: _Level, channels: int) -> Iterator[_Moment]:
    """From one level to the next, in stripes of that one."""
    for start, stop in above.steps():
        left = level.left((stop - 1) // 2)
        maps = left * level.row(channels) + start * above.row(channels)
        read = level.left((start - 1) // 2) - left + (stop - start) // 2 + 2
        doubled = (stop - start + 2) * above.row(channels)
        made = (stop - start) * above.row(channels)
        work = max(2 * doubled, doubled + made, made + above.spare(made))
        yield _Moment(maps=maps, work=work, moved=max(read * level.row(channels), made))
