"""`tools/make_checkpoint.py` writes what the publishers published, in both layouts."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_layout import COMPONENTS
from make_checkpoint import Spec, file_size, folder_files, main, make_checkpoint, single_files
from safetensors.torch import load_file

# bytes of the published files; a header that differs in one character would show
TURBO_BYTES = {
    "transformer/diffusion_pytorch_model-00001-of-00003.safetensors": 9_973_693_184,
    "transformer/diffusion_pytorch_model-00002-of-00003.safetensors": 9_973_714_824,
    "transformer/diffusion_pytorch_model-00003-of-00003.safetensors": 4_672_282_880,
    "text_encoder/model-00001-of-00003.safetensors": 3_957_900_840,
    "text_encoder/model-00002-of-00003.safetensors": 3_987_450_520,
    "text_encoder/model-00003-of-00003.safetensors": 99_630_640,
    "vae/diffusion_pytorch_model.safetensors": 167_666_902,
}
COMFY_BYTES = {
    "z_image_bf16.safetensors": 12_309_866_400,
    "qwen_3_4b.safetensors": 8_044_982_048,
}
CONFIG_BYTES = {
    "scheduler/scheduler_config.json": 173,
    "transformer/config.json": 473,
    "text_encoder/config.json": 726,
    "vae/config.json": 805,
    "transformer/diffusion_pytorch_model.safetensors.index.json": 48_969,
    "text_encoder/model.safetensors.index.json": 32_819,
    "tokenizer/vocab.json": 2_776_833,
    "tokenizer/merges.txt": 1_671_853,
}


def test_full_folder_has_the_published_sizes() -> None:
    files = folder_files(Spec(preset="full", dtype="float32"))
    assert {name: file_size(entries) for name, entries in files.items()} == TURBO_BYTES
    assert sum(len(e) for name, e in files.items() if name.startswith("transformer")) == 521


def test_full_base_is_two_bfloat16_shards() -> None:
    spec = Spec(preset="full", variant="base", only=("transformer",))
    assert [len(entries) for entries in folder_files(spec).values()] == [423, 98]
    assert sum(math.prod(s) for s in spec.shapes("transformer").values()) == 6_154_908_736


def test_full_comfy_files_have_the_published_sizes() -> None:
    files = single_files(Spec(preset="full"))
    assert {name: file_size(files[name]) for name in COMFY_BYTES} == COMFY_BYTES
    assert {name: len(entries) for name, entries in files.items()} == {
        "z_image_bf16.safetensors": 453,
        "qwen_3_4b.safetensors": 398,
        "ae.safetensors": 244,
    }


def test_full_configs_have_the_published_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import make_checkpoint as tool

    monkeypatch.setattr(tool, "_write_files", lambda *_: None)
    make_checkpoint(tmp_path, Spec(preset="full", dtype="float32"))
    assert {name: (tmp_path / name).stat().st_size for name in CONFIG_BYTES} == CONFIG_BYTES


def test_base_has_its_own_shift_and_files(tmp_path: Path) -> None:
    assert main([str(tmp_path), "--variant", "base", "--only", "transformer"]) == 0
    scheduler = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["shift"] == 6.0
    shards = sorted(path.name for path in (tmp_path / "transformer").glob("*.safetensors"))
    assert shards == [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def test_disk_space_is_checked_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import make_checkpoint as tool

    monkeypatch.setattr(tool.shutil, "disk_usage", lambda _: type("", (), {"free": 2**30}))
    with pytest.raises(SystemExit, match=r"takes 19\.1 GiB, 1\.0 GiB are free"):
        make_checkpoint(tmp_path / "full", Spec(preset="full"))
    assert list((tmp_path / "full").iterdir()) == []


def test_both_layouts_hold_the_same_weights(tiny_folder: Path, tiny_comfy: Path) -> None:
    folder: dict[str, torch.Tensor] = {}
    for shard in tiny_folder.glob("*/*.safetensors"):
        folder |= load_file(shard)
    dit = load_file(tiny_comfy / "z_image_bf16.safetensors")
    block = "noise_refiner.0.attention"
    qkv = torch.cat([folder[f"{block}.to_{p}.weight"] for p in "qkv"])
    assert torch.equal(dit[f"{block}.qkv.weight"], qkv)
    assert torch.equal(dit["x_embedder.bias"], folder["all_x_embedder.2-1.bias"])
    vae = load_file(tiny_comfy / "ae.safetensors")
    shortcut = folder["decoder.up_blocks.3.resnets.0.conv_shortcut.weight"]
    assert torch.equal(vae["decoder.up.0.block.0.nin_shortcut.weight"], shortcut.float())
    text_encoder = load_file(tiny_comfy / "qwen_3_4b.safetensors")
    assert all(torch.equal(value, folder[name]) for name, value in text_encoder.items())


def test_float32_rounds_to_the_bfloat16_checkpoint(tmp_path: Path, tiny_folder: Path) -> None:
    wide = make_checkpoint(tmp_path, Spec(dtype="float32", only=("transformer",)))
    name = "layers.1.feed_forward.w2.weight"

    def tensor(folder: Path) -> torch.Tensor:
        shards = [load_file(path) for path in (folder / "transformer").glob("*.safetensors")]
        return next(shard[name] for shard in shards if name in shard)

    assert tensor(wide).dtype == torch.float32
    assert torch.equal(tensor(wide).bfloat16(), tensor(tiny_folder))


@pytest.mark.oracle
def test_diffusers_loads_the_folder_without_complaint(oracle: Any) -> None:
    from diffusers.loaders.single_file_utils import (
        convert_z_image_transformer_checkpoint_to_diffusers as to_diffusers,
    )

    spec = Spec()
    for component in COMPONENTS:
        state = getattr(oracle, component).state_dict()
        prefix = "model." if component == "text_encoder" else ""
        shapes = {prefix + name: tuple(value.shape) for name, value in state.items()}
        assert shapes == spec.shapes(component)
    fused = single_files(spec)["z_image_bf16.safetensors"]
    official = to_diffusers({e.name: torch.empty(e.shape, device="meta") for e in fused})
    assert {name: tuple(v.shape) for name, v in official.items()} == spec.shapes("transformer")
