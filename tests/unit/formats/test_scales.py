"""Scales beside weights: what belongs together, and files whose scales do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from zquant.errors import FormatError
from zquant.formats.safetensors_file import open_safetensors
from zquant.formats.scales import with_scales

W = torch.zeros(6, 8, dtype=torch.int8)


def text(said: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def read(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None):
    save_file(tensors, path / "w.safetensors", metadata)
    source = open_safetensors(path / "w.safetensors")
    return with_scales(source.tensors, source.metadata)


def test_companions_are_no_tensors_of_their_own(tmp_path):
    tensors = {
        "a.weight": W,
        "a.weight_scale": torch.ones(6, 1),
        "a.input_scale": torch.ones(()),
        "a.comfy_quant": text({"format": "int8_tensorwise"}),
        "b.weight": W.to(torch.float8_e5m2),
        "b.scale_weight": torch.ones(1),
        "b.scale_input": torch.ones(1),
        "c.weight": W.bfloat16(),
        "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn),
    }
    found = read(tmp_path, tensors)
    assert set(found) == {"a.weight", "b.weight", "c.weight"}
    scales = {name: info.scale and info.scale.name for name, info in found.items()}
    assert scales == {"a.weight": "a.weight_scale", "b.weight": "b.scale_weight", "c.weight": None}
    assert not any(info.rotation for info in found.values())


@pytest.mark.parametrize(("said", "group"), [({}, 256), ({"convrot_groupsize": 4}, 4)], ids=str)
def test_rotation_is_as_said_by_tensor_or_metadata(said, group, tmp_path):
    said = {"format": "int8_tensorwise", "convrot": True, **said}
    tensors = {
        "p.a.weight": torch.zeros(2, 512, dtype=torch.int8),
        "p.a.weight_scale": torch.ones(2),
    }
    assert read(tmp_path, tensors | {"p.a.comfy_quant": text(said)})["p.a.weight"].rotation == group
    layers = {"_quantization_metadata": json.dumps({"layers": {"p.a": said}})}
    assert read(tmp_path, tensors, layers)["p.a.weight"].rotation == group


WRONG = {
    "no scale": ({}, {}, r"'a.weight' is I8 and has no scale; expected '.weight_scale' beside it"),
    "blocks": ({"a.weight_scale": torch.ones(6, 2)}, {}, r"shape \[6, 2\].*each of 6 rows"),
    "rows": ({"a.weight_scale": torch.ones(5)}, {}, r"shape \[5\]; expected F32, one number"),
    "scale type": ({"a.weight_scale": torch.ones(6).to(torch.uint8)}, {}, "of type U8"),
    "format": ({}, {"format": "mxfp8"}, r"'mxfp8', which zquant cannot read.*int8_tensorwise"),
    "odd format": ({}, {"format": ["x"]}, "which zquant cannot read"),
    "group": (
        {"a.weight_scale": torch.ones(6)},
        {"convrot": True, "convrot_groupsize": 8},
        "rotated in groups of '8'; expected a power of 4",
    ),
    "group does not divide": (
        {"a.weight_scale": torch.ones(6)},
        {"convrot": True},
        r"of shape \[6, 8\] is rotated in groups of '256'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case, tmp_path):
    beside, said, message = WRONG[case]
    with pytest.raises(FormatError, match=message):
        read(tmp_path, {"a.weight": W, "a.comfy_quant": text(said), **beside})


def test_a_rotation_of_floats_is_refused(tmp_path):
    tensors = {"a.weight": W.to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(6)}
    tensors["a.comfy_quant"] = text({"convrot": True, "convrot_groupsize": 4})
    with pytest.raises(FormatError, match="is rotated and F8_E4M3; expected I8"):
        read(tmp_path, tensors)


def test_a_damaged_description_is_refused(tmp_path):
    broken = torch.tensor(list(b"{format"), dtype=torch.uint8)
    with pytest.raises(FormatError, match=r"'a.comfy_quant' is not JSON"):
        read(tmp_path, {"a.weight": W, "a.comfy_quant": broken})
    with pytest.raises(FormatError, match=r"metadata '_quantization_metadata' is not JSON"):
        read(tmp_path, {"a.weight": W}, {"_quantization_metadata": "{"})
