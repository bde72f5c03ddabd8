"""Byte identity with ggml: its own output on seeded inputs, see tests/golden/README.md."""

from pathlib import Path

import numpy as np
import pytest
import torch

from zquant.quant import codec
from zquant.quant.codec import dequantize, quantize
from zquant.quant.qtypes import QTYPES

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "ggml-golden.npz")
QUANTIZED = [name for name, qtype in QTYPES.items() if not qtype.is_float]
SEARCHED = [name for name in QUANTIZED if name != "Q8_0"]
IMPORTANCE = GOLDEN["imatrix"]
SETS = sorted(key.removeprefix("input/") for key in GOLDEN.files if key.startswith("input/"))
DECODED_SETS = ["edge", "gauss"]


def test_golden_file_covers_what_these_tests_think():
    assert len(SETS) == 7
    assert set(DECODED_SETS) <= set(SETS)
    assert len(QUANTIZED) == 12
    assert (IMPORTANCE > 0).all()


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("qtype", QUANTIZED)
def test_quantized_bytes_equal_ggml(qtype, name):
    packed = quantize(GOLDEN[f"input/{name}"], QTYPES[qtype])
    np.testing.assert_array_equal(packed, GOLDEN[f"bytes/{qtype}/{name}"])


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("qtype", SEARCHED)
def test_bytes_by_importance_equal_ggml(qtype, name):
    packed = quantize(GOLDEN[f"input/{name}"], QTYPES[qtype], IMPORTANCE)
    np.testing.assert_array_equal(packed, GOLDEN[f"bytes_imatrix/{qtype}/{name}"])


@pytest.mark.parametrize("name", DECODED_SETS)
@pytest.mark.parametrize("qtype", QUANTIZED)
def test_decoded_bits_equal_ggml(qtype, name):
    packed = torch.from_numpy(GOLDEN[f"bytes/{qtype}/{name}"])
    decoded = dequantize(packed, QTYPES[qtype], torch.float32).numpy()
    expected = GOLDEN[f"decoded/{qtype}/{name}"]
    np.testing.assert_array_equal(decoded.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("chunk", [1, 512, 1500])
@pytest.mark.parametrize("qtype", QUANTIZED)
def test_chunk_size_changes_no_bit(monkeypatch, qtype, chunk):
    """One row at a time, where the searches see few groups, and uneven chunks."""
    for constant in ("QUANTIZE_CHUNK", "DECODE_CHUNK_CPU"):
        monkeypatch.setattr(codec, constant, chunk)
    packed = quantize(GOLDEN["input/edge"], QTYPES[qtype])
    np.testing.assert_array_equal(packed, GOLDEN[f"bytes/{qtype}/edge"])
    decoded = dequantize(torch.from_numpy(packed), QTYPES[qtype], torch.float32)
    np.testing.assert_array_equal(decoded.numpy(), GOLDEN[f"decoded/{qtype}/edge"])


@pytest.mark.parametrize("chunk", [1, 1500])
@pytest.mark.parametrize("qtype", SEARCHED)
def test_chunk_size_changes_no_bit_by_importance(monkeypatch, qtype, chunk):
    monkeypatch.setattr(codec, "QUANTIZE_CHUNK", chunk)
    packed = quantize(GOLDEN["input/edge"], QTYPES[qtype], IMPORTANCE)
    np.testing.assert_array_equal(packed, GOLDEN[f"bytes_imatrix/{qtype}/edge"])


@pytest.mark.parametrize("qtype", QUANTIZED)
def test_single_qblock_equals_ggml(qtype):
    """The first qblock of a row alone: sums over few groups must not change their order."""
    qblock, n_bytes = QTYPES[qtype].qblock, QTYPES[qtype].qblock_bytes
    for name in SETS:
        packed = quantize(GOLDEN[f"input/{name}"][:1, :qblock], QTYPES[qtype])
        np.testing.assert_array_equal(packed, GOLDEN[f"bytes/{qtype}/{name}"][:1, :n_bytes])


@pytest.mark.parametrize("qtype", [name for name in SEARCHED if QTYPES[name].qblock == 256])
def test_single_qblock_by_importance_equals_ggml(qtype):
    """Of the types whose costs depend on the qblock alone, not on the row."""
    n_bytes = QTYPES[qtype].qblock_bytes
    for name in SETS:
        packed = quantize(GOLDEN[f"input/{name}"][:1, :256], QTYPES[qtype], IMPORTANCE[:256])
        np.testing.assert_array_equal(packed, GOLDEN[f"bytes_imatrix/{qtype}/{name}"][:1, :n_bytes])
