"""The receipt inside a file: true, as other readers see it, and refused when it cannot be."""

import json
import zlib
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import zquant
from zquant.convert.receipts import read_receipt, rounded, sum64
from zquant.errors import FormatError
from zquant.formats.detect import open_source
from zquant.formats.gguf_file import gguf_header
from zquant.quant.qtypes import QTYPES

FILES = {"dit": "dit-Q4_K_M.gguf", "text_encoder": "text_encoder-Q4_K_M.gguf"}


def fields(path):
    """Metadata of a GGUF file, read by gguf-py."""
    return {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items()}


def words(data):
    """The sum of a whole part's words, the plain way."""
    padded = data + bytes(-len(data) % 8)
    return sum(int.from_bytes(padded[i : i + 8], "little") for i in range(0, len(padded), 8))


@pytest.mark.parametrize("component", FILES)
def test_another_reader_sees_a_true_receipt(component, q4, official):
    path = q4 / FILES[component]
    found, said = fields(path), json.loads((q4 / "model.json").read_text())
    assert found["zquant.version"] == zquant.__version__
    assert found["zquant.policy"] == said["files"][component]["policy"]
    folder = {"dit": "transformer"}.get(component, component)
    shards = sorted((official / folder).glob("*.safetensors"))
    assert found["zquant.source.files"] == [shard.name for shard in shards]
    assert found["zquant.source.sizes"] == [shard.stat().st_size for shard in shards]
    tensors = gguf.GGUFReader(path).tensors
    assert found["zquant.tensor_crc32"] == [zlib.crc32(t.data.tobytes()) for t in tensors]
    errors = [said["tensors"][component][t.name]["relative_rms_error"] for t in tensors]
    # four digits, in float32
    assert found["zquant.tensor_error"] == pytest.approx(errors, rel=6e-4)
    assert any(errors)


def test_the_sum_of_the_source_is_that_of_all_parts(q4, official):
    source = {}
    for shard in (official / "transformer").glob("*.safetensors"):
        source |= load_file(shard)
    sums = read_receipt(open_source(q4 / FILES["dit"])).source_sum64
    attention = "layers.0.attention."
    made_of = {
        f"{attention}qkv.weight": [f"{attention}to_{p}.weight" for p in "qkv"],
        f"{attention}q_norm.weight": [f"{attention}norm_q.weight"],
        "final_layer.linear.bias": ["all_final_layer.2-1.linear.bias"],
    }
    for name, parts in made_of.items():
        data = [source[part].view(torch.uint8).numpy().tobytes() for part in parts]
        assert sums[name] == sum(map(words, data)) % 2**64


@given(st.binary(min_size=1, max_size=60), st.data())
def test_sums_of_pieces_add_up(data, draw):
    cut = draw.draw(st.integers(0, len(data)))
    array = np.frombuffer(data, np.uint8)
    pieces = [sum64(array[:cut], 0), sum64(array[cut:], cut)]
    assert sum(pieces) % 2**64 == words(data) % 2**64


def test_overrides_are_in_the_receipt(official, run, tmp_path):
    types = (("attention.qkv", QTYPES["F16"]), ("attn_q", QTYPES["F16"]))
    run(source=str(official), out=tmp_path, qtype="BF16", tensor_types=types)
    said = open_source(tmp_path / "dit-BF16.gguf").metadata
    assert list(said["zquant.tensor_types"]) == ["attention.qkv=F16", "attn_q=F16"]


def test_a_file_of_another_program_has_none(official):
    assert read_receipt(open_source(official / "vae")) is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("zquant.tensor_error", [0.5], r"zquant.tensor_error is \[0.5\]; expected \d+ numbers"),
        ("zquant.tensor_crc32", "none", "zquant.tensor_crc32 is 'none'; expected"),
        ("zquant.source.sum64", None, "zquant.source.sum64 is None; expected"),
        ("zquant.version", None, "the receipt lacks zquant.version"),
    ],
)
def test_a_receipt_that_does_not_fit_is_refused(key, value, message, q4):
    source = open_source(q4 / FILES["dit"])
    metadata = {**source.metadata, key: value}
    if value is None:
        del metadata[key]
    with pytest.raises(FormatError, match=message):
        read_receipt(replace(source, metadata=metadata))


def test_errors_keep_four_digits():
    assert rounded(0.0123456) == float(np.float32(0.01235))
    assert rounded(0.0) == 0.0


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64, np.float32])
def test_arrays_in_a_header_keep_their_type(dtype, tmp_path):
    array = np.array([0, 2**24 - 1, 3], dtype)
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_header("x", {"k": array, "empty": array[:0]}, []).header)
    found = gguf.GGUFReader(path).fields["k"]
    assert found.types[1].name == {"uint32": "UINT32", "uint64": "UINT64"}.get(
        array.dtype.name, "FLOAT32"
    )
    assert found.contents() == array.tolist()
    assert open_source(path).metadata["empty"] == []
