"""The tensors of a file as parts of a model, under the official (diffusers, Hugging Face) names.

A part is a stored tensor or a range of its rows: a fused qkv weight gives three parts without
copying. Names and shapes are looked at, weights are not. A file that is another model is refused
with a guess at what it is; single missing or unexpected tensors are for the loader to report.

Source: checkpoint layouts as published; `spellings.py` has the names.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from zquant.errors import CheckpointError, FormatError
from zquant.formats.scales import with_scales
from zquant.formats.source import TensorInfo, WeightSource
from zquant.formats.spellings import (
    dit_file_names,
    dit_official,
    text_encoder_file_names,
    text_encoder_official,
    vae_file_names,
    vae_official,
)
from zquant.formats.strays import is_stray
from zquant.quant.codec import dequantize
from zquant.quant.qtypes import QType
from zquant.quant.scaled import Scaling

__all__ = [
    "COMPONENTS",
    "Part",
    "components_in",
    "dit_file_names",
    "dit_parts",
    "strays_of",
    "text_encoder_file_names",
    "text_encoder_parts",
    "vae_file_names",
    "vae_file_shape",
    "vae_parts",
]

COMPONENTS = ("dit", "text_encoder", "vae")

_OFFICIAL = {
    "dit": dit_official,
    "text_encoder": text_encoder_official,
    "vae": vae_official,
}
_PREFIXES = {  # of each component inside an all-in-one file
    "dit": ("model.diffusion_model.", "diffusion_model.", "transformer."),
    "text_encoder": ("text_encoders.qwen3_4b.transformer.",),
    "vae": ("vae.", "first_stage_model."),
}
_ANY_PREFIX = (*_PREFIXES["dit"], "text_encoders.", "vae.", "first_stage_model.")
_TITLES = {"dit": "a Z-Image DiT", "text_encoder": "a Qwen3 text encoder", "vae": "a FLUX-type VAE"}
_MARKERS = {  # tensors without which a file is not the component, and their number of dimensions
    "dit": {"layers.0.adaLN_modulation.0.weight": 2, "cap_embedder.1.weight": 2},
    "text_encoder": {"model.embed_tokens.weight": 2, "model.layers.0.self_attn.q_norm.weight": 1},
    "vae": {"decoder.conv_in.weight": 4, "decoder.mid_block.resnets.0.conv1.weight": 4},
}
_UNET = "Stable Diffusion or SDXL"
_LOOKS_LIKE = (  # first match wins; the LoRA test is first because its names contain the others
    (re.compile(r"lora_|\.lora\.|lokr_|loha_|lycoris_"), "a LoRA"),
    (re.compile(r"control_layers\."), "a ControlNet"),
    (re.compile(r"double_blocks\.|single_transformer_blocks\."), "FLUX"),
    (re.compile(r"transformer_blocks\.\d+\.(img|txt)_mod\."), "Qwen-Image"),
    (re.compile(r"joint_blocks\.|transformer_blocks\.\d+\.norm1_context\."), "Stable Diffusion 3"),
    # a VAE has such blocks in its encoder
    (re.compile(r"input_blocks\.|time_embed\.|(?<!encoder\.)down_blocks\."), _UNET),
    (re.compile(r"layers\.0\.adaLN_modulation\.1\."), "Lumina-Image 2.0"),
    (re.compile(r"cap_embedder\.|layers\.\d+\.adaLN_modulation\.0\."), _TITLES["dit"]),
    (re.compile(r"embed_tokens\.|token_embd\.|self_attn\.|\bblk\.\d+\."), "a language model"),
    (re.compile(r"(en|de)coder\.conv_in\."), "a VAE"),
)
_PAD_TOKENS = {"x_pad_token", "cap_pad_token", "siglip_pad_token"}
_VAE_ATTENTION = re.compile(r".*\.attentions\.0\.to_(q|k|v|out\.0)\.weight")
_VAE_FILE_ATTENTION = re.compile(r".*\.mid\.attn_1\.(q|k|v|proj_out)\.weight")


@dataclass(frozen=True, slots=True)
class Part:
    """A whole stored tensor, or a range of its rows, under an official name.

    `rows` is a range of dimension 0 of `info.shape`; `shape` is what the model expects, in torch
    order. Quantized rows are whole qblocks, so the bytes of a range are contiguous.
    """

    info: TensorInfo
    rows: tuple[int, int] | None
    shape: tuple[int, ...]

    @property
    def qtype(self) -> QType:
        """How the weights are stored."""
        return self.info.qtype

    @property
    def nbytes(self) -> int:
        """Stored bytes of this part."""
        if self.rows is None:
            return self.info.nbytes
        return (self.rows[1] - self.rows[0]) * (self.info.nbytes // self.info.shape[0])

    @property
    def offset(self) -> int:
        """Where the part begins in its file."""
        if self.rows is None:
            return self.info.offset
        return self.info.offset + self.rows[0] * (self.info.nbytes // self.info.shape[0])

    @property
    def scaling(self) -> Scaling | None:
        """What the decoded rows of this part still need, on the CPU; None for most.

        Raises:
            FormatError: a scale is NaN or infinite.
        """
        scale = self.info.scale
        if scale is None:
            return None
        stored = torch.from_numpy(scale.reader.read(scale.offset, scale.nbytes))
        factors = dequantize(stored.view(1, -1), scale.qtype, torch.float32).view(-1)
        if not factors.isfinite().all():
            raise FormatError(
                f"{scale.reader.name}: tensor {scale.name!r} holds NaN or infinity; expected "
                "finite scales. The file is damaged; download it again."
            )
        whole = Scaling(factors, self.info.rotation)
        return whole if self.rows is None else whole.of(slice(*self.rows))

    def raw(self) -> npt.NDArray[np.uint8]:
        """Stored bytes of this part, uint8 `[nbytes]`; a view where the file is mapped."""
        return self.info.reader.read(self.offset, self.nbytes)

    def read_into(self, start: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out` with stored bytes of this part, from byte `start` of it."""
        self.info.reader.read_into(self.offset + start, out)


