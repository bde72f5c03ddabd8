"""Quantizing and decoding against gguf-py, on random bytes and on inputs at the edge."""

import gguf
import numpy as np
import pytest
import torch

from zquant.quant.codec import dequantize, quantize
from zquant.quant.qtypes import QTYPES

QUANTIZED = [name for name, qtype in QTYPES.items() if not qtype.is_float]
ORACLE_QUANTIZES = ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]
# byte offset of each float16 scale in a qblock
SCALES = {
    "Q8_0": [0],
    "Q6_K": [208],
    "Q5_K": [0, 2],
    "Q4_K": [0, 2],
    "Q3_K": [108],
    "Q2_K": [80, 82],
    "Q5_1": [0, 2],
    "Q5_0": [0],
    "Q4_1": [0, 2],
    "Q4_0": [0],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
}
# relative RMS error of Gaussian weights, as measured with ggml
GAUSSIAN_ERROR = {
    "Q8_0": 0.0054,
    "Q6_K": 0.0178,
    "Q5_K": 0.0361,
    "Q5_1": 0.0379,
    "Q5_0": 0.0427,
    "Q4_K": 0.0714,
    "IQ4_NL": 0.0762,
    "IQ4_XS": 0.0767,
    "Q4_1": 0.0783,
    "Q4_0": 0.0860,
    "Q3_K": 0.1509,
    "Q2_K": 0.2968,
}
BF16_EDGES = {
    "tie_to_even_down": (0x3F808000, 0x3F80),
    "tie_to_even_up": (0x3F818000, 0x3F82),
    "above_tie": (0x3F808001, 0x3F81),
    "below_tie": (0x3F807FFF, 0x3F80),
    "overflow": (0x7F7FFFFF, 0x7F80),
    "largest_that_stays": (0x7F7F7FFF, 0x7F7F),
    "denormal": (0x00008001, 0x0001),
    "negative_zero": (0x80000000, 0x8000),
}
F16_EDGES = {
    "tie_to_even_down": (2049.0, 2048.0),
    "tie_to_even_up": (2051.0, 2052.0),
    "largest_that_stays": (65519.9, 65504.0),
    "overflow": (65520.0, np.inf),
    "negative_overflow": (-1e6, -np.inf),
    "smallest_denormal": (2.0**-24, 2.0**-24),
    "underflow_tie": (2.0**-25, 0.0),
}


def oracle_type(name):
    return gguf.GGMLQuantizationType[name]


def random_bytes(name, n_rows, n_qblocks, *, finite, seed=0):
    qtype = QTYPES[name]
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (n_rows, n_qblocks, qtype.qblock_bytes), dtype=np.uint8)
    for at in SCALES[name] if finite else []:
        scale = rng.standard_normal((n_rows, n_qblocks, 1)).astype(np.float16)
        packed[..., at : at + 2] = scale.view(np.uint8)
    return packed.reshape(n_rows, -1)


def oracle_decoded(packed, name):
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(packed, oracle_type(name))


