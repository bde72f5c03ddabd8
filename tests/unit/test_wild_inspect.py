"""`zquant inspect` names who wrote a file, what it holds and what is odd about it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import zquant
from tests import wild_files as wild
from zquant.models.tokenizer import Vocabulary
from zquant.report import as_text, describe

DIT = wild.plain_weights("transformer")
ENCODER = wild.plain_weights("text_encoder")
FUSED = wild.fused(DIT)
PREFIXED = wild.fused(DIT, "model.diffusion_model.")
HF = {name: [name] for name in ENCODER}
VOCABULARY = Vocabulary(
    tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab"],
    merges=[("a", "b")],
    types=[3, 3, 3, 1, 1, 1],
)


def small(name: str, whole: np.ndarray) -> str:
    return "Q2_K" if "w2" in name else "Q8_0" if whole.ndim == 1 else "F16"


def floats(name: str, whole: np.ndarray) -> str:
    return "F32"


def unsloth(name: str, whole: np.ndarray) -> str:
    return "Q8_0" if whole.ndim == 2 else "F32"


Make = Callable[[Path], Any]
FILES: dict[str, tuple[Make, list[str], str]] = {
    "city96": (
        lambda p: wild.write_gguf(p, DIT, FUSED, floats, "lumina2"),
        ["dit"],
        "city96-style",
    ),
    "sd.cpp": (
        lambda p: wild.write_gguf(p, DIT, PREFIXED, floats, None),
        ["dit"],
        "stable-diffusion.cpp",
    ),
    "calcuis": (
        lambda p: wild.write_gguf(p, DIT, FUSED, floats, "pig"),
        ["dit"],
        "calcuis-style (architecture 'pig')",
    ),
    "llama.cpp": (
        lambda p: wild.llama_file(p, ENCODER, unsloth, VOCABULARY),
        ["text_encoder"],
        "llama.cpp",
    ),
    "comfy": (lambda p: wild.write_comfy(p, DIT), ["dit"], "ComfyUI"),
    "official": (lambda p: wild.official_file(p, DIT), ["dit"], "diffusers"),
    "cast": (lambda p: wild.write_fp8(p, DIT, FUSED), ["dit"], "ComfyUI fp8 (plain cast)"),
    "scaled": (
        lambda p: wild.write_fp8(p, ENCODER, HF, style="legacy"),
        ["text_encoder"],
        "ComfyUI fp8 scaled",
    ),
    "convrot": (
        lambda p: wild.write_int8(p, DIT, FUSED, rotated=True, in_metadata=True),
        ["dit"],
        "ComfyUI int8 ConvRot",
    ),
    "int8": (lambda p: wild.write_int8(p, DIT, FUSED, rotated=False), ["dit"], "ComfyUI int8"),
    "ae": (lambda p: wild.write_ldm(p, wild.plain_weights("vae")), ["vae"], "ComfyUI"),
}


def test_files_of_ours_are_told_by_their_receipts() -> None:
    folder = Path(zquant.__file__).parent / "demo"
    for name in ("dit-Q8_0.gguf", "text_encoder-Q8_0.gguf"):
        assert describe(folder / name)["producer"] == "zquant"


@pytest.mark.parametrize("kind", FILES)
def test_components_and_producer_are_named(kind: str, tmp_path: Path) -> None:
    make, components, producer = FILES[kind]
    make(tmp_path / "file")
    document = describe(tmp_path / "file")
    assert (document["components"], document["producer"]) == (components, producer)
    norms = ["27 norms or pad tokens are quantized (first: 'cap_embedder.0.weight')"]
    assert document["notes"] in ([], norms if kind == "cast" else [])
    assert producer in as_text(document)


def test_a_file_of_another_model_has_a_note_instead_of_an_error(tmp_path: Path) -> None:
    wild.write_nvfp4(tmp_path / "nvfp4.safetensors", DIT)
    document = describe(tmp_path / "nvfp4.safetensors")
    assert document["components"] == []
    assert "is 'nvfp4', which zquant cannot read" in document["notes"][0]
    assert "note: " in as_text(document)


def test_what_is_odd_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    names = {name: whole for name, whole in FUSED.items() if name != "cap_pad_token"}
    wild.write_gguf(path, DIT, names, small, "lumina2")
    notes = describe(path)["notes"]
    assert notes[0] == "cap_pad_token is missing: zquant cannot run this file"
    assert "norms or pad tokens are quantized" in notes[1]
    assert "weights are Q2_K: too few bits" in notes[2]


def test_strays_and_the_relative_of_the_text_encoder_are_noted(tmp_path: Path) -> None:
    strays = {"norm_final.weight": torch.ones(384), "optimizer.step": torch.tensor(3)}
    wild.write_comfy(tmp_path / "merged.safetensors", DIT, strays=strays)
    (note,) = describe(tmp_path / "merged.safetensors")["notes"]
    assert note.startswith("2 stray tensors are ignored (first: ")
    said = {"general.name": "Qwen3 4B Instruct 2507", "qwen3.rope.freq_base": 5e6}
    wild.llama_file(tmp_path / "relative.gguf", ENCODER, unsloth, VOCABULARY, **said)
    (note,) = describe(tmp_path / "relative.gguf")["notes"]
    assert "Instruct-2507 (rope base 5e+06)" in note


@pytest.mark.parametrize(("spread", "guess"), [(0.3, "turbo"), (0.6, "base")])
def test_the_variant_is_a_guess_from_one_norm(spread: float, guess: str, tmp_path: Path) -> None:
    """Of a model of 30 layers; the toys above have none to guess from."""
    noise = np.random.default_rng(0).standard_normal(384).astype(np.float32)
    extra = {"layers.28.ffn_norm1.weight": torch.from_numpy(1 + spread * noise / noise.std())}
    wild.write_comfy(tmp_path / "dit.safetensors", DIT, strays=extra)
    assert describe(tmp_path / "dit.safetensors")["variant"] == f"looks like {guess} (guess)"
    wild.official_file(tmp_path / "plain.safetensors", DIT)
    assert describe(tmp_path / "plain.safetensors")["variant"] is None


def test_an_empty_description_is_no_format(tmp_path: Path) -> None:
    tensors = {name: torch.from_numpy(whole) for name, whole in DIT.items()}
    tensors["layers.0.attention.to_q.comfy_quant"] = torch.tensor(list(b"{}"), dtype=torch.uint8)
    save_file(tensors, tmp_path / "dit.safetensors")
    assert describe(tmp_path / "dit.safetensors")["components"] == ["dit"]
