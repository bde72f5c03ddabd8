"""A model is its three files: whatever is wrong with them is said at opening, before any work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zquant
from zquant.errors import CheckpointError, FormatError
from zquant.formats.detect import open_source
from zquant.formats.model_folder import VARIANTS, find_model
from zquant.layers.compute import Compute
from zquant.models.checkpoint import Checkpoint, model_files

FLOAT32 = Compute(dtype=torch.float32)
DIT = "transformer"


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, data = {}, b""
    for name, values in tensors.items():
        raw = values.astype(np.float32).tobytes()
        at = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": at}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def edited(toy_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """The toy with one component as a single float32 file, after `edit` changed its tensors."""

    def make(component: str, edit: Callable[[dict[str, np.ndarray]], Any]) -> Path:
        shutil.copytree(toy_folder, tmp_path / "toy", copy_function=link)
        folder = tmp_path / "toy" / component
        source = open_source(folder)
        tensors = {
            name: (source.raw(name).view(np.uint16).astype(np.uint32) << 16)
            .view(np.float32)
            .reshape(info.shape)
            for name, info in source.tensors.items()
        }
        source.close()
        edit(tensors)
        for old in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
            old.unlink()
        stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
        write_safetensors(folder / f"{stem}.safetensors", tensors)
        index = {"weight_map": dict.fromkeys(tensors, f"{stem}.safetensors")}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
        return tmp_path / "toy"

    return make


def link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def test_the_toy_opens(toy_folder: Path) -> None:
    checkpoint = Checkpoint(find_model(toy_folder))
    assert checkpoint.dit_config.axes_dims == (8, 4, 4)
    assert checkpoint.files.variant == VARIANTS["turbo"]
    checkpoint.close()


def test_loaded_weights_are_the_mapped_file(toy_folder: Path) -> None:
    checkpoint = Checkpoint(find_model(toy_folder))
    dit = checkpoint.dit(torch.device("cpu"), FLOAT32)
    stored = checkpoint.parts["dit"]["t_embedder.mlp.0.weight"].raw()
    weight = dit.get_parameter("t_embedder.mlp.0.weight")
    assert weight.dtype == torch.uint8
    assert dit.get_parameter("layers.1.feed_forward.w2.weight").is_meta  # its place is planned
    assert weight.data_ptr() == stored.ctypes.data
    encoder = checkpoint.text_encoder(torch.device("cpu"), FLOAT32)
    table = checkpoint.parts["text_encoder"]["model.embed_tokens.weight"].raw()
    assert encoder.get_parameter("model.embed_tokens.weight").data_ptr() == table.ctypes.data
    checkpoint.close()


def test_the_last_layer_of_the_text_encoder_is_not_built(toy_folder: Path) -> None:
    checkpoint = Checkpoint(find_model(toy_folder))
    assert checkpoint.text_encoder_config.n_layers == 3
    assert len(checkpoint.text_encoder(torch.device("cpu"), FLOAT32).model.layers) == 2
    checkpoint.close()


Edit = Callable[[dict[str, np.ndarray]], Any]
WRONG: dict[str, tuple[str, Edit, str]] = {
    "missing block tensor": (
        DIT,
        lambda t: t.pop("layers.1.feed_forward.w2.weight"),
        r"transformer: 1 of \d+ tensors missing \(first: 'layers.1.feed_forward.w2.weight'\)",
    ),
    "missing pad token": (
        DIT,
        lambda t: t.pop("cap_pad_token"),
        r"1 of \d+ tensors missing \(first: 'cap_pad_token'\).*get or convert it again",
    ),
    "unexpected tensor": (
        DIT,
        lambda t: t.update({"layers.0.surprise.weight": np.ones((2, 2))}),
        r"1 unexpected tensors \(first: 'layers.0.surprise.weight'\)",
    ),
    "wrong shape": (
        DIT,
        lambda t: t.update({"layers.0.attention.to_k.weight": np.ones((32, 16))}),
        r"'layers.0.attention.to_k.weight' has shape \[32, 16\]; expected \[32, 32\]",
    ),
    "missing text layer": (
        "text_encoder",
        lambda t: t.pop("model.layers.0.mlp.up_proj.weight"),
        r"text_encoder: 1 of \d+ tensors missing \(first: 'model.layers.0.mlp.up_proj.weight'\)",
    ),
    "missing sizes": (
        "text_encoder",
        lambda t: t.pop("model.layers.0.mlp.gate_proj.weight"),
        "text_encoder: tensor 'model.layers.0.mlp.gate_proj.weight' is missing",
    ),
    "missing convolution": (
        "vae",
        lambda t: t.pop("decoder.conv_out.bias"),
        r"vae: 1 of \d+ tensors missing \(first: 'decoder.conv_out.bias'\)",
    ),
    "text encoder of another width": (
        DIT,
        lambda t: t.update(
            {
                "cap_embedder.0.weight": np.ones(48),
                "cap_embedder.1.weight": np.ones((32, 48)),
            }
        ),
        r"text_encoder: gives embeddings of width 32; transformer wants 48\. Z-Image needs Qwen3",
    ),
    "autoencoder of other latents": (
        "vae",
        lambda t: t.update({"decoder.conv_in.weight": np.ones((32, 4, 3, 3))}),
        r"vae: turns 4 channels at 1/8 .* transformer makes 16 .* needs the FLUX.1 autoencoder",
    ),
}


@pytest.mark.parametrize(("component", "edit", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_at_opening(
    edited: Callable[..., Path], component: str, edit: Edit, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(find_model(edited(component, edit)))


def test_metadata_of_another_kind_names_its_file(toy_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_folder, tmp_path / "toy", copy_function=link)
    config = tmp_path / "toy/transformer/config.json"
    text = json.dumps(json.loads(config.read_text()) | {"axes_dims": "hostile"})
    config.unlink()
    config.write_text(text)
    with pytest.raises(CheckpointError, match=r"transformer: .*axis split is 'hostile'"):
        Checkpoint(find_model(tmp_path / "toy"))


MANIFEST: dict[str, Any] = {
    "format": "zquant-model-1",
    "variant": "turbo",
    "shift": 3.0,
    "steps": 8,
    "guidance_scale": 0.0,
    "files": {part: {"name": f"{part}.gguf"} for part in ("dit", "text_encoder", "vae")},
}


def model_json(folder: Path, **changes: Any) -> Path:
    for entry in MANIFEST["files"].values():
        (folder / entry["name"]).write_bytes(b"x")
    (folder / "model.json").write_text(json.dumps(MANIFEST | changes))
    return folder


BROKEN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "other format": ({"format": "x-2"}, FormatError, "format is 'x-2'; expected 'zquant-model-1'"),
    "no files": ({"files": None}, FormatError, "the file of 'dit' is None; expected a plain file"),
    "path outside": (
        {"files": {"dit": {"name": "../../etc/passwd"}}},
        FormatError,
        "the file of 'dit' is '../../etc/passwd'; expected a plain file name",
    ),
    "absolute path": (
        {"files": {"dit": {"name": "/etc/passwd"}}},
        FormatError,
        "the file of 'dit' is '/etc/passwd'; expected a plain file name",
    ),
    "file not there": (
        {"files": {"dit": {"name": "gone.gguf"}}},
        CheckpointError,
        "gone.gguf: missing, though model.json names it",
    ),
    "steps of text": ({"steps": "many"}, FormatError, r"incomplete \(invalid literal.*'many'"),
    "no shift": ({"shift": 0}, FormatError, "shift 0.0 and steps 8 must be positive"),
    "steps without end": (
        {"steps": 10**9},
        CheckpointError,
        "the model's own steps is 1000000000; it must be from 1 to 1000",
    ),
    "guidance NaN": (
        {"guidance_scale": float("nan")},
        CheckpointError,
        "the model's own guidance_scale is nan; it must be a finite number",
    ),
    "size 100": (
        {"size": [100, 128]},
        CheckpointError,
        "the model's own width is 100; it must be a multiple of 16",
    ),
    "shift infinite": ({"shift": 1e999}, CheckpointError, "the model's own shift is inf; it must"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_model_json(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        zquant.Engine.open(model_json(tmp_path, **changes), device="cpu", compute_dtype="float32")


def test_a_model_json_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(FormatError, match=r"model\.json: not valid JSON"):
        find_model(tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone: not a model folder \(is missing\)"):
        model_files(tmp_path / "gone", {}, None)


def test_files_take_the_place_of_the_folders_and_what_was_said_of_those(tmp_path: Path) -> None:
    hashed = {p: {**e, "sha256": p} for p, e in MANIFEST["files"].items()}
    folder, other = model_json(tmp_path, files=hashed), tmp_path / "other.gguf"
    files = model_files(folder, {"dit": other}, "base")
    assert (files.dit, files.vae) == (other, folder / "vae.gguf")
    assert files.variant == VARIANTS["base"]
    assert files.manifest is not None
    assert sorted(files.manifest["files"]) == ["text_encoder", "vae"]


def test_single_files_must_be_three() -> None:
    with pytest.raises(
        ValueError, match="no --model folder is given, and --text-encoder, --vae mi"
    ):
        model_files(None, {"dit": Path("dit.gguf")}, None)


def test_unknown_variant() -> None:
    with pytest.raises(ValueError, match="variant 'lightning' is unknown; known: turbo, base"):
        model_files("any", {}, "lightning")
