"""Stripes give the untiled picture, in the memory that the arithmetic says."""

import math
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import zquant
from zquant.formats.detect import open_source
from zquant.formats.model_folder import source_metadata
from zquant.formats.names import vae_parts
from zquant.models import vae_stripes as subject
from zquant.models.build import load, on_meta
from zquant.models.config import VAEConfig
from zquant.models.vae import VAE
from zquant.models.vae_memory import (
    decoder_flops,
    fitting_rows,
    striped_bytes,
    weight_bytes,
    whole_bytes,
)
from zquant.models.vae_stripes import decode_striped, spans, stripe_lines

# float32 in another order: some 20 layers of roundings of 6e-8
SAME = 1e-5


def config(
    channels: tuple[int, ...] = (16, 32, 64, 64),
    layers: int = 1,
    groups: int = 8,
    quant: bool = False,
) -> VAEConfig:
    return VAEConfig(
        in_channels=3,
        latent_channels=16,
        block_out_channels=channels,
        layers_per_block=layers,
        norm_groups=groups,
        use_quant_conv=quant,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


TINY, FLUX = config(), config((128, 256, 512, 512), 2, 32)


def make(c: VAEConfig = TINY, dtype: torch.dtype = torch.float32) -> VAE:
    """Random weights, norms around 1 and 0."""
    torch.manual_seed(0)
    vae = VAE(c).eval().requires_grad_(False)
    for name, p in vae.named_parameters():
        if "norm" in name:
            p.add_(0.3 * torch.randn_like(p))
    return vae.to(dtype)


def noise(height: int, width: int) -> Tensor:
    return torch.randn(1, 16, height, width, generator=torch.Generator().manual_seed(1))


def relative_l2(ours: Tensor, expected: Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


def psnr(a: Tensor, b: Tensor) -> float:
    """In dB, of pictures in [-1, 1]."""
    return 20 * math.log10(2 / (a - b).square().mean().sqrt().item())


@pytest.mark.parametrize("rows", [8, 16, 24, 64])
@pytest.mark.parametrize("size", [(6, 4), (5, 7), (9, 2), (1, 3)], ids=lambda s: "{}x{}".format(*s))
def test_the_picture_is_the_untiled_one(size: tuple[int, int], rows: int) -> None:
    vae, latents = make(), noise(*size)
    picture = decode_striped(vae, latents, rows=rows, store="cpu")
    assert picture.dtype == torch.float32
    assert picture.shape == (1, 3, 8 * size[0], 8 * size[1])
    assert relative_l2(picture, vae.decode_latents(latents)) < SAME


@pytest.mark.parametrize(
    "c",
    [config(quant=True), config((32, 64), 2), config((8, 8, 8, 8), 0, 4), config((64, 8, 16), 1)],
    ids=["quant_conv", "two levels", "one block each", "narrow below"],
)
def test_other_autoencoders(c: VAEConfig) -> None:
    vae, latents = make(c), noise(5, 6)
    for rows in (c.scale, 3 * c.scale):
        picture = decode_striped(vae, latents, rows=rows, store=torch.device("cpu"))
        assert relative_l2(picture, vae.decode_latents(latents)) < SAME


def test_queries_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, latents = make(), noise(7, 5)
    monkeypatch.setattr(subject, "QUERIES", 11)  # two rows, of seven
    picture = decode_striped(vae, latents, rows=8, store="cpu")
    assert relative_l2(picture, vae.decode_latents(latents)) < SAME


def break_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    affine = subject._Map.affine

    def of_the_first_stripe(self: Any, norm: Any) -> Any:
        self.moments = self.moments[:1]
        return affine(self, norm)

    monkeypatch.setattr(subject._Map, "affine", of_the_first_stripe)


def break_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    read = subject._Map.read

    def zeros_beyond(self: Any, start: int, stop: int) -> Tensor:
        rows = read(self, start, stop).clone()
        if start > 0 and stop < self.height and stop - start > 2:
            rows[:, :, 0] = 0
        return rows

    monkeypatch.setattr(subject._Map, "read", zeros_beyond)


@pytest.mark.parametrize("fault", [break_statistics, break_neighbours])
def test_a_fault_in_one_stripe_would_be_seen(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """Without this the tests above would prove nothing."""
    vae, latents = make(), noise(6, 4)
    fault(monkeypatch)
    picture = decode_striped(vae, latents, rows=8, store="cpu")
    assert relative_l2(picture, vae.decode_latents(latents)) > 1000 * SAME


def test_statistics_are_joined_exactly() -> None:
    """Far from zero and of unequal stripes, against float64 over the whole map."""
    x = 300 + torch.randn(1, 12, 23, 9, generator=torch.Generator().manual_seed(2))
    norm = torch.nn.GroupNorm(4, 12, eps=1e-6).requires_grad_(False)
    norm.weight.copy_(torch.linspace(0.5, 2, 12))
    norm.bias.copy_(torch.linspace(-1, 1, 12))
    cpu = torch.device("cpu")
    map_ = subject._Map(cpu, cpu, groups=4)
    for start, stop in spans(23, 5):
        map_.append(x[:, :, start:stop])
    scale, shift = map_.affine(norm)
    expected = norm.double()(x.double())
    # the shift is 300 times the scale and rounded to 2^-24 of that
    torch.testing.assert_close(x.double() * scale + shift, expected, rtol=0, atol=1e-4)


def demo_vae(dtype: torch.dtype) -> VAE:
    source = open_source(Path(zquant.__file__).parent / "demo" / "vae.safetensors")
    parts = vae_parts(source)
    shapes = {name: tuple(part.shape) for name, part in parts.items()}
    c = VAEConfig.from_shapes(shapes, source_metadata(source))
    return load(on_meta(lambda: VAE(c)), parts, label="demo", dtype=dtype)


def test_bfloat16_of_the_trained_demo() -> None:
    """One rounding that falls the other way changes all that follow: bfloat16 is as far from itself
    as from float32. So stripes are to be no farther from float32 than the whole is."""
    vae, half = demo_vae(torch.float32), demo_vae(torch.bfloat16)
    y, x = torch.meshgrid(torch.linspace(-2, 2, 64), torch.linspace(-3, 3, 96), indexing="ij")
    scene = torch.stack((torch.sin(3 * x + y), torch.cos(2 * y * x), torch.tanh(5 * (x - y))))
    c = vae.config
    latents = (vae.encode(scene[None]) - c.shift_factor) * c.scaling_factor
    exact, whole = vae.decode_latents(latents), half.decode_latents(latents)
    striped = decode_striped(half, latents, rows=16, store="cpu")
    assert psnr(striped, whole) > 60
    assert psnr(striped, exact) > psnr(whole, exact) - 0.5
    assert relative_l2(decode_striped(vae, latents, rows=16, store="cpu"), exact) < SAME


@pytest.mark.parametrize("rows", [0, -8, 12])
def test_rows_are_a_multiple_of_8(rows: int) -> None:
    with pytest.raises(ValueError, match=f"rows must be a positive multiple of 8; got {rows}"):
        decode_striped(make(), noise(4, 4), rows=rows, store="cpu")


@pytest.mark.parametrize("shape", [(2, 16, 4, 4), (1, 4, 4, 4), (16, 4, 4), (1, 16, 0, 4)], ids=str)
def test_latents_of_one_picture(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"latents \[1, 16, H, W\], one picture at a time; got \["):
        decode_striped(make(), torch.zeros(shape), rows=8, store="cpu")


class Live(TorchDispatchMode):
    """Bytes of the tensors made while it is on, at their peak, by device.

    Meta tensors have a size and neither memory nor numbers: they play the device, and the CPU is
    the host. What comes from them to the CPU is zeros.
    """

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.given = given
        self.known = {id(t.untyped_storage()) for t in given}
        self.now = {"cpu": 0, "meta": 0}
        self.peak = dict(self.now)

    def __torch_dispatch__(
        self, f: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        down = str(kwargs.get("device")) == "cpu"
        if f is torch.ops.aten._to_copy.default and args[0].is_meta and down:
            out = torch.zeros(args[0].shape, dtype=args[0].dtype)
        elif f is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            out = args[0]
        else:
            out = f(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.follow(tensor.untyped_storage(), tensor.device.type)
        return out

    def follow(self, storage: torch.UntypedStorage, where: str) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.known:
            return

        def freed() -> None:
            self.known.discard(key)
            self.now[where] -= size

        weakref.finalize(storage, freed)
        self.known.add(key)
        self.now[where] += size
        self.peak[where] = max(self.peak[where], self.now[where])


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as fused kernels leave it: for meta tensors torch would make the scores."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.empty_like(query)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)


def peaks(vae: VAE, latents: Tensor, **striped: Any) -> tuple[int, int]:
    """Measured on the meta device, and on the CPU."""
    with torch.no_grad(), Live([*vae.parameters(), latents]) as live:
        if striped:
            decode_striped(vae, latents, **striped)
        else:
            vae.decode_latents(latents)
    return live.peak["meta"], live.peak["cpu"]


def assert_bounds(arithmetic: int, peak: int) -> None:
    assert peak <= arithmetic <= 1.15 * peak, (arithmetic, peak, arithmetic / peak)


def shapes(c: VAEConfig, dtype: torch.dtype, size: tuple[int, int]) -> tuple[VAE, Tensor]:
    return on_meta(lambda: VAE(c)).to(dtype), torch.empty(1, 16, *size, device="meta")


sized = pytest.mark.parametrize(
    ("c", "dtype", "size"),
    [
        (TINY, torch.float32, (9, 10)),
        (TINY, torch.bfloat16, (8, 12)),
        (config((32, 64), 2), torch.bfloat16, (16, 11)),
        (FLUX, torch.float32, (8, 12)),
    ],
    ids=["float32", "bfloat16", "two levels", "true widths"],
)


@sized
@pytest.mark.usefixtures("fused")
def test_bytes_of_the_whole_way(c: VAEConfig, dtype: torch.dtype, size: tuple[int, int]) -> None:
    device, _ = peaks(*shapes(c, dtype, size))
    assert_bounds(whole_bytes(c, *size, dtype.itemsize), device)


@sized
@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("rows", [8, 40])
def test_bytes_of_stripes(
    c: VAEConfig, dtype: torch.dtype, size: tuple[int, int], rows: int
) -> None:
    network = shapes(c, dtype, size)
    for stored, store in ((True, "meta"), (False, "cpu")):
        device, host = striped_bytes(c, *size, dtype.itemsize, rows=rows, stored=stored)
        measured_device, measured_host = peaks(*network, rows=rows, store=store)
        assert_bounds(device, measured_device)
        assert_bounds(host, measured_host)


def test_bytes_on_a_cpu() -> None:
    """With real numbers, where attention is fused; all is in one memory."""
    vae, latents = make(), noise(12, 10)
    assert_bounds(whole_bytes(TINY, 12, 10, 4), peaks(vae, latents)[1])
    both = sum(striped_bytes(TINY, 12, 10, 4, rows=16, stored=True))
    assert_bounds(both, peaks(vae, latents, rows=16, store="cpu")[1])


def test_stripes_of_a_level_are_as_large_as_the_last_ones() -> None:
    lines = stripe_lines(FLUX, 8)
    assert lines == [32, 16, 8, 8]
    widths = [
        n * channels << i
        for i, (n, channels) in enumerate(zip(lines, (512, 512, 512, 256), strict=True))
    ]
    assert widths == [16384] * 4


def test_fitting_rows() -> None:
    sized = (FLUX, 128, 128, 2)

    def needed(rows: int, stored: bool) -> int:
        return striped_bytes(*sized, rows=rows, stored=stored)[0]

    for stored in (False, True):
        assert fitting_rows(*sized, device_bytes=needed(32, stored), stored=stored) == 32
        below = fitting_rows(*sized, device_bytes=needed(64, stored) - 1, stored=stored)
        assert below == 32
        assert fitting_rows(*sized, device_bytes=1 << 20, stored=stored) is None
        assert fitting_rows(*sized, device_bytes=1 << 40, stored=stored) == 128
    assert fitting_rows(FLUX, 2, 2, 2, device_bytes=1 << 40, stored=True) == 16
    # the point of it: a quarter of a GiB does for a picture that takes 1.4 GiB whole
    assert needed(64, False) < 1 << 28 < whole_bytes(*sized) // 5


@pytest.mark.parametrize("c", [TINY, config(quant=True)], ids=["plain", "quant_conv"])
def test_weights_and_operations(c: VAEConfig) -> None:
    vae = make(c)
    names = ("decoder.", "post_quant_conv.")
    count = sum(p.numel() for n, p in vae.named_parameters() if n.startswith(names))
    assert weight_bytes(c, 2) == 2 * count
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        vae.decode_latents(noise(5, 7))
    assert decoder_flops(c, 5, 7) == counter.get_total_flops()
