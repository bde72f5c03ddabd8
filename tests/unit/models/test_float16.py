"""float16 holds at most 65,504; Z-Image does not stay below. The scaled paths must not notice.

The weights are random and some of them enlarged until a float32 run passes the limit everywhere it
does in trained checkpoints: the SwiGLU product, the feed-forward's output, the attention's output.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from checkpoint_layout import CONFIGS, SHAPES
from torch import Tensor, nn

from zquant.layers.compute import Compute
from zquant.models.build import load, on_meta
from zquant.models.config import DiTConfig, TextEncoderConfig
from zquant.models.dit import DiT
from zquant.models.text_encoder import TextEncoder
from zquant.quant.qtypes import QTYPES, QType

FLOAT16_MAX = 65504


@dataclass(frozen=True, slots=True)
class Stored:
    values: np.ndarray
    qtype: QType = QTYPES["F32"]
    scaling: None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def raw(self) -> np.ndarray:
        return np.ascontiguousarray(self.values).reshape(-1).view(np.uint8)


def random_parts(
    shapes: Mapping[str, tuple[int, ...]], gains: Mapping[str, float]
) -> dict[str, Stored]:
    """Weights that keep a unit size, times the gain of the first pattern found in their name."""
    rng = np.random.default_rng(0)
    parts = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape) / math.sqrt(shape[-1])
        if len(shape) == 1 and name.endswith("weight"):
            values = 1 + 0.1 * rng.standard_normal(shape)
        gain = next((g for pattern, g in gains.items() if pattern in name), 1.0)
        parts[name] = Stored((values * gain).astype(np.float32))
    return parts


def peaks(network: nn.Module, names: tuple[str, ...]) -> dict[str, float]:
    """Largest magnitude that enters and leaves the linears whose names end so, while it runs."""
    seen: dict[str, float] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            for key, value in ((f"{name} in", inputs[0]), (f"{name} out", out)):
                seen[key] = max(seen.get(key, 0.0), value.abs().max().item())

        return hook

    for path, module in network.named_modules():
        for name in names:
            if path.endswith(name):
                module.register_forward_hook(watch(name))
    return seen


def make_dit(gains: Mapping[str, float]) -> DiT:
    toy = {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 16}
    config = DiTConfig(
        **toy,
        in_channels=16,
        patch_size=2,
        axes_dims=(8, 4, 4),
        rope_theta=256.0,
        norm_eps=1e-5,
        t_scale=1000.0,
    )
    shapes = dict(SHAPES["transformer"](CONFIGS["transformer"] | toy))
    return load(on_meta(lambda: DiT(config)), random_parts(shapes, gains), label="toy")


def make_text_encoder(gains: Mapping[str, float]) -> TextEncoder:
    config = TextEncoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        n_layers=4,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        rope_theta=1e6,
        norm_eps=1e-6,
    )
    toy = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    toy |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    shapes = dict(SHAPES["text_encoder"](CONFIGS["text_encoder"] | toy))
    unused = ("model.layers.3.", "model.norm.")
    module = on_meta(lambda: TextEncoder(config))
    return load(module, random_parts(shapes, gains), label="toy", unused=unused)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_l2(ours: Tensor, expected: Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


# float16 rounds by up to 2^-11 = 5e-4 of a value, some ten times in a row in each of four blocks;
# independent roundings add up like sqrt(40), to 3e-3 at most; bfloat16 rounds 8 times as coarsely
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2.4e-2}
DIT_GAINS = {"w1.": 150, "w3.": 150, "w2.": 4, "to_v.": 40_000, "to_out.": 5}
TEXT_GAINS = {"gate_proj.": 150, "up_proj.": 150, "down_proj.": 4, "v_proj.": 40_000, "o_proj.": 5}


def run_dit(dit: DiT, dtype: torch.dtype) -> Tensor:
    dit.use(Compute(dtype=dtype))
    return dit(noise(1, 16, 6, 10, seed=1), 0.3, noise(11, 16, seed=2))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dit_past_the_largest_float16(dtype: torch.dtype) -> None:
    dit = make_dit(DIT_GAINS)
    seen = peaks(dit, ("w2", "to_out.0"))
    expected = run_dit(dit, torch.float32)
    assert len(seen) == 4
    assert min(seen.values()) > FLOAT16_MAX, seen
    ours = run_dit(dit, dtype)
    assert torch.isfinite(ours).all()
    assert relative_l2(ours, expected) < TOLERANCE[dtype]


def test_the_same_network_without_scaling_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this the tests above would prove nothing."""
    from zquant.layers import swiglu
    from zquant.models import dit_block as subject

    monkeypatch.setattr(swiglu, "INPUT_SCALE", 1.0)
    monkeypatch.setattr(swiglu, "PRODUCT_SCALE", 1.0)
    monkeypatch.setattr(subject, "input_scale", lambda _: 1.0)
    assert not torch.isfinite(run_dit(make_dit(DIT_GAINS), torch.float16)).all()


def test_dit_of_ordinary_weights_in_float16() -> None:
    dit = make_dit({})
    expected = run_dit(dit, torch.float32)
    assert relative_l2(run_dit(dit, torch.float16), expected) < TOLERANCE[torch.float16]


IDS = torch.tensor([3, 1, 4, 15, 9, 26, 5])


@pytest.mark.parametrize("gains", [{}, TEXT_GAINS], ids=["ordinary", "past float16"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_text_encoder(gains: Mapping[str, float], dtype: torch.dtype) -> None:
    encoder = make_text_encoder(gains)
    seen = peaks(encoder, ("down_proj", "o_proj"))
    expected = encoder([IDS])[0]
    if gains:
        assert min(seen.values()) > FLOAT16_MAX, seen
        assert expected.abs().max() > FLOAT16_MAX  # the residual stream itself
    encoder.compute_dtype = dtype
    ours = encoder([IDS])[0]
    assert ours.dtype == torch.float32
    assert torch.isfinite(ours).all()
    assert relative_l2(ours, expected) < TOLERANCE[dtype]


def test_text_encoder_runs_all_layers_but_the_last() -> None:
    ran = []
    encoder = make_text_encoder({})
    for i, layer in enumerate(encoder.model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    encoder([IDS])
    assert ran == [0, 1, 2]


def test_tokens_do_not_see_what_follows() -> None:
    encoder = make_text_encoder({})
    torch.testing.assert_close(encoder([IDS])[0][:4], encoder([IDS[:4]])[0], rtol=1e-5, atol=1e-5)
