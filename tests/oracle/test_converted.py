"""Converted files against other readers: gguf-py decodes, diffusers and transformers run.

The oracle of a quantized model is diffusers on the weights that gguf-py decodes from the same file.
"""

import copy
import functools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

import zquant
from tests.oracle.conftest import paint, paint_ours, relative_l2

pytestmark = pytest.mark.oracle

# float32 on both sides, the same decoded weights; measured 1e-6
SAME = 1e-5
PROMPT = "a lighthouse at night"
SIZE = {"width": 64, "height": 48}
POLICIES = ["BF16", "Q8_0", "Q6_K", "Q4_K_M"]  # others differ by decoders, which have tests


class TensorReader(gguf.GGUFReader):
    """gguf-py's reader without the contents of arrays: a vocabulary takes it half a minute."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[Any, ...]:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        view = memoryview(self.data)
        kind, n = struct.unpack_from("<IQ", view, orig_offs)
        at = orig_offs + 12
        if kind == gguf.GGUFValueType.STRING:
            for _ in range(n):
                at += 8 + struct.unpack_from("<Q", view, at)[0]
        else:
            at += n * self.gguf_scalar_to_np[gguf.GGUFValueType(kind)]().nbytes
        return at - orig_offs, [], [], [gguf.GGUFValueType.ARRAY]


@functools.lru_cache(maxsize=2)
def decoded(path: Path) -> dict[str, Tensor]:
    """Every tensor of a GGUF file as float32, by gguf-py."""
    tensors = {}
    for t in TensorReader(path).tensors:
        values = gguf.quants.dequantize(np.asarray(t.data), t.tensor_type).astype(np.float32)
        shape = [int(n) for n in reversed(t.shape)]
        tensors[t.name] = torch.from_numpy(values.reshape(shape).copy())
    return tensors


def file_of(folder: Path, component: str) -> Path:
    (file,) = folder.glob(f"{component}*.*")
    return file


def dit_weights(path: Path) -> dict[str, Tensor]:
    """Under diffusers' names, by diffusers' own table for ComfyUI files."""
    from diffusers.loaders.single_file_utils import (
        convert_z_image_transformer_checkpoint_to_diffusers as to_diffusers,
    )

    weights = to_diffusers(dict(decoded(path)))
    return {n: v.reshape(1, -1) if n.endswith("pad_token") else v for n, v in weights.items()}


def text_encoder_weights(path: Path, model: torch.nn.Module) -> dict[str, Tensor]:
    """Under Hugging Face names, by gguf-py's own table for Qwen3."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, model.config.num_hidden_layers)
    values = dict(decoded(path))
    weights = {}
    for name in model.state_dict():
        weights[name] = values.pop(names.get_name(f"model.{name}", (".weight",)))
    assert not values, f"no Hugging Face name for {sorted(values)}"
    return weights


