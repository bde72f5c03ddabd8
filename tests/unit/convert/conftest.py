"""A checkpoint of 2 M weights in every form that `zquant convert` reads, and short ways to convert.

The vocabulary is cut to 44 merges: the full one would make the text encoder the largest part.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from zquant.convert.execute import ConvertResult, convert
from zquant.convert.plan import ConvertRequest, plan_conversion
from zquant.formats.detect import open_source
from zquant.models.tokenizer import Vocabulary

MINI = {
    "transformer": {
        "dim": 256,
        "n_heads": 2,
        "n_kv_heads": 2,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "cap_feat_dim": 256,
    },
    "text_encoder": {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 384,
    },
    "vae": {"block_out_channels": [32, 32], "layers_per_block": 1},
}
N_MERGES, N_SPECIALS = 44, 26


def cut(full: Vocabulary) -> Vocabulary:
    """The first merges of a vocabulary and all of its special tokens."""
    n = 256 + N_MERGES
    return Vocabulary(
        tokens=[*full.tokens[:n], *full.tokens[-N_SPECIALS:]],
        merges=full.merges[:N_MERGES],
        types=[*full.types[:n], *full.types[-N_SPECIALS:]],
    )


@pytest.fixture(scope="session")
def small_vocabulary() -> Vocabulary:
    return cut(Vocabulary.bundled())


@pytest.fixture(autouse=True)
def bundled(small_vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single files, which have no tokenizer of their own, get the cut one."""
    monkeypatch.setattr(Vocabulary, "bundled", lambda: small_vocabulary)


@pytest.fixture(scope="session")
def generate(small_vocabulary: Vocabulary) -> Callable[..., Path]:
    """Calls a function of `make_checkpoint` with the mini preset and the cut vocabulary."""
    import checkpoint_layout
    import make_checkpoint

    def generate(function: str, folder: Path, **spec: Any) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(checkpoint_layout.PRESETS, "mini", MINI)
            patch.setattr(Vocabulary, "bundled", lambda: small_vocabulary)
            made: Path = getattr(make_checkpoint, function)(
                folder, make_checkpoint.Spec(preset="mini", **spec)
            )
        return made

    return generate


@pytest.fixture(scope="session")
def official(generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official folder, BF16."""
    return generate("make_checkpoint", tmp_path_factory.mktemp("official") / "mini")


@pytest.fixture(scope="session")
def official_f32(generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official folder with a DiT in F32, Base variant."""
    folder = tmp_path_factory.mktemp("official_f32")
    return generate("make_checkpoint", folder, dtype="float32", variant="base")


@pytest.fixture(scope="session")
def comfy(
    generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """ComfyUI's three files by the name of the request's field."""
    folder = generate("make_comfy", tmp_path_factory.mktemp("comfy"))
    return {
        "dit": folder / "z_image_bf16.safetensors",
        "text_encoder": folder / "qwen_3_4b.safetensors",
        "vae": folder / "ae.safetensors",
    }


@pytest.fixture(scope="session")
def forms(
    official: Path, comfy: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Name of a form -> what to request for it; all hold the weights of `official`."""
    folder = tmp_path_factory.mktemp("forms")
    tensors = {part: load_file(path) for part, path in comfy.items()}
    prefixed = {f"model.diffusion_model.{n}": t for n, t in tensors["dit"].items()}
    save_file(prefixed, folder / "prefixed.safetensors")
    stray = {**tensors["dit"], "norm_final.weight": tensors["dit"]["x_pad_token"][0].clone()}
    save_file(stray, folder / "stray.safetensors")
    shards = sorted((official / "transformer").glob("*.safetensors"))
    assert len(shards) > 1
    split = {n: t for shard in shards for n, t in load_file(shard).items()}
    save_file(split, folder / "split.safetensors")
    everything = dict(prefixed)
    encoder = tensors["text_encoder"].items()
    everything |= {f"text_encoders.qwen3_4b.transformer.{n}": t for n, t in encoder}
    everything |= {f"vae.{n}": t for n, t in tensors["vae"].items()}
    save_file(everything, folder / "all.safetensors")
    return {
        "official": {"source": str(official)},
        "fused": comfy,
        **{
            n: {**comfy, "dit": folder / f"{n}.safetensors"} for n in ("prefixed", "stray", "split")
        },
        "all-in-one": {"source": str(folder / "all.safetensors")},
    }


@pytest.fixture(scope="session")
def run() -> Callable[..., ConvertResult]:
    """Converts what the fields of a `ConvertRequest` say."""
    return lambda **fields: convert(plan_conversion(ConvertRequest(**fields)))


@pytest.fixture(scope="session")
def q4(official: Path, run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`official` as Q4_K_M."""
    folder = tmp_path_factory.mktemp("q4")
    run(source=str(official), out=folder)
    return folder


@pytest.fixture(scope="session")
def bf16(official: Path, run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`official` as BF16, the fastest policy."""
    folder = tmp_path_factory.mktemp("bf16")
    run(source=str(official), out=folder, qtype="BF16")
    return folder


def data_of(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every tensor."""
    source = open_source(path)
    return {n: (i.qtype.name, i.shape, source.raw(n).tobytes()) for n, i in source.tensors.items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def is_whole(folder: Path) -> bool:
    """Whether `model.json` is there; then every file it names must be what it says."""
    if not (folder / "model.json").exists():
        return False
    for entry in json.loads((folder / "model.json").read_text())["files"].values():
        data = (folder / entry["name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
    return True


@pytest.fixture(scope="session")
def look() -> SimpleNamespace:
    """The functions of this file, which tests cannot import."""
    return SimpleNamespace(contents=contents, data_of=data_of, is_whole=is_whole)
