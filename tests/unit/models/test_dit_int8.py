"""The DiT in int8 against the same weights multiplied exactly."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from zquant.layers.compute import Compute
from zquant.layers.linear import QuantLinear
from zquant.models import dit_block
from zquant.models.config import DiTConfig
from zquant.models.dit import DiT
from zquant.quant.codec import quantize
from zquant.quant.qtypes import QTYPES

EXACT = Compute(dtype=torch.float32)
INT8 = Compute(dtype=torch.float32, int8=True)


def toy_dit() -> DiT:
    config = DiTConfig(
        dim=192,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        cap_feat_dim=64,
        in_channels=16,
        patch_size=2,
        axes_dims=(16, 24, 24),
        rope_theta=256.0,
        norm_eps=1e-5,
        t_scale=1000.0,
    )
    dit, rng = DiT(config), np.random.default_rng(0)
    for module in dit.modules():
        for value in module.parameters(recurse=False):
            if value.is_floating_point():
                value.copy_(torch.from_numpy(rng.standard_normal(value.shape, np.float32)) * 0.1)
        if isinstance(module, QuantLinear):
            shape = (module.out_features, module.in_features)
            weights = rng.standard_normal(shape, np.float32) / np.float32(math.sqrt(shape[1]))
            module.load(torch.from_numpy(quantize(weights, QTYPES["Q8_0"])), QTYPES["Q8_0"])
    for name, value in dit.named_parameters():
        if "norm" in name:
            value.fill_(1)
    return dit


@pytest.fixture(scope="module")
def dit() -> DiT:
    return toy_dit()


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(dit: DiT, compute: Compute) -> Tensor:
    dit.use(compute)
    return dit(noise(1, 16, 12, 10, seed=1), 0.3, noise(11, 64, seed=2))


def groups(dit: DiT) -> Mapping[str, Mapping[str, int | None]]:
    return {name: dict(block.groups) for name, block in dit.blocks()}


def relative_l2(ours: Tensor, expected: Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("attention", [False, True], ids=["sdpa", "int8 attention"])
def test_int8_is_near_exact(dit, attention):
    expected = run(dit, EXACT)
    compute = Compute(dtype=torch.float32, int8=True, int8_attention=attention)
    # a linear errs by about 1 %, and three blocks in a row add up
    assert 1e-4 < relative_l2(run(dit, compute), expected) < 0.03
    assert torch.equal(run(dit, EXACT), expected)


def test_the_table_says_which_linears_stay_exact(dit, monkeypatch):
    dit.use(INT8)
    assert set(groups(dit)["context_refiner.0"].values()) == {None}
    assert groups(dit)["layers.0"] == {"qkv": 64, "out": 64, "w13": 64, "w2": 256}
    monkeypatch.setattr(dit_block, "EXACT", (("layers.*", "w2", "for the test"),))
    dit.use(INT8)
    assert groups(dit)["layers.1"] == {"qkv": 64, "out": 64, "w13": 64, "w2": None}
    assert groups(dit)["context_refiner.0"]["w2"] == 256
    assert dit_block.why_exact("layers.1", "w2") == "for the test"


def test_mixed_exact_and_int8_inputs_run(dit, monkeypatch):
    expected = run(dit, EXACT)
    for keys in ("qkv", "out", "w13", "w2"):
        monkeypatch.setattr(dit_block, "EXACT", (("*", keys, "for the test"),))
        assert 1e-4 < relative_l2(run(dit, INT8), expected) < 0.03


def test_feed_forward_in_chunks_gives_the_same_picture(dit, monkeypatch):
    expected = {c: run(dit, c) for c in (EXACT, INT8)}
    monkeypatch.setattr(dit_block, "FFN_TOKENS", 20)
    for compute, whole in expected.items():
        # a product of fewer rows may be summed in another order
        torch.testing.assert_close(run(dit, compute), whole, rtol=1e-4, atol=1e-4)


def test_a_block_works_in_the_memory_of_its_input_and_sums_both_halves(dit):
    dit.use(EXACT)
    (_, block), *_ = dit.blocks()
    x, sums = noise(1, 32, 192, seed=3), torch.zeros(2)
    kept = x.clone()
    angles = torch.zeros(32, 32)
    out = block(x, (angles.cos(), angles.sin()), None, EXACT, sums)
    assert out.data_ptr() == x.data_ptr()
    assert not torch.equal(out, kept)
    torch.testing.assert_close(sums[1], out.sum())
    assert sums[0] not in (0, sums[1])


def test_float32_weights_stay_exact():
    dit = toy_dit()
    for module in dit.modules():
        if isinstance(module, QuantLinear):
            shape = (module.out_features, 4 * module.in_features)
            module.load(torch.zeros(shape, dtype=torch.uint8), QTYPES["F32"])
    dit.use(INT8)
    assert {g for block in groups(dit).values() for g in block.values()} == {None}