def dequantized(oracle: Any, folder: Path) -> Any:
    """The oracle's pipeline with the weights of a converted folder."""
    from diffusers import AutoencoderKL, ZImagePipeline

    transformer, text_encoder = map(copy.deepcopy, (oracle.transformer, oracle.text_encoder))
    transformer.load_state_dict(dit_weights(file_of(folder, "dit")))
    text_encoder.load_state_dict(
        text_encoder_weights(file_of(folder, "text_encoder"), text_encoder)
    )
    vae_folder = Path(oracle.vae.config._name_or_path)
    vae = AutoencoderKL.from_single_file(
        str(file_of(folder, "vae")), config=str(vae_folder), torch_dtype=torch.float32
    )
    pipeline = ZImagePipeline(
        scheduler=oracle.scheduler,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=oracle.tokenizer,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("policy", POLICIES)
def test_pictures_equal_diffusers_on_the_decoded_weights(
    oracle: Any, convert: Callable[[str], Path], policy: str
) -> None:
    theirs = paint(dequantized(oracle, convert(policy)), PROMPT, **SIZE)
    engine = zquant.Engine.open(convert(policy), device="cpu", compute_dtype="float32")
    ours = paint_ours(engine, PROMPT, **SIZE)
    engine.close()
    assert relative_l2(ours.prompt_embeds, theirs.prompt_embeds) <= SAME
    assert relative_l2(ours.latents, theirs.latents) <= SAME
    assert np.abs(ours.images.astype(int) - theirs.images.astype(int)).max() <= 1


def test_more_bits_are_closer_to_the_original(oracle: Any, convert: Callable[[str], Path]) -> None:
    exact = paint(oracle, PROMPT, **SIZE).latents
    errors = []
    for policy in ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M"):
        engine = zquant.Engine.open(convert(policy), device="cpu", compute_dtype="float32")
        errors.append(relative_l2(paint_ours(engine, PROMPT, **SIZE).latents, exact))
        engine.close()
    assert errors[0] <= 1e-5  # the checkpoint is BF16, nothing is lost
    assert errors == sorted(errors)
    assert errors[-1] < 0.5


@pytest.mark.parametrize("policy", ["BF16", "Q8_0", "Q4_K_M"])
def test_diffusers_reads_the_dit(
    oracle: Any, convert: Callable[[str], Path], tiny_folder: Path, policy: str
) -> None:
    from diffusers import GGUFQuantizationConfig, ZImageTransformer2DModel

    model = ZImageTransformer2DModel.from_single_file(
        str(file_of(convert(policy), "dit")),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        config=str(tiny_folder / "transformer"),
        torch_dtype=torch.float32,
    )
    latents = torch.randn(16, 1, 6, 10, generator=torch.Generator().manual_seed(1))
    caption = torch.randn(9, 256, generator=torch.Generator().manual_seed(2))
    expected = copy.deepcopy(oracle.transformer)
    expected.load_state_dict(dit_weights(file_of(convert(policy), "dit")))
    with torch.inference_mode():
        theirs, ours = (
            m([latents], torch.tensor([0.3]), [caption], return_dict=False)[0][0]
            for m in (expected, model)
        )
    # diffusers multiplies scales and integers in float16, which moves every weight by up to 5e-4
    assert relative_l2(ours, theirs) <= (SAME if policy == "BF16" else 2e-3)


def test_transformers_reads_the_text_encoder(
    oracle: Any, convert: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import ZImagePipeline
    from transformers import AutoTokenizer, Qwen3Model

    # transformers reads the file three times, through a slow kind of array
    monkeypatch.setattr(np, "memmap", lambda path, *_, **__: np.fromfile(path, np.uint8))
    monkeypatch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
    file = file_of(convert("Q4_K_M"), "text_encoder")
    model = Qwen3Model.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    expected = text_encoder_weights(file, oracle.text_encoder)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)
    for key in ("rope_theta", "rms_norm_eps", "num_attention_heads", "head_dim"):
        expected_value = pytest.approx(read(oracle.text_encoder.config, key), rel=1e-7)
        assert read(model.config, key) == expected_value, key  # GGUF keeps float32
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = "<|im_start|>user\na fox, 狐狸 don't 12<|im_end|>\n"
    assert tokenizer(text).input_ids == oracle.tokenizer(text).input_ids
    pipeline = ZImagePipeline(
        **{**oracle.components, "text_encoder": model, "tokenizer": tokenizer}
    )
    with torch.inference_mode():
        (theirs,), _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    engine = zquant.Engine.open(file.parent, device="cpu", compute_dtype="float32")
    ours = paint_ours(engine, PROMPT, steps=1, **SIZE).prompt_embeds
    engine.close()
    assert relative_l2(ours, theirs.float()) <= SAME


def read(config: Any, key: str) -> float:
    """A value of a transformers config; version 5 keeps the rope base in a dict."""
    if key == "rope_theta" and getattr(config, "rope_parameters", None):
        return float(config.rope_parameters["rope_theta"])
    return float(getattr(config, key))
