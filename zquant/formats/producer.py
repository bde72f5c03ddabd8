"""Who wrote a weights file, what it holds, and what is odd about it: for people to read.

Everything but the variant is told by names, types and metadata; nothing here decides whether or how
a file is loaded. Turbo and Base have the same tensors; a well-known guess is that the spread of one
norm is below 0.42 in Turbo only.

Source: the published files of each producer; ComfyUI's test of `ffn_norm1` for the variant.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zquant.errors import CheckpointError, FormatError
from zquant.formats.names import (
    Part,
    components_in,
    dit_parts,
    strays_of,
    text_encoder_parts,
    vae_parts,
)
from zquant.formats.scales import quant_formats
from zquant.formats.source import WeightSource, quoted
from zquant.quant.scaled import dequantize_scaled

__all__ = ["Identity", "identify", "rope_notice"]

ROPE_BASE = 1e6  # of Qwen3-4B, which the model was trained with
ROPE_BASE_2507 = 5e6  # of Qwen3-4B-Instruct-2507, which guides recommend
TURBO_BELOW = 0.42  # deviation of the norm before the feed-forward of the layer before the last
SMALL = ("Q2_K", "Q3_K")
_PARTS = {"dit": dit_parts, "text_encoder": text_encoder_parts, "vae": vae_parts}
_NORM = re.compile(r".*norm.*|.*_pad_token|cap_embedder\.0\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a file is.

    Attributes:
        components: those of `zquant.formats.names.COMPONENTS` in it; none in another model.
        producer: who wrote it, as far as it shows.
        variant: a guess in words; None where there is nothing to guess from.
        notes: what is odd, one sentence each.
    """

    components: list[str]
    producer: str
    variant: str | None
    notes: list[str]


def identify(source: WeightSource) -> Identity:
    """What `source` is; what stands in the way of loading it becomes a note."""
    try:
        components = components_in(source)
        parts = {c: _PARTS[c](source) for c in components}
        notes = [note for c in components for note in _notes(c, source, parts[c])]
        return Identity(
            components=list(components),
            producer=_producer(source, components),
            variant=_variant(parts["dit"]) if "dit" in parts else None,
            notes=notes,
        )
    except (CheckpointError, FormatError) as error:
        return Identity(components=[], producer="unknown", variant=None, notes=[str(error)])


def rope_notice(metadata: Mapping[str, Any]) -> str | None:
    """What to say of a text encoder that is not the original Qwen3-4B; None if it may be it."""
    base = metadata.get("qwen3.rope.freq_base", ROPE_BASE)
    name = str(metadata.get("general.name", ""))
    if base != ROPE_BASE_2507 and "2507" not in name:
        return None
    return (
        f"the text encoder {quoted(name)} is Qwen3-4B-Instruct-2507 (rope base {base:g}), not the "
        f"Qwen3-4B that Z-Image was trained with ({ROPE_BASE:g}); it is used with its own base, "
        f"and pictures differ from those of the original"
    )


def _producer(source: WeightSource, components: Sequence[str]) -> str:
    if source.container == "gguf":
        return _gguf_producer(source.metadata)
    kinds = {i.qtype.name for i in source.tensors.values()}
    formats = {
        (f.get("format"), bool(f.get("convrot")))
        for f in quant_formats(source.tensors, source.metadata).values()
    }
    if "I8" in kinds:
        rotated = ("int8_tensorwise", True) in formats
        return "ComfyUI int8 ConvRot" if rotated else "ComfyUI int8"
    if kinds & {"F8_E4M3", "F8_E5M2"}:
        ends = (".scale_weight", ".weight_scale")
        scaled = any(name.endswith(ends) for name in source.tensors)
        return "ComfyUI fp8 scaled" if scaled else "ComfyUI fp8 (plain cast)"
    if len(components) > 1:
        return "ComfyUI all-in-one"
    official = any(re.match(r"(all_x_embedder|.*mid_block)\.", n) for n in source.tensors)
    if official or source.path.is_dir():
        return "diffusers"
    return "ComfyUI" if components else "unknown"


def _gguf_producer(metadata: Mapping[str, Any]) -> str:
    if "zquant.version" in metadata:
        return "zquant"
    architecture = metadata.get("general.architecture")
    if architecture is None:
        return "stable-diffusion.cpp"
    known = {"lumina2": "city96-style", "qwen3": "llama.cpp"}
    return known.get(str(architecture), f"calcuis-style (architecture {quoted(architecture)})")


def _variant(parts: Mapping[str, Part]) -> str | None:
    """A guess from the weights of one norm; None where that layer is not there."""
    part = parts.get("layers.28.ffn_norm1.weight")
    if part is None or "layers.30.ffn_norm1.weight" in parts:
        return None
    row_bytes = part.qtype.row_bytes(part.shape[-1])
    stored = torch.from_numpy(part.raw()).view(1, row_bytes)
    weights = dequantize_scaled(stored, part.qtype, torch.float32, part.scaling)
    deviation = float(weights.double().std(correction=0))
    return f"looks like {'turbo' if deviation < TURBO_BELOW else 'base'} (guess)"


def _notes(component: str, source: WeightSource, parts: Mapping[str, Part]) -> list[str]:
    notes = []
    if strays := strays_of(component, source):
        notes.append(f"{len(strays)} stray tensors are ignored (first: {quoted(strays[0])})")
    if component == "dit":
        missing = {"x_pad_token", "cap_pad_token"} - parts.keys()
        notes += [f"{name} is missing: zquant cannot run this file" for name in sorted(missing)]
    if component == "text_encoder" and (notice := rope_notice(source.metadata)):
        notes.append(notice)
    packed = [n for n, p in parts.items() if _NORM.fullmatch(n) and not p.qtype.is_float]
    if packed:
        notes.append(f"{len(packed)} norms or pad tokens are quantized (first: {packed[0]!r})")
    if n_small := sum(part.qtype.name in SMALL for part in parts.values()):
        used = {part.qtype.name for part in parts.values()}
        types = ", ".join(name for name in SMALL if name in used)
        notes.append(f"{n_small} weights are {types}: too few bits to keep the picture")
    return notes