@pytest.mark.parametrize("name", ORACLE_QUANTIZES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_quantized_bytes_equal_gguf_py(name, scale):
    weights = np.random.default_rng(1).standard_normal((9, 224)).astype(np.float32)
    # bfloat16 values, as in checkpoints: they hit ties of the rounding
    weights = (weights * np.float32(scale)).view(np.uint32) & 0xFFFF0000
    weights = weights.view(np.float32)
    expected = gguf.quants.quantize(weights, oracle_type(name))
    np.testing.assert_array_equal(quantize(weights, QTYPES[name]), expected)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0"])
def test_zeros_have_the_scale_of_ggml_whatever_their_signs(name):
    """ggml divides +0 by a negative level; gguf-py divides the first zero."""
    for first in (0.0, -0.0):
        zeros = np.zeros((1, 32), np.float32)
        zeros[0, 0] = first
        assert quantize(zeros, QTYPES[name])[0, :2].tolist() == [0, 0x80]


@pytest.mark.parametrize("importance", [None, np.ones(32, np.float32)], ids=["plain", "weighed"])
@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_the_first_of_several_zeros_gives_the_minimum_its_sign(name, importance):
    for first, expected in ((0.0, 0), (-0.0, 0x80)):
        weights = np.full((1, 32), -first, np.float32)
        weights[0, 0] = first
        assert quantize(weights, QTYPES[name], importance)[0, 2:4].tolist() == [0, expected]


def test_q8_0_rounds_halves_away_from_zero():
    """Largest weight 127 makes the scale 1, so the others are stored as they round."""
    below_half = np.nextafter(np.float32(0.5), np.float32(0))
    weights = np.zeros((1, 32), np.float32)
    weights[0, :7] = [127, 0.5, -0.5, 2.5, -2.5, below_half, 126.5]
    q = quantize(weights, QTYPES["Q8_0"])[0, 2:].view(np.int8)
    assert q[:7].tolist() == [127, 1, -1, 3, -3, 0, 127]


@pytest.mark.parametrize("name", QUANTIZED)
def test_random_bytes_decode_as_in_gguf_py(name):
    packed = random_bytes(name, 7, 3, finite=True)
    decoded = dequantize(torch.from_numpy(packed), QTYPES[name], torch.float32).numpy()
    expected = oracle_decoded(packed, name)
    np.testing.assert_array_equal(decoded.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", QUANTIZED)
def test_infinite_and_nan_scales_decode_as_in_gguf_py(name):
    packed = random_bytes(name, 60, 20, finite=False)
    decoded = dequantize(torch.from_numpy(packed), QTYPES[name], torch.float32).numpy()
    expected = oracle_decoded(packed, name)
    assert not np.isfinite(expected).all()
    np.testing.assert_array_equal(decoded, expected)  # NaN in the same places counts as equal


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", QUANTIZED)
def test_narrow_dtypes_are_fp32_rounded_once(name, dtype):
    packed = torch.from_numpy(random_bytes(name, 5, 2, finite=True))
    whole = dequantize(packed, QTYPES[name], torch.float32)
    assert torch.equal(dequantize(packed, QTYPES[name], dtype), whole.to(dtype))


@pytest.mark.parametrize("name", QUANTIZED)
def test_strides_signs_and_offsets_of_the_bytes_do_not_matter(name):
    packed = torch.from_numpy(random_bytes(name, 6, 2, finite=True))
    expected = dequantize(packed, QTYPES[name], torch.float32)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), packed.flatten()])[1:]
    wide = torch.cat([packed, packed], dim=1)[:, : packed.shape[1]]
    for view in (shifted.view(packed.shape), wide, packed.view(torch.int8), packed.t().clone().t()):
        assert torch.equal(dequantize(view, QTYPES[name], torch.float32), expected)