def dit_parts(source: WeightSource) -> dict[str, Part]:
    """Every DiT tensor of `source` under its diffusers name; pad tokens are `[1, D]`.

    Raises:
        CheckpointError: not a Z-Image DiT, or a tensor is there twice.
    """
    return _checked("dit", source)


def text_encoder_parts(source: WeightSource) -> dict[str, Part]:
    """Every Qwen3 tensor of `source` under its Hugging Face name (`model.layers...`).

    The output head is left out: the text encoder ends before it.

    Raises:
        CheckpointError: not a Qwen3 model, or a tensor is there twice.
    """
    return _checked("text_encoder", source)


def vae_parts(source: WeightSource) -> dict[str, Part]:
    """Every VAE tensor of `source` under its diffusers name; attention weights are 2-D.

    Raises:
        CheckpointError: not such a VAE, or a tensor is there twice.
    """
    return _checked("vae", source)


def components_in(source: WeightSource) -> tuple[str, ...]:
    """Which of `COMPONENTS` the file holds: several in an all-in-one file, none in another model.

    Raises:
        CheckpointError: a tensor is there twice.
    """
    return tuple(c for c in COMPONENTS if not _missing_markers(c, _translated(c, source)))


def strays_of(component: str, source: WeightSource) -> list[str]:
    """Names in the file of the component's tensors that are left out because no network has them.

    Raises:
        FormatError: a weight is of a type or format that zquant cannot read.
    """
    tensors = with_scales(_of_component(component, source.tensors), source.metadata)
    return [info.name for name, info in tensors.items() if is_stray(name, info)]


def vae_file_shape(file_name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` as latent-diffusion stores it: attention weights are 1x1 convolutions."""
    if len(shape) == 2 and _VAE_FILE_ATTENTION.fullmatch(file_name):
        return (*shape, 1, 1)
    return shape


def _checked(component: str, source: WeightSource) -> dict[str, Part]:
    parts = _translated(component, source)
    if missing := _missing_markers(component, parts):
        raise CheckpointError(_wrong_model(component, source, missing[0]))
    return parts


def _missing_markers(component: str, parts: Mapping[str, Part]) -> list[str]:
    return [
        name
        for name, n_dims in _MARKERS[component].items()
        if name not in parts or len(parts[name].shape) != n_dims
    ]


def _wrong_model(component: str, source: WeightSource, missing: str) -> str:
    """Message: what was wanted, what the file seems to hold, what to do."""
    title, names = _TITLES[component], list(source.tensors)
    guess = next((g for p, g in _LOOKS_LIKE if any(p.search(n) for n in names)), "an unknown model")
    remedy = f"Give {title} as .gguf, .safetensors or a folder with its index."
    if guess == title:
        guess, remedy = "an incomplete one", "Give the whole model: the folder with its index."
    first = ", ".join(repr(name[:80]) for name in names[:3]) or "none"
    return (
        f"{source.path}: not {title}: tensor {missing!r} is absent or has the wrong number of "
        f"dimensions. It looks like {guess}; {len(names)} tensors, first: {first}. {remedy}"
    )


def _translated(component: str, source: WeightSource) -> dict[str, Part]:
    """Parts of one component in file order, before any check that it is that component."""
    tensors = with_scales(_of_component(component, source.tensors), source.metadata)
    tensors = {name: info for name, info in tensors.items() if not is_stray(name, info)}
    parts: dict[str, Part] = {}
    for name, officials in _OFFICIAL[component](tensors).items():
        info = tensors[name]
        for official, part in zip(officials, _split(info, len(officials)), strict=True):
            if official in parts:
                first = parts[official].info.name
                raise CheckpointError(
                    f"{source.path}: {official!r} is stored twice, as {first!r} and as "
                    f"{info.name!r}; expected once. Save the model again with one naming."
                )
            parts[official] = Part(info, part.rows, _official_shape(official, part.shape))
    return parts


def _of_component(component: str, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Tensors under the component's prefix, prefix removed; without one, all but the others'."""
    for prefix in _PREFIXES[component]:
        if any(name.startswith(prefix) for name in tensors):
            return {n[len(prefix) :]: i for n, i in tensors.items() if n.startswith(prefix)}
    return {name: info for name, info in tensors.items() if not name.startswith(_ANY_PREFIX)}


def _split(info: TensorInfo, n_parts: int) -> list[Part]:
    """`n_parts` equal row ranges of a stored tensor."""
    if n_parts == 1:
        return [Part(info, None, info.shape)]
    if n_parts and (len(info.shape) != 2 or not info.shape[0] or info.shape[0] % n_parts):
        raise CheckpointError(
            f"{info.reader.name}: tensor {info.name!r} is {list(info.shape)}; expected 2 "
            f"dimensions with {n_parts} weights of equally many rows. Download the model again."
        )
    rows = info.shape[0] // n_parts if n_parts else 0
    return [Part(info, (i * rows, i * rows + rows), (rows, info.shape[1])) for i in range(n_parts)]


def _official_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` as the official checkpoint has it: some writers drop or add dimensions of one."""
    if name in _PAD_TOKENS and len(shape) == 1:
        return (1, *shape)
    if _VAE_ATTENTION.fullmatch(name) and shape[2:] == (1, 1):
        return shape[:2]
    return shape
