"""What a conversion will write: every file, tensor, qtype and byte, before any work starts.

Headers of the sources are read, weights are not.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import zquant
from zquant.errors import CheckpointError
from zquant.formats.detect import open_source
from zquant.formats.gguf_file import gguf_header
from zquant.formats.model_folder import VARIANTS, Variant, source_metadata
from zquant.formats.names import (
    COMPONENTS,
    Part,
    dit_file_names,
    dit_parts,
    text_encoder_file_names,
    text_encoder_parts,
    vae_file_names,
    vae_file_shape,
    vae_parts,
)
from zquant.formats.origin import Origin, find_origin
from zquant.formats.safetensors_file import safetensors_header
from zquant.formats.source import WeightSource
from zquant.models.build import check_names, on_meta
from zquant.models.config import DiTConfig, TextEncoderConfig, VAEConfig
from zquant.models.dit import DiT
from zquant.models.text_encoder import TextEncoder
from zquant.models.tokenizer import Vocabulary, gguf_metadata
from zquant.models.vae import VAE
from zquant.quant.policy import Component, assign, policy_by_name
from zquant.quant.qtypes import QType

__all__ = ["ConversionPlan", "ConvertRequest", "Output", "OutputTensor", "plan_conversion"]

FILE_TYPES = {  # llama.cpp's general.file_type
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q8_0": 7,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "BF16": 32,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertRequest:
    """What to convert, into what.

    Attributes:
        out: folder to write; created if absent.
        source: folder, all-in-one file or Hugging Face id; None if all files are given.
        dit: a single file, in place of the source's; likewise `text_encoder` and `vae`.
        text_encoder: see `dit`.
        vae: see `dit`.
        qtype: a policy of `zquant.quant.policy`.
        text_encoder_qtype: the text encoder's policy; None: `qtype`.
        tensor_types: (regular expression on file names, qtype), before the policy's rules.
        variant: "turbo" or "base" where the source does not say; None: Turbo.
        allow_requantize: accept sources that are quantized already.
        threads: None: one per core.
        resume: go on from the `.part` files of an interrupted run.
    """

    out: Path
    source: str | None = None
    dit: Path | None = None
    text_encoder: Path | None = None
    vae: Path | None = None
    qtype: str = "Q4_K_M"
    text_encoder_qtype: str | None = None
    tensor_types: tuple[tuple[str, QType], ...] = ()
    variant: str | None = None
    allow_requantize: bool = False
    threads: int | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if self.variant is not None and self.variant not in VARIANTS:
            raise ValueError(f"variant {self.variant!r} is unknown; known: {', '.join(VARIANTS)}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}; it must be at least 1")
        for pattern, _ in self.tensor_types:
            _check_pattern(pattern)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputTensor:
    """A tensor to write: the rows of `parts`, one after another, as `qtype`."""

    name: str
    qtype: QType
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    offset: int

    @property
    def n_weights(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return self.n_weights // self.qtype.qblock * self.qtype.qblock_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A file to write: `header`, then every tensor at its offset, zeros up to `total_size`."""

    component: str
    path: Path
    policy: str
    header: bytes
    tensors: tuple[OutputTensor, ...]
    total_size: int
    source: WeightSource

    @property
    def n_weights(self) -> int:
        """Number of weights in the file."""
        return sum(t.n_weights for t in self.tensors)

    @property
    def bpw(self) -> float:
        """Stored bits per weight."""
        return 8 * sum(t.nbytes for t in self.tensors) / self.n_weights

    @property
    def fingerprint(self) -> str:
        """Changes with the source, the options and the version: what a resumed run must share."""
        stamps = [reader.stamp for reader in self.source.readers]
        what = [zquant.__version__, hashlib.sha256(self.header).hexdigest(), stamps]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionPlan:
    """Everything a conversion will do."""

    request: ConvertRequest
    origin: Origin
    variant: Variant
    outputs: tuple[Output, ...]

    @property
    def total_size(self) -> int:
        """Bytes of all files."""
        return sum(output.total_size for output in self.outputs)

    @property
    def n_weights(self) -> int:
        """Weights of all files."""
        return sum(output.n_weights for output in self.outputs)


@dataclass(frozen=True, slots=True)
class _Component:
    """How one component is read and named."""

    parts: Callable[[WeightSource], dict[str, Part]]
    file_names: Callable[[Iterable[str]], list[tuple[str, tuple[str, ...]]]]


_COMPONENTS = {
    "dit": _Component(dit_parts, dit_file_names),
    "text_encoder": _Component(text_encoder_parts, text_encoder_file_names),
    "vae": _Component(vae_parts, vae_file_names),
}


def plan_conversion(request: ConvertRequest) -> ConversionPlan:
    """Read the headers and decide everything.

    Raises:
        ZQuantError: the source is missing, damaged, another model, or quantized already.
        ValueError: a policy or tensor type is unknown or impossible.
    """
    policies = {c: policy_by_name(request.qtype) for c in COMPONENTS}
    if request.text_encoder_qtype:
        policies["text_encoder"] = policy_by_name(request.text_encoder_qtype)
    files = {"dit": request.dit, "text_encoder": request.text_encoder, "vae": request.vae}
    origin = find_origin(request.source, {c: path for c, path in files.items() if path})
    variant = VARIANTS[request.variant] if request.variant else origin.variant
    outputs = tuple(_output(request, origin, c, policies[c]) for c in COMPONENTS)
    _check_overrides(request, outputs)
    return ConversionPlan(
        request=request, origin=origin, variant=variant or VARIANTS["turbo"], outputs=outputs
    )


