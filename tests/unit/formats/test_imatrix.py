"""Importance files: both forms of llama.cpp, ours as gguf-py sees them, and broken ones."""

import random
import struct

import gguf
import numpy as np
import pytest

from zquant.errors import FormatError
from zquant.formats.imatrix import Imatrix, InputSums, read_imatrix, write_imatrix

NAMES = ("blk.0.attn_q.weight", "layers.0.attention.qkv.weight")


def sums(n, count=6.0, seed=0):
    squares = np.random.default_rng(seed).random(n, np.float32).astype(np.float64)
    return InputSums(squares=squares, count=count)


def ours(**fields):
    entries = {NAMES[1]: sums(40), NAMES[0]: sums(3, count=2.0, seed=1)}
    return Imatrix(entries=entries, datasets=("prompts.txt",), n_chunks=2, chunk_size=3, **fields)


def same(found, expected):
    assert set(found.entries) == set(expected.entries)
    for name, each in expected.entries.items():
        assert found.entries[name].count == each.count
        np.testing.assert_array_equal(found.entries[name].squares, each.squares)


def theirs(path, tensors, kind="imatrix"):
    """A file as llama.cpp lays it out: no architecture, tensors by name."""
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()
    if kind:
        writer.add_string("general.type", kind)
    writer.add_array("imatrix.datasets", ["wiki.txt", "more.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def entry(name, n=5, **changes):
    rows = {
        "in_sum2": np.arange(n, dtype=np.float32)[None],
        "counts": np.full((1, 1), 4, np.float32),
        "in_sum": np.zeros((1, n), np.float32),
        **changes,
    }
    return {f"{name}.{kind}": values for kind, values in rows.items() if values is not None}


def legacy(*matrices, tail=b""):
    data = struct.pack("<i", len(matrices))
    for name, calls, values in matrices:
        data += struct.pack("<i", len(name)) + name.encode()
        data += struct.pack("<ii", calls, len(values)) + np.array(values, "<f4").tobytes()
    return data + tail


def test_what_is_written_is_read_again(tmp_path):
    write_imatrix(tmp_path / "a.gguf", ours())
    found = read_imatrix(tmp_path / "a.gguf")
    same(found, ours())
    assert (found.datasets, found.n_chunks, found.chunk_size) == (("prompts.txt",), 2, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_gguf_py_sees_the_layout_of_llama_cpp(tmp_path):
    write_imatrix(tmp_path / "a.gguf", ours())
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    pairs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert pairs == {
        "general.type": "imatrix",
        "imatrix.datasets": ["prompts.txt"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 3,
    }
    kinds = {key: reader.fields[key].types[-1].name for key in list(pairs)[2:]}
    assert set(kinds.values()) == {"UINT32"}
    shapes = {t.name: (t.tensor_type.name, t.shape.tolist()) for t in reader.tensors}
    assert shapes == {
        f"{NAMES[0]}.in_sum2": ("F32", [3, 1]),
        f"{NAMES[0]}.counts": ("F32", [1, 1]),
        f"{NAMES[1]}.in_sum2": ("F32", [40, 1]),
        f"{NAMES[1]}.counts": ("F32", [1, 1]),
    }


def test_the_gguf_of_llama_cpp_is_read(tmp_path):
    found = read_imatrix(theirs(tmp_path / "a.gguf", entry(NAMES[0]) | entry("b", 2)))
    assert set(found.entries) == {NAMES[0], "b"}
    assert found.entries[NAMES[0]].squares.tolist() == [0, 1, 2, 3, 4]
    assert found.entries[NAMES[0]].count == 4
    assert (found.datasets, found.n_chunks, found.chunk_size) == (("wiki.txt", "more.txt"), 7, 512)


@pytest.mark.parametrize("tail", [b"", struct.pack("<ii8s", 9, 8, b"wiki.txt")])
def test_the_older_form_is_read(tmp_path, tail):
    path = tmp_path / "a.dat"
    path.write_bytes(legacy((NAMES[0], 4, [8.0, 2.0]), ("b", 0, [3.0]), tail=tail))
    found = read_imatrix(path)
    means = {name: (e.squares / e.count).tolist() for name, e in found.entries.items()}
    assert means == {NAMES[0]: [2.0, 0.5], "b": [3.0]}
    assert (found.n_chunks, found.datasets) == ((9, ("wiki.txt",)) if tail else (0, ()))


def test_a_matrix_that_saw_no_token_has_no_entry(tmp_path):
    unseen = entry("b", counts=np.zeros((1, 1), np.float32))
    assert set(read_imatrix(theirs(tmp_path / "a.gguf", entry("a") | unseen)).entries) == {"a"}
    with pytest.raises(FormatError, match="has no matrices with data"):
        read_imatrix(theirs(tmp_path / "b.gguf", unseen))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": None}, r"'a\.counts' is not there; expected F32"),
        ({"in_sum2": None}, r"'a\.in_sum2' is not there; expected F32"),
        ({"in_sum2": np.zeros((1, 5), np.float16)}, r"'a\.in_sum2' is F16; expected F32"),
        ({"in_sum2": np.zeros((2, 5), np.float32)}, r"sums \[2, 5\] and 1 counts; expected \[1"),
        ({"counts": np.ones((3, 1), np.float32)}, r"and 3 counts; expected \[1, K\] and one count"),
        ({"in_sum2": np.array([[0, np.nan]], "f4")}, "squares of input 1 is nan; expected finite"),
        ({"in_sum2": np.array([[1, -2]], "f4")}, "squares of input 1 is -2.0; expected finite"),
        ({"in_sum2": np.array([[np.inf]], "f4")}, "squares of input 0 is inf; expected finite"),
        ({"counts": np.array([[-1]], "f4")}, "counts -1 tokens; expected 0, or 1 or more"),
        ({"counts": np.array([[0.1]], "f4")}, r"counts 0\.1 tokens; expected 0, or 1 or more"),
        ({"counts": np.array([[np.nan]], "f4")}, "counts nan tokens; expected 0, or 1 or more"),
    ],
)
def test_numbers_that_cannot_be_are_refused(tmp_path, changes, message):
    with pytest.raises(FormatError, match=message):
        read_imatrix(theirs(tmp_path / "a.gguf", entry("a", **changes)))


@pytest.mark.parametrize("kind", ["", "model"])
def test_a_gguf_of_something_else_is_refused(tmp_path, kind):
    with pytest.raises(FormatError, match=r"expected 'imatrix'.*zquant calibrate"):
        read_imatrix(theirs(tmp_path / "a.gguf", entry("a"), kind))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not at all one", "neither a GGUF nor an older imatrix"),
        (legacy(), "0 matrices claimed"),
        (legacy(("a", 1, [])), "0 inputs of 'a' claimed"),
        (legacy(("a", 1, [1.0]), ("a", 1, [1.0])), "matrix 'a' is there twice"),
        (legacy(("a", 1, [1.0, -1.0])), "squares of input 1 is -1.0"),
        (struct.pack("<ii", 1, -1), "a name of -1 bytes"),
        (struct.pack("<ii2sii", 1, 2, b"\xff\xfe", 1, 1), "is not UTF-8"),
        (struct.pack("<iiciI", 1, 1, b"a", 1, 2**31 - 1), "inputs of 'a' claimed"),
        (b"", "needs 4 bytes, but has 0"),
    ],
)
def test_what_is_no_older_file_is_refused(tmp_path, data, message):
    (tmp_path / "a.dat").write_bytes(data)
    with pytest.raises(FormatError, match=message):
        read_imatrix(tmp_path / "a.dat")


