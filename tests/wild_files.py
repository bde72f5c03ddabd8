"""A small Z-Image in the forms in which people have it, each with the weights it must decode to.

Every `write_*` function makes one file as its producer does, names, types, shapes and stray tensors
included, and returns the official names with the float32 weights that the file stores. The decoders
here are gguf-py's, torch's and a product with a Hadamard matrix in float64: not zquant's.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from checkpoint_layout import CONFIGS, SHAPES, comfy_files
from safetensors.torch import save_file

from zquant.formats.gguf_file import gguf_header
from zquant.models.tokenizer import Vocabulary, gguf_metadata
from zquant.quant.codec import quantize
from zquant.quant.qtypes import QTYPES

__all__ = ["FP8", "WILD", "Weights", "fused", "llama_file", "official_file", "plain_weights"]
__all__ += ["write_comfy", "write_fp8", "write_gguf", "write_int8", "write_ldm", "write_nvfp4"]

Weights = dict[str, np.ndarray]
Kinds = Callable[[str, np.ndarray], str]

WILD: dict[str, dict[str, Any]] = {  # heads of 128, and rows of 256 where K-quants are common
    "transformer": {"dim": 384, "n_heads": 3, "n_kv_heads": 3, "n_layers": 2}
    | {"n_refiner_layers": 1, "cap_feat_dim": 256},
    "text_encoder": {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 3}
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 384},
    "vae": {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1},
}
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
LLAMA = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers.": "blk.",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{p}_proj": f"attn_{p}" for p in "qkv"},
    **{f"self_attn.{p}_norm": f"attn_{p}_norm" for p in "qk"},
    **{f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")},
}


@functools.cache
def plain_weights(component: str) -> Weights:
    """Random weights of the small model under official names, representable in BF16."""
    rng, weights = np.random.default_rng(len(component)), {}
    for name, shape in SHAPES[component](CONFIGS[component] | WILD[component]):
        values = rng.standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            values *= 0.5 if name.endswith("token") else 1 / math.sqrt(math.prod(shape[1:]))
        else:
            values = (1 + 0.1 * values) if name.endswith("weight") else 0.1 * values
        weights[name] = torch.from_numpy(values).bfloat16().float().numpy()
    return weights


def official_file(path: Path, weights: Weights) -> Path:
    """Float32 under official names: what a wild file is compared with."""
    save_file({n: torch.from_numpy(np.ascontiguousarray(w)) for n, w in weights.items()}, path)
    return path


def fused(weights: Weights, prefix: str = "") -> dict[str, list[str]]:
    """ComfyUI's DiT names, and the official ones whose rows they hold."""
    _, rename = comfy_files(prefix=prefix)["transformer"]
    return dict(rename(list(weights)))


def decoded_gguf(packed: np.ndarray, kind: str) -> np.ndarray:
    """float32 `[N, K]` of gguf-py."""
    return gguf.dequantize(packed, getattr(gguf.GGMLQuantizationType, kind)).astype(np.float32)


def write_gguf(
    path: Path,
    weights: Weights,
    names: Mapping[str, list[str]],
    kinds: Kinds,
    architecture: str | None,
    metadata: Mapping[str, Any] | None = None,
    shape_of: Callable[[str, tuple[int, ...]], tuple[int, ...]] = lambda _, shape: shape,
) -> Weights:
    """A GGUF of any mix; `kinds` says the type of a tensor, `shape_of` the shape it is given."""
    listed, blobs, decoded = [], [], {}
    for name, officials in names.items():
        whole = np.concatenate([weights[o] for o in officials])
        kind = kinds(name, whole)
        packed = quantize(whole.reshape(-1, whole.shape[-1]), QTYPES[kind])
        values = decoded_gguf(packed, kind).reshape(whole.shape)
        decoded |= zip(officials, np.split(values, len(officials)), strict=True)
        listed.append((name, QTYPES[kind], shape_of(name, whole.shape)))
        blobs.append(packed.tobytes())
    plan = gguf_header(architecture, metadata or {}, listed)
    data = bytearray(plan.total_size)
    data[: len(plan.header)] = plan.header
    for offset, blob in zip(plan.offsets, blobs, strict=True):
        data[offset : offset + len(blob)] = blob
    path.write_bytes(data)
    return decoded


