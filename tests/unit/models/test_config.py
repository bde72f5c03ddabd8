"""Sizes of networks, read off names and shapes; impossible ones are refused with the tensor."""

import time
from typing import Any

import pytest
from checkpoint_layout import CONFIGS, SHAPES

from zquant.errors import CheckpointError
from zquant.models.config import DiTConfig, TextEncoderConfig, VAEConfig

Shapes = dict[str, tuple[int, ...]]


def shapes(component: str) -> Shapes:
    return dict(SHAPES[component](CONFIGS[component]))


def test_the_published_transformer() -> None:
    config = DiTConfig.from_shapes(shapes("transformer"), {})
    assert config == DiTConfig(
        dim=3840,
        n_layers=30,
        n_refiner_layers=2,
        n_heads=30,
        in_channels=16,
        patch_size=2,
        cap_feat_dim=2560,
        axes_dims=(32, 48, 48),
        rope_theta=256.0,
        norm_eps=1e-5,
        t_scale=1000.0,
    )
    assert (config.head_dim, config.hidden_dim, config.adaln_dim) == (128, 10240, 256)


def test_the_published_text_encoder() -> None:
    assert TextEncoderConfig.from_shapes(shapes("text_encoder"), {}) == TextEncoderConfig(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        n_layers=36,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        rope_theta=1e6,
        norm_eps=1e-6,
    )


def test_the_published_autoencoder() -> None:
    config = VAEConfig.from_shapes(shapes("vae"), {})
    assert config == VAEConfig(
        in_channels=3,
        latent_channels=16,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        norm_groups=32,
        use_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    assert config.scale == 8


def test_metadata_says_what_shapes_cannot() -> None:
    config = TextEncoderConfig.from_shapes(shapes("text_encoder"), {"qwen3.rope.freq_base": 5e6})
    assert config.rope_theta == 5e6
    small = {"layers.0.attention.norm_q.weight": (16,)}
    metadata = {"lumina2.rope.dimension_sections": [8, 4, 4]}
    assert DiTConfig.from_shapes(shapes("transformer") | small, metadata).axes_dims == (8, 4, 4)


DIT: dict[str, tuple[Shapes, dict[str, Any], str]] = {
    "matrix of one dimension": (
        {"all_x_embedder.2-1.weight": (3840,)},
        {},
        r"'all_x_embedder.2-1.weight' has shape \[3840\]; expected 2 dimensions",
    ),
    "empty norm": ({"layers.0.attention.norm_q.weight": (0,)}, {}, r"has shape \[0\]; expected 1"),
    "unknown head": (
        {"layers.0.attention.norm_q.weight": (64,)},
        {},
        "heads are 64 wide and the axis split is None; .* not a Z-Image",
    ),
    "heads do not fit": (
        {"all_x_embedder.2-1.weight": (3800, 64)},
        {},
        "attention heads of 128 do not divide the model width of 3800",
    ),
    "axes of text": ({}, {"lumina2.rope.dimension_sections": "abc"}, "axis split is 'abc'"),
    "axes of wrong sum": ({}, {"lumina2.rope.dimension_sections": [32, 48, 50]}, "split is .32, 4"),
    "negative axis": ({}, {"lumina2.rope.dimension_sections": [256, -64, -64]}, "split is .256"),
    "base of text": ({}, {"lumina2.rope.freq_base": "x"}, "'lumina2.rope.freq_base' is 'x'; expec"),
    "base NaN": ({}, {"lumina2.rope.freq_base": float("nan")}, "is nan; expected a positive"),
    "eps 0": ({}, {"lumina2.attention.layer_norm_rms_epsilon": 0}, "is 0; expected a positive"),
}


@pytest.mark.parametrize(("changed", "metadata", "message"), DIT.values(), ids=DIT)
def test_impossible_transformers(changed: Shapes, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        DiTConfig.from_shapes(shapes("transformer") | changed, metadata)


@pytest.mark.parametrize("name", ["all_x_embedder.2-1.weight", "cap_embedder.1.weight"])
def test_a_missing_tensor_is_named(name: str) -> None:
    incomplete = shapes("transformer")
    del incomplete[name]
    with pytest.raises(CheckpointError, match=f"'{name}' is missing"):
        DiTConfig.from_shapes(incomplete, {})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k_proj.weight": (1000, 2560)}, "key heads of 128 do not divide the key width of 1000"),
        ({"q_proj.weight": (1280, 2560)}, "of 1024 do not divide the query width of 1280"),
        ({"q_norm.weight": ()}, r"has shape \[\]; expected 1 dim"),
    ],
    ids=["key heads", "query heads", "scalar norm"],
)
def test_impossible_text_encoders(changed: Shapes, message: str) -> None:
    layer = {f"model.layers.0.self_attn.{n}": s for n, s in changed.items()}
    with pytest.raises(CheckpointError, match=message):
        TextEncoderConfig.from_shapes(shapes("text_encoder") | layer, {})


def test_an_autoencoder_whose_groups_do_not_fit() -> None:
    changed = {"decoder.up_blocks.3.resnets.0.conv1.weight": (100, 256, 3, 3)}
    with pytest.raises(
        CheckpointError, match="norm groups of 32 do not divide the channels of 100"
    ):
        VAEConfig.from_shapes(shapes("vae") | changed, {})
    with pytest.raises(CheckpointError, match="norm groups of 24 do not divide the channels of 12"):
        VAEConfig.from_shapes(shapes("vae"), {"norm_num_groups": 24})


@pytest.mark.parametrize("given", [8, "8", "08"])
def test_metadata_tells_the_norm_groups(given: object) -> None:
    assert VAEConfig.from_shapes(shapes("vae"), {"norm_num_groups": given}).norm_groups == 8


@pytest.mark.parametrize("given", [0, -8, "", "8.0", "²", True, None, 1025, 2**70, "9" * 9])
def test_impossible_norm_groups(given: object) -> None:
    with pytest.raises(
        CheckpointError, match=r"'norm_num_groups' is .*; expected a whole number from 1 to"
    ):
        VAEConfig.from_shapes(shapes("vae"), {"norm_num_groups": given})


def test_counting_blocks_of_a_hostile_file_takes_no_time() -> None:
    many = shapes("transformer") | {f"layers.{i}.x": (1,) for i in range(100_000)}
    start = time.perf_counter()
    assert DiTConfig.from_shapes(many, {}).n_layers == 100_000
    assert time.perf_counter() - start < 5  # 0.1 s; every block searching every name takes hours
