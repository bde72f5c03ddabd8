"""Sizes of the three networks: frozen, without defaults, read from the weights they describe.

Names and shapes of the tensors say almost everything; what they cannot say (axis split of an
unusual head, eps, rope bases, latent scaling) are constants of the Z-Image family, which a file's
own metadata may override.

Source: the official Z-Image config files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zquant.errors import CheckpointError

__all__ = ["DiTConfig", "TextEncoderConfig", "VAEConfig"]

Shapes = Mapping[str, tuple[int, ...]]

AXES_DIMS = {128: (32, 48, 48)}  # head_dim -> rotary dims of the axes t, y, x


@dataclass(frozen=True, slots=True, kw_only=True)
class DiTConfig:
    """The Z-Image transformer."""

    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    in_channels: int
    patch_size: int
    cap_feat_dim: int
    axes_dims: tuple[int, ...]
    rope_theta: float
    norm_eps: float
    t_scale: float

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Inner width of the feed-forward layers."""
        return int(self.dim / 3 * 8)

    @property
    def adaln_dim(self) -> int:
        """Width of the time embedding."""
        return min(self.dim, 256)

    @classmethod
    def from_shapes(cls, shapes: Shapes, metadata: Mapping[str, Any]) -> "DiTConfig":
        """Read the sizes off official tensor names and torch shapes.

        Raises:
            CheckpointError: the head width is unusual and `metadata` gives no axis split.
        """
        dim, patch_features = shapes["all_x_embedder.2-1.weight"]
        head_dim = shapes["layers.0.attention.norm_q.weight"][0]
        axes = metadata.get("lumina2.rope.dimension_sections", AXES_DIMS.get(head_dim))
        if axes is None or sum(axes) != head_dim:
            raise CheckpointError(
                f"attention heads are {head_dim} wide and the axis split is {axes}; Z-Image has "
                f"heads of 128 split 32 + 48 + 48. This is not a Z-Image transformer."
            )
        return cls(
            dim=dim,
            n_layers=_count(shapes, "layers."),
            n_refiner_layers=_count(shapes, "noise_refiner."),
            n_heads=dim // head_dim,
            in_channels=patch_features // 4,
            patch_size=2,
            cap_feat_dim=shapes["cap_embedder.1.weight"][1],
            axes_dims=tuple(int(a) for a in axes),
            rope_theta=float(metadata.get("lumina2.rope.freq_base", 256.0)),
            norm_eps=float(metadata.get("lumina2.attention.layer_norm_rms_epsilon", 1e-5)),
            t_scale=1000.0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderConfig:
    """The Qwen3 decoder that embeds prompts; `n_layers` counts all layers of the checkpoint."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float

    @classmethod
    def from_shapes(cls, shapes: Shapes, metadata: Mapping[str, Any]) -> "TextEncoderConfig":
        """Read the sizes off Hugging Face tensor names and torch shapes."""
        attn, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
        head_dim = shapes[f"{attn}.q_norm.weight"][0]
        vocab_size, hidden_size = shapes["model.embed_tokens.weight"]
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=shapes[f"{mlp}.gate_proj.weight"][0],
            n_layers=_count(shapes, "model.layers."),
            n_heads=shapes[f"{attn}.q_proj.weight"][0] // head_dim,
            n_kv_heads=shapes[f"{attn}.k_proj.weight"][0] // head_dim,
            head_dim=head_dim,
            rope_theta=float(metadata.get("qwen3.rope.freq_base", 1e6)),
            norm_eps=float(metadata.get("qwen3.attention.layer_norm_rms_epsilon", 1e-6)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VAEConfig:
    """The FLUX autoencoder."""

    in_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_groups: int
    use_quant_conv: bool
    scaling_factor: float
    shift_factor: float

    @property
    def scale(self) -> int:
        """Pixels per latent unit."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> "VAEConfig":
        """Read the sizes off diffusers tensor names and torch shapes."""
        levels = _count(shapes, "decoder.up_blocks.")
        ups = [f"decoder.up_blocks.{i}.resnets.0.conv1.weight" for i in range(levels)]
        return cls(
            in_channels=shapes["decoder.conv_out.weight"][0],
            latent_channels=shapes["decoder.conv_in.weight"][1],
            block_out_channels=tuple(shapes[name][0] for name in reversed(ups)),
            layers_per_block=_count(shapes, "decoder.up_blocks.0.resnets.") - 1,
            norm_groups=32,
            use_quant_conv="post_quant_conv.weight" in shapes,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        )


def _count(shapes: Shapes, prefix: str) -> int:
    """How many consecutive numbers, from 0, follow `prefix`."""
    n = 0
    while any(name.startswith(f"{prefix}{n}.") for name in shapes):
        n += 1
    return n