def test_unaligned_memory_decodes():
    """A tensor may start anywhere in a mapped file."""
    packed = random_bytes("Q6_K", 3, 2, finite=True)
    memory = np.frombuffer(bytearray(b"\0" + packed.tobytes()), np.uint8)[1:].reshape(3, -1)
    decoded = dequantize(torch.from_numpy(memory), QTYPES["Q6_K"], torch.float32)
    np.testing.assert_array_equal(decoded.numpy(), oracle_decoded(packed, "Q6_K"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_out_is_filled_and_returned(dtype):
    packed = torch.from_numpy(random_bytes("Q4_K", 4, 2, finite=True))
    out = torch.full((4, 512), torch.nan, dtype=dtype)
    assert dequantize(packed, QTYPES["Q4_K"], dtype, out=out) is out
    assert torch.equal(out, dequantize(packed, QTYPES["Q4_K"], dtype))


def edge_inputs():
    ramp = np.linspace(-1, 1, 512, dtype=np.float32)
    one = np.zeros(512, np.float32)
    one[300] = -3
    return {
        "zeros": np.zeros(512, np.float32),
        "negative_zeros": np.full(512, -0.0, np.float32),
        "one_nonzero": one,
        "constant": np.full(512, 0.37, np.float32),
        "negative_constant": np.full(512, -0.37, np.float32),
        "denormals": ramp * np.float32(1e-39),
        "1e-30": ramp * np.float32(1e-30),
        "3e38": ramp * np.float32(3e38),
    }


@pytest.mark.parametrize("edge", edge_inputs())
@pytest.mark.parametrize("name", QTYPES)
def test_edge_inputs_quantize_without_warnings(name, edge):
    """Warnings are errors here; representable magnitudes must also survive the round trip."""
    weights = np.stack([edge_inputs()[edge]] * 2)
    packed = quantize(weights, QTYPES[name])
    assert packed.shape == (2, QTYPES[name].row_bytes(512))
    decoded = dequantize(torch.from_numpy(packed), QTYPES[name], torch.float32).numpy()
    np.testing.assert_array_equal(packed[0], packed[1])
    if edge in ("zeros", "negative_zeros", "one_nonzero", "constant", "negative_constant"):
        # one value per qblock costs a rounding of its scales: float16, then 6 or 8 bits
        smallest = 3 / 113 if name.startswith("IQ4") else 0  # IQ4 has no level at 0
        np.testing.assert_allclose(decoded, weights, rtol=0.06, atol=0.002 + smallest)


@pytest.mark.parametrize("edge", ["zeros", "negative_zeros", "one_nonzero", "constant"])
@pytest.mark.parametrize("name", ORACLE_QUANTIZES)
def test_edge_inputs_equal_gguf_py(name, edge):
    weights = edge_inputs()[edge][None]
    if edge == "negative_zeros" and name in ("Q4_0", "Q5_0"):
        weights = weights + 0.0  # see the test of the scale of zeros
    expected = gguf.quants.quantize(weights, oracle_type(name))
    np.testing.assert_array_equal(quantize(weights, QTYPES[name]), expected)


@pytest.mark.parametrize("name", GAUSSIAN_ERROR)
def test_error_of_gaussian_weights(name):
    weights = np.random.default_rng(2).standard_normal((8, 1024)).astype(np.float32)
    packed = torch.from_numpy(quantize(weights, QTYPES[name]))
    error = dequantize(packed, QTYPES[name], torch.float32).numpy() - weights
    relative = np.sqrt((error**2).mean() / (weights**2).mean())
    assert relative == pytest.approx(GAUSSIAN_ERROR[name], rel=0.05)


@pytest.mark.parametrize("name", QTYPES)
def test_strides_of_the_weights_do_not_matter(name):
    weights = np.random.default_rng(3).standard_normal((512, 4)).astype(np.float32)
    expected = quantize(np.ascontiguousarray(weights.T), QTYPES[name])
    np.testing.assert_array_equal(quantize(weights.T, QTYPES[name]), expected)


@pytest.mark.parametrize("name", QTYPES)
def test_no_rows_give_no_bytes(name):
    packed = quantize(np.empty((0, 256), np.float32), QTYPES[name])
    assert packed.shape == (0, QTYPES[name].row_bytes(256))
    assert dequantize(torch.from_numpy(packed), QTYPES[name], torch.bfloat16).shape == (0, 256)


def test_result_never_shares_memory_with_the_weights():
    weights = np.ones((2, 8), np.float32)
    assert not np.shares_memory(quantize(weights, QTYPES["F32"]), weights)


@pytest.mark.parametrize("case", BF16_EDGES)
def test_bf16_rounding(case):
    bits, expected = BF16_EDGES[case]
    weights = np.array([[bits]], np.uint32).view(np.float32)
    assert quantize(weights, QTYPES["BF16"]).view(np.uint16)[0, 0] == expected


@pytest.mark.parametrize("case", F16_EDGES)
def test_f16_rounding(case):
    value, expected = F16_EDGES[case]
    packed = quantize(np.array([[value]], np.float32), QTYPES["F16"])
    assert packed.view(np.float16)[0, 0] == expected


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_nan_and_infinity_survive_as_floats(name):
    weights = np.array([[np.nan, np.inf, -np.inf, 1.0]], np.float32)
    packed = torch.from_numpy(quantize(weights, QTYPES[name]))
    decoded = dequantize(packed, QTYPES[name], torch.float32).numpy()
    np.testing.assert_array_equal(decoded, weights)


def test_f32_bytes_are_the_weights():
    weights = np.random.default_rng(4).standard_normal((3, 5)).astype(np.float32)
    assert quantize(weights, QTYPES["F32"]).tobytes() == weights.tobytes()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.zeros((2, 256)), r"float32 weights \[N, K\]; got float64 \[2, 256\]"),
        (np.zeros(256, np.float32), r"got float32 \[256\]"),
        (np.zeros((2, 96), np.float32), "Q4_K stores 256 weights together; a row of 96"),
    ],
    ids=["dtype", "dimensions", "row"],
)
def test_quantize_names_what_is_wrong(weights, message):
    with pytest.raises(ValueError, match=message):
        quantize(weights, QTYPES["Q4_K"])


@pytest.mark.parametrize(
    ("packed", "dtype", "message"),
    [
        (torch.zeros(2, 144), torch.float32, r"needs uint8 bytes .* got torch.float32 \[2, 144\]"),
        (torch.zeros(144, dtype=torch.uint8), torch.float32, r"got torch.uint8 \[144\]"),
        (torch.zeros(2, 145, dtype=torch.uint8), torch.float32, "144 bytes; a row of 145 bytes"),
        (torch.zeros(2, 144, dtype=torch.uint8), torch.float64, "not torch.float64"),
    ],
    ids=["dtype", "dimensions", "row", "decoded_dtype"],
)
def test_dequantize_names_what_is_wrong(packed, dtype, message):
    with pytest.raises(ValueError, match=message):
        dequantize(packed, QTYPES["Q4_K"], dtype)


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(2, 255),
        torch.empty(2, 256, dtype=torch.float16),
        torch.empty(256, 2).t(),
    ],
    ids=["shape", "dtype", "strides"],
)
def test_dequantize_refuses_a_wrong_out(out):
    packed = torch.zeros(2, 144, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"out must be contiguous torch.float32 \[2, 256\]"):
        dequantize(packed, QTYPES["Q4_K"], torch.float32, out=out)
