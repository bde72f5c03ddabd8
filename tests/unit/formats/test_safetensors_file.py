"""safetensors: equal to the safetensors package in both directions; damage is refused."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from zquant.errors import FormatError
from zquant.formats.safetensors_file import open_safetensors, open_sharded, safetensors_header
from zquant.quant.qtypes import QTYPES


def test_we_read_what_the_package_writes(tmp_path):
    tensors = {
        "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "a": torch.arange(5, dtype=torch.bfloat16),
        "c": torch.tensor(2.0, dtype=torch.float16),
        "empty": torch.zeros(0, 4),
    }
    path = tmp_path / "theirs.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    source = open_safetensors(path)
    assert source.container == "safetensors"
    assert source.metadata == {"format": "pt"}
    assert source.n_bytes == 24 + 10 + 2
    offsets = [info.offset for info in source.tensors.values()]
    assert offsets == sorted(offsets)
    for name, tensor in tensors.items():
        assert source.tensors[name].shape == tuple(tensor.shape)
        assert source.raw(name).tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert {n: str(i.qtype) for n, i in source.tensors.items()} == {
        "a": "BF16",
        "b": "F32",
        "c": "F16",
        "empty": "F32",
    }


def test_the_package_reads_what_we_write(tmp_path):
    tensors = [("w", QTYPES["BF16"], (2, 3)), ("β", QTYPES["F32"], (4,)), ("s", QTYPES["F16"], ())]
    data = np.random.default_rng(0).integers(0, 120, 12 + 16 + 2, dtype=np.uint8)
    path = tmp_path / "ours.safetensors"
    plan = safetensors_header(tensors, {"made by": "zquant"})
    path.write_bytes(plan.header + data.tobytes())
    assert plan.total_size == path.stat().st_size
    assert plan.offsets == [len(plan.header) + begin for begin in (0, 12, 28)]
    with safe_open(path, "pt") as theirs:
        assert theirs.metadata() == {"made by": "zquant"}
        seen = [theirs.get_tensor(name) for name, _, _ in tensors]
    assert [(t.dtype, tuple(t.shape)) for t in seen] == [
        (torch.bfloat16, (2, 3)),
        (torch.float32, (4,)),
        (torch.float16, ()),
    ]
    assert b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in seen) == bytes(data)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert list(open_safetensors(path).tensors) == ["w", "β", "s"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("w", QTYPES["Q8_0"], (32,))], "'w' as Q8_0 cannot be written"),
        ([("w", QTYPES["F32"], (1,))] * 2, "cannot be written"),
    ],
    ids=["quantized", "twice"],
)
def test_what_safetensors_cannot_hold_has_no_header(tensors, message):
    with pytest.raises(ValueError, match=message):
        safetensors_header(tensors)


def single(build, data=bytes(8), **changes):
    """A file with one F32 tensor `w` of two weights, with changes to its entry."""
    return build.safetensors({"w": build.entry("F32", [2], 0, 8) | changes}, data)


def pair(build, *offsets):
    """Two F32 tensors of two weights at the given offsets, in 20 bytes of data."""
    header = {n: build.entry("F32", [2], at, at + 8) for n, at in zip("wv", offsets, strict=True)}
    return build.safetensors(header, bytes(20))


HOSTILE = {
    "short": (lambda _: b"1234567", "7 bytes are too few"),
    "length": (lambda b: b.safetensors({}, length=2**63), "claims 9223372036854775808 bytes"),
    "limit": (lambda b: b.safetensors({}, length=100_000_001), "100000000 are allowed"),
    "length past end": (lambda b: b.safetensors({}, length=9), "claims 9 bytes; 2 bytes follow"),
    "not UTF-8": (lambda b: b.safetensors(b'{"\xff":1}'), "JSON cannot be read"),
    "surrogate": (lambda b: b.safetensors(b'{"\\ud800":{}}'), "JSON cannot be read"),
    "not JSON": (lambda b: b.safetensors(b"{w}"), "JSON cannot be read"),
    "NaN": (lambda b: b.safetensors(b'{"w":NaN}'), "NaN is not JSON"),
    "list": (lambda b: b.safetensors([]), "no object but list"),
    "deep": (lambda b: b.safetensors(b'{"w":' + b"[" * 200_000), "nested too deeply"),
    "many digits": (lambda b: b.safetensors(b'{"w":' + b"9" * 5000 + b"}"), "cannot be read"),
    "same name": (lambda b: b.safetensors(b'{"w":{},"w":{}}'), "'w' appears twice"),
    "same field": (
        lambda b: b.safetensors(b'{"w":{"dtype":1,"dtype":2}}'),
        "'dtype' appears twice",
    ),
    "metadata": (lambda b: b.safetensors({"__metadata__": {"a": 1}}), "map of text to text"),
    "metadata list": (lambda b: b.safetensors({"__metadata__": []}), "map of text to text"),
    "no entry": (lambda b: b.safetensors({"w": 3}), "'w' lacks dtype, shape or data_offsets"),
    "no shape": (lambda b: b.safetensors({"w": {"dtype": "F32"}}), "lacks dtype, shape"),
    "unknown dtype": (lambda b: single(b, dtype="F31"), "'w' is 'F31', which zquant cannot read"),
    "dtype list": (lambda b: single(b, dtype=["F32"]), "which zquant cannot read"),
    "negative dim": (lambda b: single(b, shape=[-2, -1]), r"shape \[-2, -1\]; expected counts"),
    "float dim": (lambda b: single(b, shape=[2.0]), "expected counts"),
    "bool dim": (lambda b: single(b, shape=[2, True]), "expected counts"),
    "shape number": (lambda b: single(b, shape=2), "expected counts"),
    "many dims": (lambda b: single(b, shape=[2] + [1] * 8), "expected counts"),
    "huge dims": (lambda b: single(b, shape=[10**4000] * 2), "more than 2.64"),
    "one offset": (lambda b: single(b, data_offsets=[8]), "expected .begin, end"),
    "backward": (lambda b: single(b, data_offsets=[8, 0]), "expected .begin, end"),
    "size": (lambda b: single(b, data_offsets=[0, 4]), r"holds 4 bytes; F32 \[2\] needs 8"),
    "huge offset": (lambda b: single(b, data_offsets=[2**64, 2**64 + 8]), "more than 2.64"),
    "huge tensor": (
        lambda b: single(b, shape=[2**60], data_offsets=[0, 2**62]),
        "cut off: expected 4194304.0 TiB",
    ),
    "cut off": (lambda b: single(b, bytes(7)), r"cut off: expected 77 B \(77 bytes\), found 76 B"),
    "trailing": (lambda b: single(b, bytes(9)), "1 bytes follow the last tensor"),
    "hole first": (lambda b: single(b, bytes(9), data_offsets=[1, 9]), "begins at 1 and follows a"),
    "hole": (lambda b: pair(b, 0, 12), "'v' begins at 12 and follows a hole; expected 8"),
    "overlap": (lambda b: pair(b, 0, 4), "'v' begins at 4 and overlaps the tensor before it"),
    "same place": (lambda b: pair(b, 0, 0), "overlaps"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused(case, write, build):
    make, message = HOSTILE[case]
    path = write("hostile.safetensors", make(build))
    with pytest.raises(FormatError, match=message) as caught:
        open_safetensors(path)
    assert str(caught.value).startswith(f"{path}: ")


SIZES = {"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "I16": 2, "I32": 4, "I64": 8, "F64": 8}


@pytest.mark.parametrize(("dtype", "size"), SIZES.items(), ids=SIZES)
def test_other_dtypes_are_listed_with_their_sizes(dtype, size, write, build):
    header = {"w": build.entry(dtype, [3], 0, 3 * size)}
    info = open_safetensors(write("other.safetensors", build.safetensors(header, bytes(3 * size))))
    assert (info.tensors["w"].qtype.name, info.tensors["w"].nbytes) == (dtype, 3 * size)
    assert not info.tensors["w"].qtype.is_float


def test_types_without_whole_bytes_name_the_remedy(write, build):
    path = write("fp4.safetensors", single(build, dtype="F4"))
    expected = "tensor 'w' is 'F4', which zquant cannot read. Readable: F32, F16, BF16, F8_E4M3, "
    with pytest.raises(FormatError, match=expected):
        open_safetensors(path)


@pytest.fixture
def sharded(write, build):
    """Writes a checkpoint of two shards, with one tensor each, and returns the index."""

    def make(weight_map=None, folder="model"):
        for name, shard in (("w", "1.safetensors"), ("v", "2.safetensors")):
            header = {"__metadata__": {name: "x"}, name: build.entry("F32", [2], 0, 8)}
            write(f"{folder}/{shard}", build.safetensors(header, name.encode() * 8))
        if weight_map is None:
            weight_map = {"w": "1.safetensors", "v": "2.safetensors"}
        text = json.dumps({"metadata": {"total_size": 16}, "weight_map": weight_map})
        return write(f"{folder}/model.safetensors.index.json", text.encode())

    return make


def test_shards_are_one_source(sharded):
    index = sharded()
    for path in (index, index.parent, str(index.parent)):
        source = open_sharded(path)
        assert source.path == index.parent
        assert {name: bytes(source.raw(name)) for name in source.tensors} == {
            "w": b"w" * 8,
            "v": b"v" * 8,
        }
        assert source.metadata == {"w": "x", "v": "x"}
        assert len(source.readers) == 2


@pytest.mark.parametrize(
    "shard",
    ["../1.safetensors", "/etc/passwd", "a/1.safetensors", "a\\b", "C:x", "..", ".", "", "a\0", 3],
)
def test_index_that_points_outside_is_refused(shard, sharded):
    index = sharded({"w": shard})
    with pytest.raises(FormatError, match=r"'w' is said to be in .*; expected the name of a file"):
        open_sharded(index)


def test_link_out_of_the_folder_is_refused(sharded, tmp_path):
    index = sharded()
    shard = index.parent / "1.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        FormatError, match=r"'1.safetensors' is a link out of the folder, to .*else"
    ):
        open_sharded(index)


def test_links_of_the_hugging_face_cache_are_followed(sharded, tmp_path):
    index = sharded(folder="models--x/snapshots/0123/transformer")
    shard, blobs = index.parent / "1.safetensors", tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    shard.rename(blobs / "abc")
    shard.symlink_to("../../../blobs/abc")
    assert bytes(open_sharded(index).raw("w")) == b"w" * 8


def test_missing_shard_is_named_and_counted(sharded):
    index = sharded()
    (index.parent / "2.safetensors").unlink()
    with pytest.raises(FormatError, match=r"1 of 2 shards missing \(first: '2.safetensors'\)"):
        open_sharded(index)


def test_truncated_shard_is_named(sharded):
    index = sharded()
    shard = index.parent / "2.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"2.safetensors: the file is cut off"):
        open_sharded(index)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"w": "1.safetensors"} | dict.fromkeys("vxy", "2.safetensors"), r"2 of 4 .*'x' in 2.safe"),
        ({"w": "1.safetensors", "x": "2.safetensors"}, "'v' is in 2.safetensors, .* 'nothing'"),
        ({"w": "2.safetensors", "v": "1.safetensors"}, "'w' is in 1.* the index says '2.safe"),
        ({}, "'weight_map' is missing or empty"),
        ([], "'weight_map' is missing or empty"),
    ],
    ids=["missing", "unlisted", "swapped", "empty", "list"],
)
def test_index_and_shards_must_agree(weight_map, message, sharded):
    with pytest.raises(FormatError, match=message):
        open_sharded(sharded(weight_map))


def test_folder_needs_exactly_one_index(sharded, tmp_path):
    with pytest.raises(FormatError, match=r"expected one .*index.json, found none"):
        open_sharded(tmp_path)
    index = sharded()
    index.with_name("other.safetensors.index.json").write_bytes(index.read_bytes())
    with pytest.raises(FormatError, match=r"found model.*, other.*Give the index itself"):
        open_sharded(index.parent)


def test_a_deeply_nested_index_is_refused(write):
    index = write("model.safetensors.index.json", b'{"weight_map":' * 100_000)
    with pytest.raises(FormatError, match="nested too deeply"):
        open_sharded(index)


def test_a_padded_header_is_read(write, build):
    text = json.dumps({"w": build.entry("F32", [1], 0, 4)}).encode() + b" " * 5
    path = write("x", build.safetensors(text, struct.pack("<f", 1.5)))
    assert open_safetensors(path).raw("w").view(np.float32)[0] == 1.5
