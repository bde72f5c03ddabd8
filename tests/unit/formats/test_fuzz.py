"""2,000 seeded mutations of valid files: read correctly or refused, fast and without memory."""

import random
import struct
import time
import tracemalloc

import pytest

from zquant.errors import FormatError
from zquant.formats.detect import open_source
from zquant.formats.gguf_file import open_gguf
from zquant.formats.gguf_parser import StringArray
from zquant.formats.safetensors_file import open_safetensors

N_MUTATIONS = 1000  # of each format
MAX_SECONDS = 1.0
MAX_BYTES = 4 * 2**20  # the files have under 2 KiB; reading the JSON or a header takes a few more

EXTREMES = [
    *(struct.pack("<I", v) for v in (0, 1, 9, 2**16, 2**31 - 1, 2**31, 2**32 - 1)),
    *(struct.pack("<Q", v) for v in (0, 1, 2**20, 2**31, 2**32, 2**60, 2**63, 2**64 - 32)),
    *(struct.pack("<Q", v) for v in (2**63 - 1, 2**64 - 1)),
    *(b"[[[[", b"{{{{", b"99999999", b"-1", b"1e99", b"null", b"\xff\xff\xff\xff", b'""""'),
]
KINDS = ["flip", "flip", "extreme", "extreme", "digit", "digit", "cut", "insert", "copy", "swap"]


def small_gguf(build):
    pairs = [
        build.pair("general.architecture", 8, build.string("lumina2")),
        build.pair("general.alignment", 4, struct.pack("<I", 32)),
        build.pair("tokens", 9, build.array(8, 3, b"".join(map(build.string, ("a", "bc", "é"))))),
        build.pair("types", 9, build.array(5, 3, struct.pack("<3i", 1, 2, 3))),
        build.pair("nested", 9, build.array(9, 2, build.array(7, 1, b"\1") * 2)),
        build.pair("eps", 6, struct.pack("<f", 1e-6)),
    ]
    tensors = [
        build.tensor("layers.0.attention.qkv.weight", [32, 6], 8, 0),
        build.tensor("x_pad_token", [8, 1], 0, 224),
        build.tensor("norm", [8], 30, 256),
    ]
    return build.gguf(pairs, tensors, bytes(range(256)) + bytes(16))


def small_safetensors(build):
    header = {
        "__metadata__": {"format": "pt"},
        "layers.0.attention.qkv.weight": build.entry("BF16", [6, 8], 0, 96),
        "x_pad_token": build.entry("F32", [1, 8], 96, 128),
        "norm": build.entry("F16", [8], 128, 144),
    }
    return build.safetensors(header, bytes(range(144)))


def mutated(rng, valid, header_size):
    """One to three edits, four of five in the header."""
    data = bytearray(valid)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        end = min(len(data), header_size if rng.random() < 0.8 else len(data))
        at = rng.randrange(max(end, 1))
        length = rng.randrange(1, 64)
        kind = rng.choice(KINDS)
        if kind == "flip" and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == "extreme":
            value = rng.choice(EXTREMES)
            data[at : at + len(value)] = value
        elif kind == "digit":  # keeps JSON valid, so that the checks behind the parser are reached
            digits = [i for i, byte in enumerate(data) if chr(byte).isdecimal()]
            if digits:
                data[rng.choice(digits)] = rng.choice(b"0123456789")
        elif kind == "cut":
            del data[at : rng.choice([at + length, len(data)])]
        elif kind == "insert":
            data[at:at] = rng.randbytes(length)
        elif kind == "copy":
            data[at:at] = data[at : at + length]
        elif kind == "swap":
            other = rng.randrange(max(end, 1))
            data[at : at + 8], data[other : other + 8] = data[other : other + 8], data[at : at + 8]
    return bytes(data)


def read_everything(path, opener):
    """Open, and use every part of what was opened."""
    source = opener(path)
    for name, info in source.tensors.items():
        assert source.raw(name).nbytes == info.nbytes
        assert info.nbytes == info.n_weights // info.qtype.qblock * info.qtype.qblock_bytes
    for value in source.metadata.values():
        if isinstance(value, StringArray):
            assert len(list(value)) == len(value)


@pytest.mark.parametrize(
    ("make", "opener", "header_size"),
    [(small_gguf, open_gguf, 448), (small_safetensors, open_safetensors, 281)],
    ids=["gguf", "safetensors"],
)
def test_every_mutation_is_read_or_refused(make, opener, header_size, build, tmp_path):
    valid = make(build)
    path = tmp_path / "mutated"
    path.write_bytes(valid)
    read_everything(path, opener)
    rng = random.Random(20260901)
    outcomes = {"read": 0, "refused": 0}
    tracemalloc.start()
    try:
        for _ in range(N_MUTATIONS):
            path.write_bytes(mutated(rng, valid, header_size))
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            start = time.process_time()
            try:
                read_everything(path, rng.choice([opener, open_source]))
                outcomes["read"] += 1
            except FormatError:
                outcomes["refused"] += 1
            assert time.process_time() - start < MAX_SECONDS
            assert tracemalloc.get_traced_memory()[1] - before < MAX_BYTES
    finally:
        tracemalloc.stop()
    assert sum(outcomes.values()) == N_MUTATIONS
    # both ends must be exercised for the count to mean something
    assert min(outcomes.values()) > 50
