"""GGUF: equal to gguf-py in both directions; hostile headers are refused with a reason."""

import struct
import time

import gguf
import numpy as np
import pytest

from zquant.errors import FormatError
from zquant.formats.gguf_file import gguf_header, open_gguf
from zquant.quant.qtypes import QTYPES, UNSUPPORTED_IDS

METADATA = {
    "general.name": "tiny 模型",
    "a.int": 4_000_000_000,
    "a.float": 0.5,
    "a.bool": True,
    "a.strings": ["one", "", "три"],
    "a.ints": [-1, 0, 7],
    "a.floats": [0.25, -2.0],
    "a.bools": [True, False],
}


def test_gguf_py_reads_what_we_lay_out(tmp_path):
    shapes = [
        ("x_pad_token", QTYPES["F32"], (1, 24)),
        ("bias", QTYPES["BF16"], (7,)),
        ("w", QTYPES["Q4_K"], (3, 512)),
        ("w8", QTYPES["Q8_0"], (5, 32)),
        ("conv", QTYPES["F16"], (2, 3, 4, 5)),
    ]
    plan = gguf_header("lumina2", METADATA, shapes)
    rng = np.random.default_rng(0)
    file = bytearray(plan.total_size)
    file[: len(plan.header)] = plan.header
    datas = []
    for (_, qtype, shape), offset in zip(shapes, plan.offsets, strict=True):
        nbytes = qtype.row_bytes(shape[-1]) * int(np.prod(shape[:-1]))
        datas.append(rng.integers(0, 255, nbytes, dtype=np.uint8).tobytes())
        file[offset : offset + nbytes] = datas[-1]
    path = tmp_path / "ours.gguf"
    path.write_bytes(file)

    theirs = gguf.GGUFReader(path)
    assert [t.name for t in theirs.tensors] == [name for name, _, _ in shapes]
    for seen, (_, qtype, shape), data, offset in zip(
        theirs.tensors, shapes, datas, plan.offsets, strict=True
    ):
        assert seen.tensor_type.name == qtype.name
        assert tuple(seen.shape)[::-1] == shape
        assert seen.data_offset == offset
        assert seen.data.tobytes() == data
    for key, value in {"general.architecture": "lumina2", **METADATA}.items():
        assert theirs.fields[key].contents() == value

    source = open_gguf(path)
    assert {n: (i.qtype, i.shape) for n, i in source.tensors.items()} == {
        n: (q, s) for n, q, s in shapes
    }
    assert all(source.raw(n).tobytes() == d for (n, _, _), d in zip(shapes, datas, strict=True))
    assert {key: source.metadata[key] for key in METADATA} == METADATA


def test_we_read_what_gguf_py_writes(tmp_path):
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_uint64("u64", 2**63)
    writer.add_int8("i8", -3)
    writer.add_float64("f64", 1 / 3)
    writer.add_array("nested", [[1, 2], [3]])
    writer.add_array("tokens", ["Ġa", "b"])
    writer.add_custom_alignment(64)
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    packed = np.arange(4 * 34, dtype=np.uint8).reshape(4, 34)
    writer.add_tensor("weights", weights)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    source = open_gguf(path)
    assert source.metadata["u64"] == 2**63
    assert source.metadata["i8"] == -3
    assert source.metadata["f64"] == 1 / 3
    assert source.metadata["nested"] == [[1, 2], [3]]
    assert list(source.metadata["tokens"]) == ["Ġa", "b"]
    assert source.metadata["tokens"][1] == "b"
    assert source.tensors["packed"].shape == (4, 32)
    assert source.tensors["weights"].shape == (2, 3)
    np.testing.assert_array_equal(source.raw("weights").view(np.float32), weights.ravel())
    np.testing.assert_array_equal(source.raw("packed"), packed.ravel())


