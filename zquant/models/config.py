"""Sizes of the three networks: frozen, without defaults, read from the weights they describe.

Names and shapes of the tensors say almost everything; what they cannot say (axis split of an
unusual head, eps, rope bases, latent scaling) are constants of the Z-Image family, which a file's
own metadata may override.

Source: the official Z-Image config files.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zquant.errors import CheckpointError

__all__ = ["NORM_GROUPS", "DiTConfig", "TextEncoderConfig", "VAEConfig"]

Shapes = Mapping[str, tuple[int, ...]]

AXES_DIMS = {128: (32, 48, 48)}  # head_dim -> rotary dims of the axes t, y, x
NORM_GROUPS = 32  # of the autoencoder, unless its metadata says otherwise
MAX_NORM_GROUPS = 1024


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
            CheckpointError: the sizes are not those of such a network, or the head width is unusual
                and `metadata` gives no axis split.
        """
        dim, patch_features = _dims(shapes, "all_x_embedder.2-1.weight", 2)
        (head_dim,) = _dims(shapes, "layers.0.attention.norm_q.weight", 1)
        axes = _axes(metadata.get("lumina2.rope.dimension_sections"), head_dim)
        _check_divides("attention heads", head_dim, "the model width", dim)
        _check_divides("a patch of 2x2", 4, "the patch features", patch_features)
        return cls(
            dim=dim,
            n_layers=_count(shapes, "layers."),
            n_refiner_layers=_count(shapes, "noise_refiner."),
            n_heads=dim // head_dim,
            in_channels=patch_features // 4,
            patch_size=2,
            cap_feat_dim=_dims(shapes, "cap_embedder.1.weight", 2)[1],
            axes_dims=axes,
            rope_theta=_positive(metadata, "lumina2.rope.freq_base", 256.0),
            norm_eps=_positive(metadata, "lumina2.attention.layer_norm_rms_epsilon", 1e-5),
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
        """Read the sizes off Hugging Face tensor names and torch shapes.

        Raises:
            CheckpointError: the sizes are not those of such a network.
        """
        attn, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
        (head_dim,) = _dims(shapes, f"{attn}.q_norm.weight", 1)
        vocab_size, hidden_size = _dims(shapes, "model.embed_tokens.weight", 2)
        q_width = _dims(shapes, f"{attn}.q_proj.weight", 2)[0]
        kv_width = _dims(shapes, f"{attn}.k_proj.weight", 2)[0]
        _check_divides("key heads", head_dim, "the key width", kv_width)
        _check_divides("shared key heads", kv_width, "the query width", q_width)
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=_dims(shapes, f"{mlp}.gate_proj.weight", 2)[0],
            n_layers=_count(shapes, "model.layers."),
            n_heads=q_width // head_dim,
            n_kv_heads=kv_width // head_dim,
            head_dim=head_dim,
            rope_theta=_positive(metadata, "qwen3.rope.freq_base", 1e6),
            norm_eps=_positive(metadata, "qwen3.attention.layer_norm_rms_epsilon", 1e-6),
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
    def from_shapes(cls, shapes: Shapes, metadata: Mapping[str, Any]) -> "VAEConfig":
        """Read the sizes off diffusers tensor names and torch shapes.

        The groups of the norms leave no trace in the shapes: `norm_num_groups` of `metadata` (a
        number, or its text as safetensors has it) tells them.

        Raises:
            CheckpointError: the sizes are not those of such a network.
        """
        levels = _count(shapes, "decoder.up_blocks.")
        ups = [f"decoder.up_blocks.{i}.resnets.0.conv1.weight" for i in range(levels)]
        channels = tuple(_dims(shapes, name, 4)[0] for name in reversed(ups))
        groups = _norm_groups(metadata.get("norm_num_groups", NORM_GROUPS))
        for n in channels:
            _check_divides("norm groups", groups, "the channels", n)
        return cls(
            in_channels=_dims(shapes, "decoder.conv_out.weight", 4)[0],
            latent_channels=_dims(shapes, "decoder.conv_in.weight", 4)[1],
            block_out_channels=channels,
            layers_per_block=_count(shapes, "decoder.up_blocks.0.resnets.") - 1,
            norm_groups=groups,
            use_quant_conv="post_quant_conv.weight" in shapes,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        )


def _count(shapes: Shapes, prefix: str) -> int:
    """How many consecutive numbers, from 0, follow `prefix`."""
    pattern = re.compile(re.escape(prefix) + r"(\d{1,6})\.")
    found = {int(match[1]) for name in shapes if (match := pattern.match(name))}
    n = 0
    while n in found:
        n += 1
    return n


def _dims(shapes: Shapes, name: str, n_dims: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there, with `n_dims` dimensions and no empty one."""
    if name not in shapes:
        raise CheckpointError(
            f"tensor {name!r} is missing. The file may be incomplete; download or convert it again."
        )
    shape = tuple(shapes[name])
    if len(shape) != n_dims or min(shape) < 1:
        raise CheckpointError(
            f"tensor {name!r} has shape {list(shape)}; expected {n_dims} dimensions of at least 1. "
            f"The file is damaged or belongs to another model."
        )
    return shape


def _check_divides(what: str, size: int, whole_name: str, whole: int) -> None:
    if whole % size:
        raise CheckpointError(
            f"{what} of {size} do not divide {whole_name} of {whole}. The file belongs to another "
            f"model."
        )


def _axes(given: Any, head_dim: int) -> tuple[int, ...]:
    """The rotary dims of the axes t, y, x, from the metadata or by the head width."""
    axes = AXES_DIMS.get(head_dim, ()) if given is None else given
    is_split = (
        isinstance(axes, (list, tuple))
        and len(axes) == 3
        and all(isinstance(a, int) and a > 0 and a % 2 == 0 for a in axes)
        and sum(axes) == head_dim
    )
    if not is_split:
        raise CheckpointError(
            f"attention heads are {head_dim} wide and the axis split is {given!r:.80}; Z-Image has "
            f"heads of 128 split 32 + 48 + 48. This is not a Z-Image transformer."
        )
    return tuple(int(a) for a in axes)


def _norm_groups(given: Any) -> int:
    """A number of norm groups from a config or from text."""
    text = str(given) if isinstance(given, (int, str)) and not isinstance(given, bool) else ""
    digits = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_NORM_GROUPS))
    if not (digits and 1 <= int(text) <= MAX_NORM_GROUPS):
        raise CheckpointError(
            f"metadata 'norm_num_groups' is {given!r:.80}; expected a whole number from 1 to "
            f"{MAX_NORM_GROUPS}. Download or convert the file again."
        )
    return int(text)


def _positive(metadata: Mapping[str, Any], key: str, default: float) -> float:
    """A positive finite number of the metadata."""
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise CheckpointError(
            f"metadata {key!r} is {value!r:.80}; expected a positive number such as {default:g}. "
            f"Download or convert the file again."
        )
    return float(value)
