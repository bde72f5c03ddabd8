"""Files as people have them paint the picture of the weights that they hold, to the last bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import zquant
from tests import wild_files as wild
from tests.unit.engine_testing import request
from zquant.convert.execute import convert
from zquant.convert.plan import ConvertRequest, plan_conversion
from zquant.errors import FormatError
from zquant.formats.detect import open_source
from zquant.formats.names import dit_parts, text_encoder_parts
from zquant.models.tokenizer import Vocabulary

Latents = Callable[..., NDArray[Any]]
SMALL_TYPES = ("Q8_0", "Q5_1", "Q4_0", "IQ4_NL", "F16", "BF16")
K_TYPES = ("Q4_K", "Q6_K", "Q3_K", "IQ4_XS", "Q5_K", "Q2_K")


@pytest.fixture(scope="session")
def small_vocabulary() -> Vocabulary:
    full = Vocabulary.bundled()
    return Vocabulary(
        tokens=[*full.tokens[:300], *full.tokens[-26:]],
        merges=full.merges[:44],
        types=[*full.types[:300], *full.types[-26:]],
    )


@pytest.fixture(autouse=True)
def bundled(small_vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Vocabulary, "bundled", lambda: small_vocabulary)


@pytest.fixture(scope="session")
def weights() -> dict[str, wild.Weights]:
    return {c: wild.plain_weights(c) for c in ("transformer", "text_encoder", "vae")}


@pytest.fixture(scope="session")
def plain(weights: dict[str, wild.Weights], tmp_path_factory: Any) -> dict[str, Path]:
    """All three components under official names."""
    folder = tmp_path_factory.mktemp("plain")
    names = {"dit": "transformer", "text_encoder": "text_encoder", "vae": "vae"}
    return {
        part: wild.official_file(folder / f"{part}.safetensors", weights[name])
        for part, name in names.items()
    }


@pytest.fixture
def latents(plain: dict[str, Path]) -> Latents:
    """Final latents of a small request, of the plain files but for those given."""

    def make(compute: str = "exact", **given: Path) -> NDArray[Any]:
        files: dict[str, Any] = plain | given
        options: dict[str, Any] = {"compute_dtype": "float32", "compute": compute}
        engine = zquant.Engine.open(device="cpu", **files, **options)
        try:
            result = engine.generate(request(width=32, height=32, steps=1))
        finally:
            engine.close()
        assert result.latents is not None
        return np.asarray(result.latents)

    return make


def mixed(name: str, whole: NDArray[Any]) -> str:
    """Every type in turn, as far as the rows allow, in the manner of a mix."""
    if whole.ndim != 2 or "pad_token" in name:
        return "F32"
    types = (K_TYPES if whole.shape[1] % 256 == 0 else ()) + SMALL_TYPES
    return types[sum(name.encode()) % len(types)]


def kept(name: str, whole: NDArray[Any]) -> str:
    """city96: embedders and refiners BF16, the rest of the matrices quantized, pads BF16."""
    if whole.ndim == 1:
        return "F32"
    return mixed(name, whole) if name.startswith("layers.") else "BF16"


def everything(name: str, whole: NDArray[Any]) -> str:
    """Norms, biases and pads quantized too, where they have whole qblocks."""
    return "Q8_0" if whole.shape[-1] % 32 == 0 else "F16"


def flat_pads(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:] if "pad_token" in name else shape


def same(shape_name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


GGUFS: dict[str, tuple[str | None, str, Any, Any]] = {
    "city96": ("lumina2", "fused", kept, same),
    "city96 with flat pads": ("lumina2", "fused", kept, flat_pads),
    "stable-diffusion.cpp": (None, "prefixed", mixed, flat_pads),
    "stable-diffusion.cpp, split": (None, "official", mixed, flat_pads),
    "norms quantized": (None, "prefixed", everything, flat_pads),
    "calcuis": ("pig", "fused", mixed, same),
    "calcuis, cow": ("cow", "prefixed", kept, flat_pads),
}


@pytest.mark.parametrize("kind", GGUFS)
def test_a_gguf_of_any_producer_paints_its_weights(
    kind: str, weights: dict[str, wild.Weights], latents: Latents, tmp_path: Path
) -> None:
    architecture, naming, kinds, shape_of = GGUFS[kind]
    dit = weights["transformer"]
    prefix = "model.diffusion_model."
    names = {
        "fused": wild.fused(dit),
        "prefixed": wild.fused(dit, prefix),
        "official": {prefix + name: [name] for name in dit},
    }[naming]
    path = tmp_path / "dit.gguf"
    held = wild.write_gguf(path, dit, names, kinds, architecture, shape_of=shape_of)
    reference = wild.official_file(tmp_path / "reference.safetensors", held)
    assert np.array_equal(latents(dit=path), latents(dit=reference))


def test_a_text_encoder_of_llama_cpp_brings_its_tokenizer_and_rope_base(
    weights: dict[str, wild.Weights],
    latents: Latents,
    plain: dict[str, Path],
    small_vocabulary: Vocabulary,
    tmp_path: Path,
) -> None:
    path = tmp_path / "qwen.gguf"
    encoder = weights["text_encoder"]
    held = wild.llama_file(path, encoder, mixed, small_vocabulary)
    reference = wild.official_file(tmp_path / "reference.safetensors", held)
    ours = latents(text_encoder=path)
    assert np.array_equal(ours, latents(text_encoder=reference))
    relative = tmp_path / "relative.gguf"
    said = {"general.name": "Qwen3 4B Instruct 2507", "qwen3.rope.freq_base": 5e6}
    wild.llama_file(relative, encoder, mixed, small_vocabulary, **said)
    assert not np.array_equal(ours, latents(text_encoder=relative))


def test_instruct_2507_is_said_to_be_another_model(
    weights: dict[str, wild.Weights],
    plain: dict[str, Path],
    small_vocabulary: Vocabulary,
    tmp_path: Path,
) -> None:
    files: dict[str, Any] = plain | {"text_encoder": tmp_path / "relative.gguf"}
    said = {"general.name": "Qwen3 4B Instruct 2507", "qwen3.rope.freq_base": 5e6}
    encoder = weights["text_encoder"]
    wild.llama_file(files["text_encoder"], encoder, mixed, small_vocabulary, **said)
    engine = zquant.Engine.open(device="cpu", compute_dtype="float32", **files)
    notices = engine.generate(request(width=32, height=32, steps=1)).notices
    engine.close()
    assert any("Instruct-2507 (rope base 5e+06)" in notice for notice in notices)


FP8_FILES = [("F8_E4M3", style) for style in ("plain", "legacy", "new", "rows")]
FP8_FILES += [("F8_E5M2", "plain"), ("F8_E5M2", "new")]


@pytest.mark.parametrize(("kind", "style"), FP8_FILES, ids=lambda each: each)
def test_fp8_of_comfyui_paints_its_weights(
    kind: str, style: str, weights: dict[str, wild.Weights], latents: Latents, tmp_path: Path
) -> None:
    dit, encoder = weights["transformer"], weights["text_encoder"]
    prefix = "model.diffusion_model." if style in ("new", "legacy") else ""
    files, references = {}, {}
    for part, held, names in (
        ("dit", dit, wild.fused(dit, prefix)),
        ("text_encoder", encoder, {name: [name] for name in encoder}),
    ):
        files[part] = tmp_path / f"{part}.safetensors"
        decoded = wild.write_fp8(files[part], held, names, kind=kind, style=style)
        references[part] = wild.official_file(tmp_path / f"{part}_plain.safetensors", decoded)
    assert np.array_equal(latents(**files), latents(**references))


@pytest.mark.parametrize(
    ("rotated", "in_metadata"), [(True, False), (True, True), (False, False)], ids=str
)
def test_int8_of_comfyui_paints_its_weights(
    rotated: bool,
    in_metadata: bool,
    weights: dict[str, wild.Weights],
    latents: Latents,
    tmp_path: Path,
) -> None:
    dit = weights["transformer"]
    path = tmp_path / "int8.safetensors"
    held = wild.write_int8(path, dit, wild.fused(dit), rotated=rotated, in_metadata=in_metadata)
    reference = wild.official_file(tmp_path / "reference.safetensors", held)
    # rotation is undone in whole numbers, so that one rounding is left: the scale
    assert np.array_equal(latents(dit=path), latents(dit=reference))


def test_int8_and_fp8_files_of_a_text_encoder_have_scaled_embeddings(
    weights: dict[str, wild.Weights], latents: Latents, tmp_path: Path
) -> None:
    encoder = weights["text_encoder"]
    path = tmp_path / "int8.safetensors"
    held = wild.write_int8(path, encoder, {n: [n] for n in encoder}, rotated=True)
    reference = wild.official_file(tmp_path / "reference.safetensors", held)
    assert np.array_equal(latents(text_encoder=path), latents(text_encoder=reference))


def test_a_mix_of_producers_paints(
    weights: dict[str, wild.Weights], latents: Latents, tmp_path: Path
) -> None:
    """A GGUF DiT, a scaled fp8 text encoder and a VAE with ComfyUI's names."""
    dit, encoder, vae = (weights[c] for c in ("transformer", "text_encoder", "vae"))
    files = {n: tmp_path / n for n in ("dit", "text_encoder", "vae")}
    held = {
        "dit": wild.write_gguf(files["dit"], dit, wild.fused(dit), kept, "lumina2"),
        "text_encoder": wild.write_fp8(
            files["text_encoder"], encoder, {n: [n] for n in encoder}, style="new"
        ),
        "vae": vae,
    }
    wild.write_ldm(files["vae"], vae)
    plain = {n: wild.official_file(tmp_path / f"{n}.plain", held[n]) for n in held}
    assert np.array_equal(latents(**files), latents(**plain))


