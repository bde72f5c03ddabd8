"""The networks and the sampler against vectors recorded from diffusers and transformers.

Recipe of the weights: state-dict names sorted by code point, index k; element i of a tensor is
1 + 0.1 s for one-dimensional "...weight", else 0.2 s, s = sin(0.7 (i + 1) + 1.3 (k + 1)), float64.
Recipe of an input with phase p: element i is cos(0.3 (i + 1) + p). No random generator is involved.
Recorded with diffusers 0.40.0.dev0 and transformers on a CPU in float32: the first eight elements,
the sum and the sum of absolute values of the raw output.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from checkpoint_layout import CONFIGS, SHAPES

from zquant import sampling
from zquant.models.build import load, on_meta
from zquant.models.config import DiTConfig, TextEncoderConfig, VAEConfig
from zquant.models.dit import DiT
from zquant.models.text_encoder import TextEncoder
from zquant.models.vae import VAE
from zquant.quant.qtypes import QTYPES, QType

# of the largest element: the vectors are printed to six decimals; measured 1e-6
TOLERANCE = 5e-6
# at 16×16 latents one rounding of the input (6e-8) moves diffusers' own output by up to 1.4e-4
LOOP_TOLERANCE = 1e-3

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Filled:
    """A float32 tensor in memory, offered to `load` as if it were stored."""

    values: np.ndarray
    qtype: QType = QTYPES["F32"]
    scaling: None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def raw(self) -> np.ndarray:
        return np.ascontiguousarray(self.values).reshape(-1).view(np.uint8)


def filled(shapes: Shapes) -> dict[str, Filled]:
    parts = {}
    for k, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        s = np.sin(0.7 * np.arange(1, np.prod(shape) + 1) + 1.3 * (k + 1))
        norm = len(shape) == 1 and name.endswith("weight")
        values = 1 + 0.1 * s if norm else 0.2 * s
        parts[name] = Filled(values.astype(np.float32).reshape(shape))
    return parts


def waves(*shape: int, phase: float) -> torch.Tensor:
    i = torch.arange(1, int(np.prod(shape)) + 1, dtype=torch.float64)
    return torch.cos(0.3 * i + phase).float().reshape(shape)


def check(
    out: torch.Tensor,
    first: list[float],
    total: float,
    abs_total: float,
    tolerance: float = TOLERANCE,
) -> None:
    assert torch.isfinite(out).all()
    flat = out.double().flatten()
    scale = flat.abs().max().item()
    torch.testing.assert_close(
        flat[:8], torch.tensor(first, dtype=torch.float64), rtol=0, atol=tolerance * scale
    )
    assert flat.sum().item() == pytest.approx(total, abs=tolerance * abs_total)
    assert flat.abs().sum().item() == pytest.approx(abs_total, rel=tolerance)


@pytest.fixture(scope="module")
def dit() -> DiT:
    toy = {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 16}
    shapes = dict(SHAPES["transformer"](CONFIGS["transformer"] | toy))
    assert len(shapes) == 73
    assert sum(np.prod(shape) for shape in shapes.values()) == 364_176
    config = DiTConfig(
        **toy,
        in_channels=16,
        patch_size=2,
        axes_dims=(8, 4, 4),
        rope_theta=256.0,
        norm_eps=1e-5,
        t_scale=1000.0,
    )
    return load(on_meta(lambda: DiT(config)), filled(shapes), label="toy DiT")


@pytest.fixture(scope="module")
def vae() -> VAE:
    toy = {"block_out_channels": [32, 64], "layers_per_block": 1}
    shapes = dict(SHAPES["vae"](CONFIGS["vae"] | toy))
    shapes |= {"quant_conv.weight": (32, 32, 1, 1), "quant_conv.bias": (32,)}
    shapes |= {"post_quant_conv.weight": (16, 16, 1, 1), "post_quant_conv.bias": (16,)}
    config = VAEConfig(
        in_channels=3,
        latent_channels=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_groups=32,
        use_quant_conv=True,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    return load(on_meta(lambda: VAE(config)), filled(shapes), label="toy VAE")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiTCase:
    size: tuple[int, int]
    phase: float = 0.1
    caption: int
    caption_phase: float = 0.5
    tau: float
    first: list[float]
    total: float
    abs_total: float


DIT_CASES = {
    "A: 15 tokens, 17 pads, tau 0": DiTCase(
        size=(6, 10),
        caption=11,
        tau=0.0,
        first=[
            *(-1.534318, -1.163023, -0.262532, -0.240354),
            *(-0.049059, -0.459379, 0.387974, 0.129271),
        ],
        total=1.816894,
        abs_total=973.1048,
    ),
    "A: tau 0.5": DiTCase(
        size=(6, 10),
        caption=11,
        tau=0.5,
        first=[
            *(-1.522702, -1.153162, -0.251774, -0.230402),
            *(-0.049920, -0.460454, 0.389520, 0.133109),
        ],
        total=1.800673,
        abs_total=970.9190,
    ),
    "A: tau 0.7": DiTCase(
        size=(6, 10),
        caption=11,
        tau=0.7,
        first=[
            *(-1.524286, -1.154588, -0.252394, -0.232456),
            *(-0.053621, -0.461916, 0.386790, 0.127769),
        ],
        total=1.820252,
        abs_total=972.3092,
    ),
    "B: 32 tokens, no pads": DiTCase(
        size=(8, 16),
        caption=11,
        tau=0.5,
        first=[
            *(-2.098413, -1.606631, -1.675745, -1.118945),
            *(-0.611672, -0.031786, 0.722761, 1.327805),
        ],
        total=-13.35665,
        abs_total=2347.954,
    ),
    "C: caption longer than 32": DiTCase(
        size=(6, 10),
        caption=45,
        tau=0.3,
        first=[
            *(-1.541062, -1.165820, -0.260586, -0.236642),
            *(-0.021763, -0.447248, 0.379397, 0.114210),
        ],
        total=1.322684,
        abs_total=985.5927,
    ),
    # recorded in a batch with C, behind a mask; without one the result must be the same
    "D: second of a batch with C": DiTCase(
        size=(6, 10),
        phase=0.7,
        caption=8,
        caption_phase=0.9,
        tau=0.3,
        first=[
            *(-0.245884, -0.226297, -0.040948, -0.446938),
            *(0.387960, 0.135496, 1.104160, 1.279220),
        ],
        total=2.917577,
        abs_total=1017.906,
    ),
}


@pytest.mark.parametrize("case", DIT_CASES.values(), ids=DIT_CASES.keys())
def test_dit(dit: DiT, case: DiTCase) -> None:
    latents = waves(1, 16, *case.size, phase=case.phase)
    caption = waves(case.caption, 16, phase=case.caption_phase)
    check(dit(latents, case.tau, caption), case.first, case.total, case.abs_total)


def test_dit_batch_is_its_items(dit: DiT) -> None:
    latents = torch.cat([waves(1, 16, 6, 10, phase=p) for p in (0.1, 0.7)])
    caption = waves(11, 16, phase=0.5)
    batch = dit(latents, 0.5, caption)
    single = torch.cat([dit(item[None], 0.5, caption) for item in latents])
    torch.testing.assert_close(batch, single, rtol=0, atol=TOLERANCE)


def test_vae_decode(vae: VAE) -> None:
    first = [0.162841, 0.190260, 0.331366, 0.871889, 1.975785, 2.651649, 1.244466, -2.345958]
    check(vae.decode(waves(1, 16, 4, 6, phase=0.2)), first, 43.11384, 489.7840)


def test_vae_encode(vae: VAE) -> None:
    first = [
        *(-0.334919, -0.451266, -0.915611, -1.297420),
        *(-1.472756, -1.341238, -0.882382, -1.129064),
    ]
    check(vae.encode(waves(1, 3, 8, 12, phase=0.2)), first, -5.452810, 296.2517)


def test_text_encoder() -> None:
    config = TextEncoderConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        rope_theta=1e6,
        norm_eps=1e-6,
    )
    toy = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    toy |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    shapes = dict(SHAPES["text_encoder"](CONFIGS["text_encoder"] | toy))
    encoder = load(
        on_meta(lambda: TextEncoder(config)),
        filled(shapes),
        label="toy Qwen3",
        unused=("model.layers.2.", "model.norm."),
    )
    first = [
        *(-0.112999, 0.136063, -0.807485, 0.908743),
        *(-0.848228, 1.075375, -0.467356, 0.374371),
    ]
    check(encoder([torch.tensor([3, 1, 4, 15, 9, 26, 5])])[0], first, -0.275323, 45.41685)


def sampled(dit: DiT, guidance_scale: float) -> torch.Tensor:
    """Four steps of 32×32 pixels, with the velocities of `dit`."""
    schedule = sampling.sigmas(4, 3.0)
    taus = sampling.taus(schedule).tolist()
    positive, negative = waves(11, 16, phase=0.5), waves(8, 16, phase=0.9)

    def velocity(latents: torch.Tensor, step: int) -> torch.Tensor:
        v = -dit(latents, taus[step], positive)
        if guidance_scale == 0:
            return v
        return sampling.guide(v, -dit(latents, taus[step], negative), guidance_scale, 0.0)

    return sampling.denoise(velocity, waves(1, 16, 16, 16, phase=0.3), schedule)


def test_denoise(dit: DiT) -> None:
    first = [1.080913, 1.262788, 1.032054, 1.036717, 0.370708, 0.260533, 0.513075, 0.854834]
    check(sampled(dit, 0.0), first, -19.72432, 3580.693, LOOP_TOLERANCE)


def test_denoise_with_guidance(dit: DiT) -> None:
    first = [1.154260, 1.342332, 1.019246, 1.026422, 0.259796, 0.126135, -0.489652, -0.228339]
    check(sampled(dit, 3.0), first, -20.68956, 4222.595, LOOP_TOLERANCE)


def test_denoise_to_picture(dit: DiT, vae: VAE) -> None:
    picture = (vae.decode_latents(sampled(dit, 0.0)) / 2 + 0.5).clamp(0, 1)
    assert picture.shape == (1, 3, 32, 32)
    first = [0.649105, 0.703801, 0.745454, 0.765476, 0.763902, 0.749494, 0.746552, 0.750669]
    check(picture, first, 1725.966, 1725.966, LOOP_TOLERANCE)


def test_sigmas_of_turbo() -> None:
    expected = [1, 0.95454544, 0.9, 0.8333333, 0.75, 0.6428571, 0.5, 0.3, 0]
    torch.testing.assert_close(sampling.sigmas(8, 3.0), torch.tensor(expected), rtol=0, atol=1e-7)