def _output(request: ConvertRequest, origin: Origin, component: str, policy: str) -> Output:
    source = open_source(origin.paths[component])
    parts = _COMPONENTS[component].parts(source)
    _refuse_quantized(request, source, parts)
    names = _COMPONENTS[component].file_names(parts)
    shapes = {n: _joined_shape(component, n, [parts[p] for p in ours]) for n, ours in names}
    if component == "vae":
        qtypes = {name: parts[ours[0]].qtype for name, ours in names}
    else:
        overrides = [o for o in request.tensor_types if any(re.search(o[0], n) for n in shapes)]
        network: Component = "dit" if component == "dit" else "text_encoder"
        qtypes = assign(network, shapes, policy, overrides)
    listed = [(name, qtypes[name], shapes[name]) for name, _ in names]
    if component == "vae":
        config = VAEConfig.from_shapes(_shapes(parts))
        check_names(on_meta(lambda: VAE(config)), parts, str(source.path))
        header = safetensors_header(listed, {"format": "pt"})
        file = "vae.safetensors"
    else:
        describe = _dit_metadata if component == "dit" else _text_encoder_metadata
        architecture, metadata = describe(origin, source, parts)
        metadata["general.file_type"] = FILE_TYPES[policy]
        header = gguf_header(architecture, metadata, listed)
        file = f"{component}-{policy}.gguf"
    tensors = tuple(
        OutputTensor(
            name=name,
            qtype=qtypes[name],
            shape=shapes[name],
            parts=tuple(parts[p] for p in ours),
            offset=offset,
        )
        for (name, ours), offset in zip(names, header.offsets, strict=True)
    )
    return Output(
        component=component,
        path=request.out / file,
        policy=policy,
        header=header.header,
        tensors=tensors,
        total_size=header.total_size,
        source=source,
    )


def _shapes(parts: Mapping[str, Part]) -> dict[str, tuple[int, ...]]:
    return {name: part.shape for name, part in parts.items()}


def _joined_shape(component: str, name: str, parts: list[Part]) -> tuple[int, ...]:
    """Shape in the output: rows added up, the VAE's attention as convolutions."""
    shape = parts[0].shape
    if len(parts) > 1:
        shape = (sum(part.shape[0] for part in parts), *shape[1:])
    return vae_file_shape(name, shape) if component == "vae" else shape


def _refuse_quantized(
    request: ConvertRequest, source: WeightSource, parts: Mapping[str, Part]
) -> None:
    packed = [(name, part.qtype) for name, part in parts.items() if not part.qtype.is_float]
    if packed and not request.allow_requantize:
        raise CheckpointError(
            f"{source.path}: {len(packed)} of {len(parts)} tensors are quantized already (first: "
            f"{packed[0][0]!r}, {packed[0][1]}); quantizing again adds error on error. Convert the "
            f"original, or accept the loss with --allow-requantize."
        )


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--tensor-type {pattern!r} is no regular expression: {error}") from error


def _check_overrides(request: ConvertRequest, outputs: tuple[Output, ...]) -> None:
    """Every --tensor-type must say something about some tensor."""
    names = [t.name for output in outputs if output.component != "vae" for t in output.tensors]
    for pattern, qtype in request.tensor_types:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(f"--tensor-type {pattern}={qtype} matches no tensor; see --dry-run")


def _dit_metadata(
    origin: Origin, source: WeightSource, parts: Mapping[str, Part]
) -> tuple[str, dict[str, Any]]:
    config = DiTConfig.from_shapes(_shapes(parts), source_metadata(source))
    check_names(on_meta(lambda: DiT(config)), parts, str(source.path))
    return "lumina2", {
        "general.name": origin.label_name("Z-Image"),
        "general.quantization_version": 2,
        "lumina2.block_count": config.n_layers,
        "lumina2.embedding_length": config.dim,
        "lumina2.feed_forward_length": config.hidden_dim,
        "lumina2.attention.head_count": config.n_heads,
        "lumina2.attention.layer_norm_rms_epsilon": config.norm_eps,
        "lumina2.rope.freq_base": config.rope_theta,
        "lumina2.rope.dimension_sections": list(config.axes_dims),
    }


def _text_encoder_metadata(
    origin: Origin, source: WeightSource, parts: Mapping[str, Part]
) -> tuple[str, dict[str, Any]]:
    config = TextEncoderConfig.from_shapes(_shapes(parts), source_metadata(source))
    unused = ("model.norm.", f"model.layers.{config.n_layers - 1}.")
    check_names(on_meta(lambda: TextEncoder(config)), parts, str(source.path), unused=unused)
    if "tokenizer.ggml.tokens" in source.metadata:
        vocabulary = Vocabulary.from_gguf(source.metadata, str(source.path))
    elif origin.tokenizer is not None:
        vocabulary = Vocabulary.from_folder(origin.tokenizer)
    else:
        vocabulary = Vocabulary.bundled()
    return "qwen3", {
        "general.name": origin.label_name("Qwen3"),
        "general.quantization_version": 2,
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
        **gguf_metadata(vocabulary, config.vocab_size),
    }
