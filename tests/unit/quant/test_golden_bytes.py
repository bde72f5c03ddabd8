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
SETS = sorted(key.removeprefix("input/") for key in GOLDEN.files if key.startswith("input/"))
DECODED_SETS = ["edge", "gauss"]


def test_golden_file_covers_what_these_tests_think():
    assert len(SETS) == 7
    assert set(DECODED_SETS) <= set(SETS)
    assert len(QUANTIZED) == 6


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("qtype", QUANTIZED)
def test_quantized_bytes_equal_ggml(qtype, name):
    packed = quantize(GOLDEN[f"input/{name}"], QTYPES[qtype])
    np.testing.assert_array_equal(packed, GOLDEN[f"bytes/{qtype}/{name}"])


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


@pytest.mark.parametrize("qtype", QUANTIZED)
def test_single_qblock_equals_ggml(qtype):
    """The first qblock of a row alone: sums over few groups must not change their order."""
    qblock, n_bytes = QTYPES[qtype].qblock, QTYPES[qtype].qblock_bytes
    for name in SETS:
        packed = quantize(GOLDEN[f"input/{name}"][:1, :qblock], QTYPES[qtype])
        np.testing.assert_array_equal(packed, GOLDEN[f"bytes/{qtype}/{name}"][:1, :n_bytes])