def llama_file(
    path: Path, weights: Weights, kinds: Kinds, vocabulary: Vocabulary, **extra: Any
) -> Weights:
    """A text encoder as llama.cpp's converter writes it, tokenizer and chat template included."""
    names = {}
    for official in weights:
        name = official
        for theirs, ours in LLAMA.items():
            name = name.replace(theirs, ours)
        names[name] = [official]
    metadata = {
        "general.type": "model",
        "general.name": "Qwen3 4B",
        "qwen3.block_count": WILD["text_encoder"]["num_hidden_layers"],
        "qwen3.rope.freq_base": 1e6,
        **gguf_metadata(vocabulary, WILD["text_encoder"]["vocab_size"]),
        **extra,
    }
    return write_gguf(path, weights, names, kinds, "qwen3", metadata)


def write_comfy(path: Path, weights: Weights, *, prefix: str = "", strays: Any = ()) -> Weights:
    """A DiT as ComfyUI has it, BF16."""
    tensors = {
        name: torch.from_numpy(np.concatenate([weights[o] for o in officials])).bfloat16()
        for name, officials in fused(weights, prefix).items()
    }
    save_file(tensors | dict(strays), path)
    return weights


def write_ldm(path: Path, weights: Weights) -> None:
    """A VAE as `ae.safetensors`: F32, attention as convolutions."""
    _, rename = comfy_files()["vae"]
    tensors = {}
    for name, (official,) in rename(list(weights)):
        whole = torch.from_numpy(weights[official])
        square = ".attn_1." in name and whole.ndim == 2
        tensors[name] = whole[:, :, None, None].contiguous() if square else whole
    save_file(tensors, path)


def write_fp8(
    path: Path,
    weights: Weights,
    names: Mapping[str, list[str]],
    *,
    kind: str = "F8_E4M3",
    style: str = "plain",
) -> Weights:
    """fp8 as ComfyUI has it.

    Args:
        path: of the file.
        weights: under official names.
        names: file name -> official names.
        kind: F8_E4M3 or F8_E5M2.
        style: "plain" casts every tensor; "legacy" has X.scale_weight and a marker for matrices,
            "new" X.weight_scale and X.comfy_quant, "rows" the same with one scale per row.
    """
    tensors: dict[str, torch.Tensor] = {}
    decoded: Weights = {}
    for name, officials in names.items():
        whole = torch.from_numpy(np.concatenate([weights[o] for o in officials]))
        scaled = style != "plain" and whole.ndim == 2 and name.endswith(".weight")
        if scaled:
            stored, scale = _fp8_scaled(whole, FP8[kind], per_row=style == "rows")
            values = stored.float() * scale
            tensors |= _beside(name, scale, style, {"format": FP8_FORMATS[kind]})
        elif style == "plain":
            stored = whole.to(FP8[kind])
            values = stored.float()
        else:
            stored = whole.bfloat16()
            values = stored.float()
        tensors[name] = stored
        for official, rows in zip(officials, np.split(values.numpy(), len(officials)), strict=True):
            decoded[official] = rows
    if style == "legacy":
        tensors["scaled_fp8"] = torch.empty(2).to(FP8[kind])
    save_file(tensors, path)
    return decoded


FP8_FORMATS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