def test_strays_are_ignored_and_reported(
    weights: dict[str, wild.Weights], latents: Latents, tmp_path: Path
) -> None:
    strays = {
        "norm_final.weight": torch.ones(384),
        "global_step": torch.tensor(7),
        "optimizer.state.0.exp_avg": torch.ones(3),
        "rng.state": torch.zeros(5, dtype=torch.uint8),
        "text_encoders.qwen3_4b.logit_scale": torch.ones(()),
    }
    path = tmp_path / "merged.safetensors"
    wild.write_comfy(path, weights["transformer"], strays=strays)
    assert np.array_equal(latents(dit=path), latents())


def test_nvfp4_is_refused_by_name(weights: dict[str, wild.Weights], tmp_path: Path) -> None:
    path = tmp_path / "nvfp4.safetensors"
    wild.write_nvfp4(path, weights["transformer"])
    with pytest.raises(FormatError, match=r"feed_forward.w\d.weight' is 'nvfp4', which zquant"):
        dit_parts(open_source(path))


def test_converting_scaled_and_rotated_weights_gives_the_weights_that_they_hold(
    weights: dict[str, wild.Weights], plain: dict[str, Path], tmp_path: Path
) -> None:
    dit, encoder = weights["transformer"], weights["text_encoder"]
    files: dict[str, Any] = plain | {n: tmp_path / n for n in ("dit", "text_encoder")}
    held = {
        "dit": wild.write_int8(files["dit"], dit, wild.fused(dit), rotated=True),
        "text_encoder": wild.write_fp8(
            files["text_encoder"], encoder, {n: [n] for n in encoder}, style="rows"
        ),
    }
    asked = ConvertRequest(out=tmp_path / "out", **files, qtype="F32", allow_requantize=True)
    convert(plan_conversion(asked))
    for component, parts_of in (("dit", dit_parts), ("text_encoder", text_encoder_parts)):
        parts = parts_of(open_source(next(asked.out.glob(f"{component}-*.gguf"))))
        assert parts.keys() == held[component].keys()
        for name, part in parts.items():
            assert np.array_equal(part.raw().view(np.float32), held[component][name].ravel()), name


def test_int8_products_stay_exact_for_files_that_they_cannot_take(
    weights: dict[str, wild.Weights], latents: Latents, tmp_path: Path
) -> None:
    dit = weights["transformer"]
    path = tmp_path / "fp8.safetensors"
    wild.write_fp8(path, dit, wild.fused(dit), style="new")
    exact = latents(dit=path)
    assert np.array_equal(latents(compute="int8", dit=path), exact)