def test_a_real_size_tokenizer_opens_fast(write, build):
    tokens = b"".join(build.string(f"token{i}") for i in range(151_936))
    merges = b"".join(build.string(f"to ken{i}") for i in range(151_387))
    types = np.ones(151_936, "<i4").tobytes()
    pairs = [
        build.pair("tokens", 9, build.array(8, 151_936, tokens)),
        build.pair("merges", 9, build.array(8, 151_387, merges)),
        build.pair("types", 9, build.array(5, 151_936, types)),
    ]
    path = write("vocabulary.gguf", build.gguf(pairs))
    best = min(_seconds_to_open(path) for _ in range(3))
    assert best < 0.3
    metadata = open_gguf(path).metadata
    assert len(metadata["tokens"]) == 151_936
    assert metadata["tokens"][151_935] == "token151935"
    assert metadata["merges"][:2] == ["to ken0", "to ken1"]
    assert len(metadata["types"]) == 151_936


def _seconds_to_open(path):
    start = time.perf_counter()
    open_gguf(path)
    return time.perf_counter() - start


def test_version_2_and_any_order_of_tensors(write, build):
    tensors = [build.tensor("b", [8], offset=32), build.tensor("a", [8], offset=0)]
    source = open_gguf(write("v2.gguf", build.gguf([], tensors, bytes(64), version=2)))
    assert list(source.tensors) == ["a", "b"]


def test_other_alignment_is_followed(write, build):
    pairs = [build.pair("general.alignment", 4, struct.pack("<I", 128))]
    data = bytes(range(4))
    path = write("a.gguf", build.gguf(pairs, [build.tensor("w", [1])], data, alignment=128))
    assert open_gguf(path).raw("w").tobytes() == data


def one(build, *, data=bytes(4096), **kwargs):
    """A file with one tensor made of `kwargs`."""
    fields = {"name": "w", "dims": [4], "type_id": 0, "offset": 0} | kwargs
    return build.gguf([], [build.tensor(**fields)], data)


def value(build, kind, packed):
    """A file with one metadata value."""
    return build.gguf([build.pair("k", kind, packed)])


