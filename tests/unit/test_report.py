import json
import struct

import numpy as np
import pytest
from PIL import Image

from zquant.cli.main import main
from zquant.errors import FormatError
from zquant.formats.gguf_file import gguf_header
from zquant.formats.safetensors_file import safetensors_header
from zquant.image import save_png
from zquant.quant.qtypes import QTYPES
from zquant.report import as_text, describe

TENSORS = [
    ("layers.0.w1.weight", QTYPES["Q8_0"], (4, 64)),
    ("layers.0.w2.weight", QTYPES["Q8_0"], (2, 32)),
    ("norm.weight", QTYPES["F32"], (10,)),
]
METADATA = {"general.name": "tiny", "tokens": [f"t{i}" for i in range(5000)], "size": 3}


@pytest.fixture
def gguf(tmp_path):
    plan = gguf_header("lumina2", METADATA, TENSORS)
    path = tmp_path / "tiny.gguf"
    path.write_bytes(plan.header + bytes(plan.total_size - len(plan.header)))
    return path


@pytest.fixture
def picture(tmp_path):
    image = Image.fromarray(np.zeros((2, 2, 3), np.uint8))
    recipe = {"prompt": "a fox\x1b[2J\x9b1m\nin the snow 雪", "seed": 7, "steps": 8}
    save_png(image, tmp_path / "fox.png", recipe)
    return tmp_path / "fox.png"


@pytest.fixture
def model(tmp_path, gguf):
    folder = tmp_path / "model"
    folder.mkdir()
    files = {}
    for part in ("dit", "text_encoder", "vae"):
        (folder / f"{part}.gguf").write_bytes(gguf.read_bytes())
        files[part] = {"name": f"{part}.gguf"}
    manifest = {"format": "zquant-model-1", "variant": "turbo", "shift": 3.0, "steps": 8}
    manifest |= {"guidance_scale": 0.0, "files": files, "policy": "Q8_0"}
    (folder / "model.json").write_text(json.dumps(manifest))
    return folder


def test_gguf_totals_count_what_is_stored(gguf):
    document = describe(gguf)
    assert (document["kind"], document["container"]) == ("weights", "gguf")
    n_bytes = 4 * 68 + 2 * 34 + 40
    assert document["n_weights"] == 4 * 64 + 2 * 32 + 10
    assert document["n_bytes"] == n_bytes
    assert document["bpw"] == round(8 * n_bytes / 330, 4)
    q8_0, f32 = document["qtypes"]
    assert q8_0 == {"qtype": "Q8_0", "n_tensors": 2, "n_weights": 320, "n_bytes": 340, "bpw": 8.5}
    assert (f32["qtype"], f32["bpw"]) == ("F32", 32.0)
    first = {"name": "layers.0.w1.weight", "qtype": "Q8_0", "shape": [4, 64], "n_bytes": 272}
    assert document["tensors"][0] == first


def test_long_arrays_are_cut_and_short_values_stay(gguf):
    metadata = describe(gguf)["metadata"]
    assert metadata["tokens"] == {"length": 5000, "first": [f"t{i}" for i in range(8)]}
    assert metadata["general.name"] == "tiny"
    assert metadata["size"] == 3
    assert '5000 values: ["t0", "t1"' in as_text(describe(gguf))


def test_numbers_that_json_does_not_have_are_text(tmp_path):
    plan = gguf_header("lumina2", {"scale": float("nan"), "list": [1.0, float("inf")]}, TENSORS)
    path = tmp_path / "nan.gguf"
    path.write_bytes(plan.header + bytes(plan.total_size - len(plan.header)))
    metadata = describe(path)["metadata"]
    assert (metadata["scale"], metadata["list"]) == ("nan", [1.0, "inf"])


def test_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = [("w", QTYPES["BF16"], (3, 5)), ("scale", QTYPES["F32"], ())]
    path.write_bytes(safetensors_header(tensors, {"format": "pt"}).header + bytes(34))
    document = describe(path)
    assert document["metadata"] == {"format": "pt"}
    assert [t["shape"] for t in document["tensors"]] == [[3, 5], []]
    assert "scalar" in as_text(document)


def test_text_is_an_aligned_table(gguf):
    lines = as_text(describe(gguf)).splitlines()
    at = lines.index("qtype  tensors  weights   size    bpw")
    assert lines[at + 1 : at + 4] == [
        "Q8_0         2      320  340 B   8.50",
        "F32          1       10   40 B  32.00",
        "total        3      330  380 B   9.21",
    ]
    assert "layers.0.w1.weight  Q8_0   4x64   272 B" in lines


def test_model_folder_lists_its_three_parts(model):
    document = describe(model)
    assert document["kind"] == "model"
    assert list(document["parts"]) == ["dit", "text_encoder", "vae"]
    assert document["parts"]["vae"]["n_weights"] == 330
    assert document["model"]["policy"] == "Q8_0"
    lines = as_text(document).splitlines()
    assert "part          file               qtypes    tensors  weights   size   bpw" in lines
    assert "vae           vae.gguf           Q8_0+F32        3      330  380 B  9.21" in lines


def test_a_picture_shows_its_recipe_without_control_characters(picture):
    text = as_text(describe(picture))
    assert r"prompt  a fox\x1b[2J\x9b1m\nin the snow 雪" in text
    assert all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize("kind", ["gguf", "picture", "model"])
def test_inspect_json_prints_one_document(kind, request, capsys):
    path = request.getfixturevalue(kind)
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == describe(path)


def test_inspect_prints_text(gguf, capsys):
    assert main(["inspect", str(gguf)]) == 0
    assert capsys.readouterr().out.startswith(f"weights  {gguf}\n  container")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "empty"),
        (b"\x89PNG then nothing", "not a PNG file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "damaged|claims|tensors"),
    ],
    ids=["empty", "png", "gguf"],
)
def test_damaged_files_are_errors(tmp_path, content, match):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(FormatError, match=match):
        describe(tmp_path / "file")


def test_missing_path_is_named(tmp_path):
    with pytest.raises(FormatError, match=r"nothing: there is no such file or folder"):
        describe(tmp_path / "nothing")