def _fp8_scaled(
    whole: torch.Tensor, dtype: torch.dtype, *, per_row: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored numbers and a float32 scale, one or `[N, 1]`."""
    largest = whole.abs().amax(1, keepdim=True) if per_row else whole.abs().max()
    scale = (largest / torch.finfo(dtype).max).float()
    return (whole / scale).to(dtype), scale


def _beside(
    name: str, scale: torch.Tensor, style: str, said: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The tensors that lie beside a weight."""
    module = name.removesuffix(".weight")
    if style == "legacy":
        return {module + ".scale_weight": scale, module + ".scale_input": torch.ones(1)}
    text = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    return {
        module + ".weight_scale": scale,
        module + ".input_scale": torch.ones(()),
        module + ".comfy_quant": text,
    }


def write_int8(
    path: Path,
    weights: Weights,
    names: Mapping[str, list[str]],
    *,
    rotated: bool,
    in_metadata: bool = False,
) -> Weights:
    """`int8_tensorwise` as ComfyUI has it: matrices are I8, rotated with one scale per row or not.

    Rows of 384 are rotated in groups of 64, as 256 does not divide them; not rotated, the scale of
    a matrix is one number. The descriptions are tensors or, `in_metadata`, in the header.
    """
    tensors: dict[str, torch.Tensor] = {}
    decoded: Weights = {}
    layers: dict[str, Any] = {}
    for name, officials in names.items():
        whole = np.concatenate([weights[o] for o in officials])
        n_columns = whole.shape[-1]
        group = next(g for g in (256, 64, 16, 4) if n_columns % g == 0) if rotated else 0
        if whole.ndim != 2 or not name.endswith(".weight") or n_columns < 256:
            values, stored = whole, torch.from_numpy(whole).bfloat16()
        else:
            q, scale, values = _int8(whole, group)
            stored, said = torch.from_numpy(q), {"format": "int8_tensorwise"}
            if rotated:
                said |= {"convrot": True, "convrot_groupsize": group}
            layers[name.removesuffix(".weight")] = said
            beside = _beside(name, torch.from_numpy(scale), "new", said)
            tensors |= {n: t for n, t in beside.items() if not (in_metadata and "comfy" in n)}
        tensors[name] = stored
        for official, rows in zip(officials, np.split(values, len(officials)), strict=True):
            decoded[official] = rows
    said_of_all = {"format_version": "1.0", "layers": layers}
    save_file(
        tensors, path, {"_quantization_metadata": json.dumps(said_of_all)} if in_metadata else None
    )
    return decoded


def _int8(whole: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int8 numbers, float32 scale and what they decode to."""
    h = hadamard(group) if group else np.ones((1, 1))
    size = len(h)
    turned = (whole.reshape(-1, size).astype(np.float64) @ (h / math.sqrt(size))).reshape(
        whole.shape
    )
    largest = np.abs(turned).max(axis=1, keepdims=True) if group else np.abs(turned).max()
    scale = np.asarray(largest / 127, np.float32)
    q = np.clip(np.rint(turned / scale), -128, 127).astype(np.int8)
    back = (q.reshape(-1, size).astype(np.float64) @ h / math.sqrt(size)).reshape(whole.shape)
    return q, scale, back.astype(np.float32) * scale


def hadamard(size: int) -> np.ndarray:
    """The regular Hadamard matrix of 1 and -1, float64 `[size, size]`."""
    seed = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float64)
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(matrix, seed)
    return matrix


def write_nvfp4(path: Path, weights: Weights) -> None:
    """A DiT whose feed-forwards claim to be nvfp4: two weights per byte, a scale per 16."""
    tensors, layers = {}, {}
    for name, officials in fused(weights).items():
        whole = torch.from_numpy(np.concatenate([weights[o] for o in officials])).bfloat16()
        if "feed_forward" in name:
            module, (n, k) = name.removesuffix(".weight"), whole.shape
            layers[module] = {"format": "nvfp4"}
            tensors[f"{module}.weight_scale"] = torch.ones(n, k // 16).to(torch.float8_e4m3fn)
            tensors[f"{module}.weight_scale_2"] = torch.ones(())
            whole = torch.zeros(n, k // 2, dtype=torch.uint8)
        tensors[name] = whole
    save_file(tensors, path, {"_quantization_metadata": json.dumps({"layers": layers})})