HOSTILE = {
    "magic": (lambda b: b.gguf(magic=b"GGML"), "starts with b'GGML', expected b'GGUF'"),
    "version 1": (lambda b: b.gguf(version=1), "version 1, expected 2 or 3"),
    "big endian": (lambda b: b.gguf(version=3 << 24), "big-endian"),
    "only magic": (lambda _: b"GGUF", "header needs 8 bytes, but the file has 4"),
    "tensor count": (lambda b: b.gguf(n_tensors=2**63), "9223372036854775808 tensors claimed"),
    "pair count": (lambda b: b.gguf(n_pairs=65537), "65537 metadata pairs claimed"),
    "tensors missing": (lambda b: b.gguf(n_tensors=9), "header needs"),
    "long string": (
        lambda b: value(b, 8, struct.pack("<Q", 2**62)),
        "string of 4611686018427387904",
    ),
    "long key": (lambda b: b.gguf([struct.pack("<Q", 65537)]), "string of 65537 bytes"),
    "string past end": (lambda b: value(b, 8, struct.pack("<Q", 5000)), "header needs"),
    "bad key": (lambda b: b.gguf([b.pair(b"\xff", 4, bytes(4))]), r"b'\\xff' is not UTF-8"),
    "bad name": (lambda b: one(b, name=b"\xc3("), "not UTF-8"),
    "bad string": (lambda b: value(b, 8, b.string(b"\xed\xa0\x80")), "not UTF-8"),
    "same key": (lambda b: b.gguf([b.pair("k", 0, b"1")] * 2), "metadata key 'k' is there twice"),
    "same name": (lambda b: b.gguf([], [b.tensor("w", [1])] * 2), "tensor 'w' is there twice"),
    "value type": (lambda b: value(b, 13, bytes(9)), "unknown metadata type 13"),
    "bool": (lambda b: value(b, 7, b"\x02"), "bool in the metadata is not 0 or 1"),
    "array 2^60": (lambda b: value(b, 9, b.array(4, 2**60)), "1152921504606846976 array elements"),
    "empty strings": (lambda b: value(b, 9, b.array(8, 2**22)), "header needs"),
    "string in array": (
        lambda b: value(b, 9, b.array(8, 1, struct.pack("<Q", 2**64 - 1))),
        "header needs 18446744073709551",
    ),
    "nested": (
        lambda b: value(b, 9, b.array(9, 1) * 2000),
        "nested more than 4 deep",
    ),
    "elements": (
        lambda b: value(b, 9, b.array(9, 2, b.array(0, 8, bytes(8)) + b.array(0, 2**22))),
        "4194304 array elements claimed before byte .*; expected at most 4194294",
    ),
    "no dims": (lambda b: one(b, dims=[]), "has 0 dimensions, expected 1 to 4"),
    "dims count": (lambda b: one(b, dims=[1] * 5), "has 5 dimensions"),
    "dim 0": (lambda b: one(b, dims=[4, 0]), r"has dims \[4, 0\]; expected no 0"),
    "row": (lambda b: one(b, dims=[33], type_id=8), "multiple of 32 for Q8_0"),
    "huge dims": (lambda b: one(b, dims=[2**63] * 4), "download may be incomplete"),
    "offset wraps": (lambda b: one(b, offset=2**64 - 32), "ends at byte 184467440737095"),
    "offset odd": (lambda b: one(b, offset=1), "begins at 1; expected a multiple of 32"),
    "cut off": (lambda b: one(b, dims=[2000]), r"\(7.9 KiB\); the file has 4160 \(4.1 KiB\)"),
    "overlap": (
        lambda b: b.gguf([], [b.tensor("w", [9]), b.tensor("v", [1], offset=32)], bytes(99)),
        "tensors 'w' and 'v' overlap at byte",
    ),
    "same place": (
        lambda b: b.gguf([], [b.tensor("w", [1]), b.tensor("v", [1])], bytes(99)),
        "overlap",
    ),
    "unknown type": (lambda b: one(b, type_id=77), "'w' is of the unknown type 77, which zquant"),
    "retired type": (lambda b: one(b, type_id=4), "unknown type 4"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused(case, write, build):
    make, message = HOSTILE[case]
    path = write("hostile.gguf", make(build))
    with pytest.raises(FormatError, match=message) as caught:
        open_gguf(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("alignment", [0, 4, 48, 2**21, 2**31])
def test_alignment_must_be_a_small_power_of_two(alignment, write, build):
    pairs = [build.pair("general.alignment", 4, struct.pack("<I", alignment))]
    path = write("a.gguf", build.gguf(pairs, [build.tensor("w", [1])], bytes(4)))
    with pytest.raises(FormatError, match=f"general.alignment is '{alignment}'; expected a power"):
        open_gguf(path)


@pytest.mark.parametrize("type_id", UNSUPPORTED_IDS)
def test_unsupported_type_names_remedy(type_id, write, build):
    path = write("iq.gguf", one(build, dims=[256], type_id=type_id))
    expected = (
        f"tensor 'w' is {UNSUPPORTED_IDS[type_id]}, which zquant cannot read. Readable: F32, .*"
        "Convert the original: zquant convert --qtype Q4_K_M"
    )
    with pytest.raises(FormatError, match=expected):
        open_gguf(path)


def test_bad_text_in_a_string_array_is_found_when_used(write, build):
    path = write("a.gguf", value(build, 9, build.array(8, 1, build.string(b"\xff"))))
    array = open_gguf(path).metadata["k"]
    assert len(array) == 1
    with pytest.raises(FormatError, match="not UTF-8"):
        array[0]


@pytest.mark.parametrize("bad", [None, [], [1, "a"], -1, 2**32, [2**31], {"a": 1}, [[1]]], ids=repr)
def test_values_gguf_cannot_hold_are_refused(bad):
    with pytest.raises(ValueError, match="'key' cannot be stored"):
        gguf_header("x", {"key": bad}, [])


@pytest.mark.parametrize(
    "tensors",
    [[("w", ())], [("w", (1,) * 5)], [("w", (0,))], [("w", (1,)), ("w", (1,))]],
    ids=["scalar", "5-D", "empty", "twice"],
)
def test_tensors_gguf_cannot_hold_are_refused(tensors):
    with pytest.raises(ValueError, match=r"dimensions > 0|twice"):
        gguf_header("x", {}, [(name, QTYPES["F32"], shape) for name, shape in tensors])
