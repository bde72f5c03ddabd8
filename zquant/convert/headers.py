"""The header of every file a conversion writes: sizes, tokenizer, chat template, list of tensors.

    dit            GGUF, architecture lumina2
    text_encoder   GGUF, architecture qwen3, with everything llama.cpp needs to run it
    vae            safetensors

The sizes are read off the tensors, and the tensors compared with the network of that size, so that
an incomplete source is refused before anything is written.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from zquant.errors import CheckpointError
from zquant.formats.gguf_file import gguf_header
from zquant.formats.model_folder import OFFICIAL_FILES, source_metadata
from zquant.formats.names import Part
from zquant.formats.origin import Origin
from zquant.formats.remote import AnyPath
from zquant.formats.safetensors_file import safetensors_header
from zquant.formats.source import HeaderPlan, WeightSource
from zquant.models.build import check_names, on_meta
from zquant.models.config import NORM_GROUPS, DiTConfig, TextEncoderConfig, VAEConfig
from zquant.models.dit import DiT
from zquant.models.text_encoder import TextEncoder
from zquant.models.tokenizer import Vocabulary, gguf_metadata
from zquant.models.vae import VAE
from zquant.quant.qtypes import QType

__all__ = ["Listed", "Metadata", "check_network", "describe", "file_header"]

C = TypeVar("C")
Listed = list[tuple[str, QType, tuple[int, ...]]]
Metadata = dict[str, Any]

ARCHITECTURES = {"dit": "lumina2", "text_encoder": "qwen3"}
FILE_TYPES = {  # llama.cpp's general.file_type
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "BF16": 32,
}


def describe(
    component: str, origin: Origin, source: WeightSource, parts: Mapping[str, Part]
) -> Metadata:
    """What the component's file says of the network.

    Raises:
        CheckpointError: tensors are missing, unexpected or of the wrong shape.
    """
    config = check_network(component, source, parts)
    if isinstance(config, VAEConfig):
        groups = config.norm_groups
        return {} if groups == NORM_GROUPS else {"norm_num_groups": str(groups)}
    if isinstance(config, DiTConfig):
        network = _dit_metadata(config)
    else:
        vocabulary = _vocabulary(origin, source)
        n_rows = config.vocab_size
        tokenizer = _about(source.path, lambda: gguf_metadata(vocabulary, n_rows))
        network = _text_encoder_metadata(config) | tokenizer
    name = _model_name(origin, source)
    return {"general.name": name, "general.quantization_version": 2, **network}


def check_network(
    component: str, source: WeightSource, parts: Mapping[str, Part]
) -> DiTConfig | TextEncoderConfig | VAEConfig:
    """The sizes of the network that the tensors make; they must be all of it and nothing else.

    Raises:
        CheckpointError: tensors are missing, unexpected or of the wrong shape.
    """
    shapes = {name: part.shape for name, part in parts.items()}
    metadata = source_metadata(source)
    if component == "vae":
        vae = _about(source.path, lambda: VAEConfig.from_shapes(shapes, metadata))
        check_names(on_meta(lambda: VAE(vae)), parts, str(source.path))
        return vae
    if component == "dit":
        dit = _about(source.path, lambda: DiTConfig.from_shapes(shapes, metadata))
        check_names(on_meta(lambda: DiT(dit)), parts, str(source.path))
        return dit
    encoder = _about(source.path, lambda: TextEncoderConfig.from_shapes(shapes, metadata))
    unused = ("model.norm.", f"model.layers.{encoder.n_layers - 1}.")
    check_names(on_meta(lambda: TextEncoder(encoder)), parts, str(source.path), unused=unused)
    return encoder


def file_header(component: str, policy: str, metadata: Metadata, tensors: Listed) -> HeaderPlan:
    """Header of the component's file, and where each tensor goes.

    Args:
        component: one of `zquant.formats.names.COMPONENTS`.
        policy: one of `zquant.quant.policy.POLICIES`; any other has no file type, and readers
            call the file after its most frequent one.
        metadata: from `describe`.
        tensors: (file name, type, shape) in the order of the data.
    """
    if component == "vae":
        return safetensors_header(tensors, {"format": "pt", **metadata})
    file_type = {"general.file_type": FILE_TYPES[policy]} if policy in FILE_TYPES else {}
    pairs = {**metadata, **file_type}
    return gguf_header(ARCHITECTURES[component], pairs, tensors)


def _about(where: AnyPath, read: Callable[[], C]) -> C:
    """`read()`, which looks at tensors only; its complaint gets the name of their file."""
    try:
        return read()
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _model_name(origin: Origin, source: WeightSource) -> str:
    """`general.name`: a GGUF's own, else the name of the single file or of the whole model."""
    own = source.metadata.get("general.name")
    if isinstance(own, str) and own:
        return own
    single = source.path.is_file() and source.path.name not in OFFICIAL_FILES
    return source.path.stem if single else origin.name


def _vocabulary(origin: Origin, source: WeightSource) -> Vocabulary:
    """The source's own tokenizer; single safetensors files have none and get the bundled one."""
    if "tokenizer.ggml.tokens" in source.metadata:
        return Vocabulary.from_gguf(source.metadata, str(source.path))
    if origin.tokenizer is not None:
        return Vocabulary.from_folder(origin.tokenizer)
    return Vocabulary.bundled()


def _dit_metadata(config: DiTConfig) -> Metadata:
    return {
        "lumina2.block_count": config.n_layers,
        "lumina2.embedding_length": config.dim,
        "lumina2.feed_forward_length": config.hidden_dim,
        "lumina2.attention.head_count": config.n_heads,
        "lumina2.attention.layer_norm_rms_epsilon": config.norm_eps,
        "lumina2.rope.freq_base": config.rope_theta,
        "lumina2.rope.dimension_sections": list(config.axes_dims),
    }


def _text_encoder_metadata(config: TextEncoderConfig) -> Metadata:
    return {
        "qwen3.block_count": config.n_layers,
        "qwen3.context_length": 40960,
        "qwen3.embedding_length": config.hidden_size,
        "qwen3.feed_forward_length": config.intermediate_size,
        "qwen3.attention.head_count": config.n_heads,
        "qwen3.attention.head_count_kv": config.n_kv_heads,
        "qwen3.attention.key_length": config.head_dim,
        "qwen3.attention.value_length": config.head_dim,
        "qwen3.attention.layer_norm_rms_epsilon": config.norm_eps,
        "qwen3.rope.freq_base": config.rope_theta,
    }