def test_every_cut_is_noticed(tmp_path):
    write_imatrix(tmp_path / "a.gguf", ours())
    whole = (tmp_path / "a.gguf").read_bytes()
    old = legacy(("first", 4, [8.0, 2.0]), ("second", 1, [3.0]))
    end = len(whole) - 28  # the last number; zeros up to the alignment follow
    for data in [whole[:n] for n in range(0, end, 7)] + [old[:n] for n in range(len(old))]:
        (tmp_path / "cut").write_bytes(data)
        with pytest.raises(FormatError):
            read_imatrix(tmp_path / "cut")


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_every_mutation_is_read_or_refused(tmp_path, form):
    path = tmp_path / "a"
    write_imatrix(path, ours())
    valid = path.read_bytes()
    if form == "dat":
        tail = struct.pack("<ii8s", 9, 8, b"wiki.txt")
        valid = legacy(("first", 4, [8.0, 2.0]), ("second", 1, [3.0]), tail=tail)
    rng, n_refused = random.Random(7), 0
    extremes = [struct.pack("<i", n) for n in (0, 1, -1, 2**20, 2**31 - 1, -(2**31))]
    for _ in range(500):
        data, at = bytearray(valid), rng.randrange(len(valid))
        if rng.random() < 0.5:
            data[at] ^= 1 << rng.randrange(8)
        else:
            data[at : at + 4] = rng.choice(extremes)
        path.write_bytes(data)
        try:
            found = read_imatrix(path)
        except FormatError:
            n_refused += 1
            continue
        for each in found.entries.values():
            assert each.count > 0
            assert np.isfinite(each.squares).all()
            assert (each.squares >= 0).all()
    assert 50 < n_refused < 450


def test_a_file_that_is_not_there_is_one_message(tmp_path):
    with pytest.raises(FormatError, match=r"nothing\.gguf: cannot be opened.*Check the path"):
        read_imatrix(tmp_path / "nothing.gguf")


def test_sums_that_float32_cannot_hold_are_not_written(tmp_path):
    large = Imatrix(entries={"a": InputSums(squares=np.array([1e300]), count=1.0)}, datasets=("d",))
    with pytest.raises(ValueError, match="sums of 'a' are not finite in float32"):
        write_imatrix(tmp_path / "a.gguf", large)
    assert list(tmp_path.iterdir()) == []
