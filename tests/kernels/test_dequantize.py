import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from zquant_kernels import runtime
from zquant_kernels.dequantize import QTYPES, dequantize, reference

from tests.kernels.kernel_testing import DEVICE, EXACT, assert_same_bits, guarded, needs_launch

QUANTIZED = [name for name in QTYPES if name not in ("BF16", "F16")]
HALVES = {  # where the float16 fields of a qblock are, unless there is one at its start
    "Q6_K": [208],
    "Q5_K": [0, 2],
    "Q4_K": [0, 2],
    "Q3_K": [108],
    "Q2_K": [80, 82],
    "Q5_1": [0, 2],
    "Q4_1": [0, 2],
}
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "ggml-golden.npz")
numpy_warns = pytest.mark.filterwarnings(  # inf times 0, and scales past the largest float16
    "ignore:invalid value:RuntimeWarning", "ignore:overflow encountered:RuntimeWarning"
)
SHAPES = [(1, 1), (3, 1), (5, 7), (9, 33)]  # rows, qblocks per row; the last is several programs


def random_rows(qtype: str, rows: int, qblocks: int) -> torch.Tensor:
    """Random bytes, so scales that are inf, NaN, subnormal or zero are among them."""
    rng = np.random.default_rng(rows * 1000 + qblocks)
    n_bytes = qblocks * QTYPES[qtype].qblock_bytes
    packed = rng.integers(0, 256, (rows, n_bytes), dtype=np.uint8)
    packed[0] = 0  # zero scales
    return torch.from_numpy(packed)


def ordinary_rows(qtype: str, rows: int, qblocks: int) -> torch.Tensor:
    """Random bytes with no scale that is inf or NaN: their exponent's top bit is cleared."""
    packed = random_rows(qtype, rows, qblocks).numpy().reshape(rows, qblocks, -1)
    for at in HALVES.get(qtype, [0]):
        packed[:, :, at + 1] &= 0xBF
    return torch.from_numpy(packed.reshape(rows, -1))


@pytest.mark.parametrize("qtype", QTYPES)
def test_qblocks_have_the_sizes_of_gguf_py(qtype):
    gguf = pytest.importorskip("gguf")
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[qtype]]
    assert (QTYPES[qtype].qblock, QTYPES[qtype].qblock_bytes) == sizes


def test_fresh_memory_is_nan():
    assert torch.empty(64, device=DEVICE).isnan().all()


@needs_launch
@numpy_warns
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("qtype", QUANTIZED)
def test_kernel_equals_reference_bit_for_bit_on_any_bytes(qtype, shape, dtype):
    packed = guarded(random_rows(qtype, *shape).to(DEVICE))
    expected = reference(packed.tensor, qtype, dtype)
    out = guarded(torch.full_like(expected, 7))
    assert dequantize(packed.tensor, qtype, dtype, out.tensor) is out.tensor
    assert_same_bits(out.tensor, expected)
    packed.check()
    out.check()


@needs_launch
@pytest.mark.parametrize("qtype", QUANTIZED)
def test_kernel_stores_bfloat16_within_one_step(qtype):
    packed = ordinary_rows(qtype, 5, 7).to(DEVICE)
    out = dequantize(packed, qtype, torch.bfloat16).float()
    # one step of bfloat16's 8 bits: truncation in the interpreter, nothing on a GPU
    expected = reference(packed, qtype, torch.float32)
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=0)


@needs_launch
@pytest.mark.parametrize("qtype", QUANTIZED)
def test_kernel_reads_bytes_at_any_even_address(qtype):
    rows = ordinary_rows(qtype, 9, 33)
    shifted = torch.cat((torch.zeros(2, dtype=torch.uint8), rows.flatten())).to(DEVICE)[2:]
    out = dequantize(shifted.view(rows.shape), qtype, torch.float32)
    assert_same_bits(out.cpu(), reference(rows, qtype, torch.float32))


@pytest.mark.parametrize("rows", [random_rows, ordinary_rows], ids=["any bytes", "finite"])
@numpy_warns
@pytest.mark.parametrize("qtype", QUANTIZED)
def test_reference_equals_gguf_py(qtype, rows):
    gguf = pytest.importorskip("gguf")
    packed = rows(qtype, 6, 9)
    oracle = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[qtype])
    expected = torch.from_numpy(oracle)
    assert_same_bits(reference(packed, qtype, torch.float32), expected)
    assert expected.isfinite().all() == (rows is ordinary_rows)


@pytest.mark.parametrize("name", ["edge", "gauss"])
@pytest.mark.parametrize("qtype", QUANTIZED)
def test_reference_equals_ggml_in_the_sign_of_zeros_too(qtype, name):
    packed = torch.from_numpy(GOLDEN[f"bytes/{qtype}/{name}"])
    expected = GOLDEN[f"decoded/{qtype}/{name}"]
    decoded = reference(packed, qtype, torch.float32).numpy()
    np.testing.assert_array_equal(decoded.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("qtype", ["BF16", "F16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_float_rows_are_cast(qtype, dtype):
    values = torch.randn(3, 33).to(torch.bfloat16 if qtype == "BF16" else torch.float16)
    out = dequantize(values.view(torch.uint8), qtype, dtype)
    assert_same_bits(out, values.to(dtype))


def test_no_rows_give_no_rows():
    packed = torch.empty(0, 68, dtype=torch.uint8)
    assert dequantize(packed, "Q8_0", torch.float16).shape == (0, 64)


@pytest.mark.parametrize(
    ("packed", "qtype", "dtype", "match"),
    [
        (torch.zeros(2, 33, dtype=torch.uint8), "Q8_0", torch.float32, r"34 \* n\].*\[2, 33\]"),
        (torch.zeros(68, dtype=torch.uint8), "Q8_0", torch.float32, r"got torch.uint8 \[68\]"),
        (torch.zeros(2, 34, dtype=torch.int8), "Q8_0", torch.float32, "got torch.int8"),
        (torch.zeros(34, 34, dtype=torch.uint8).T, "Q8_0", torch.float32, "contiguous"),
        (torch.zeros(69, dtype=torch.uint8)[1:].view(2, 34), "Q8_0", torch.float32, "even address"),
        (torch.zeros(2, 34, dtype=torch.uint8), "Q8_0", torch.float64, "not torch.float64"),
        (torch.zeros(2, 34, dtype=torch.uint8), "IQ1_S", torch.float32, "Q8_0, .*not 'IQ1_S'"),
    ],
    ids=["width", "rank", "int8", "strides", "address", "float64", "qtype"],
)
def test_wrong_arguments_are_named(packed, qtype, dtype, match):
    with pytest.raises(ValueError, match=match):
        dequantize(packed, qtype, dtype)


@pytest.mark.parametrize(
    "out", [torch.empty(2, 31), torch.empty(2, 32).half(), torch.empty(32, 2).T], ids=str
)
def test_a_wrong_buffer_is_named(out):
    with pytest.raises(ValueError, match=r"needs out contiguous torch.float32 \[2, 32\]"):
        dequantize(torch.zeros(2, 34, dtype=torch.uint8), "Q8_0", torch.float32, out)


def test_a_buffer_on_another_device_is_named():
    out = torch.empty(2, 32, device="meta")
    with pytest.raises(ValueError, match="needs out on cpu, not meta"):
        dequantize(torch.zeros(2, 34, dtype=torch.uint8), "Q8_0", torch.float32, out)


def test_without_triton_the_kernels_import_and_the_reference_answers():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from zquant_kernels import runtime\n"
        "from zquant_kernels.dequantize import dequantize\n"
        "out = dequantize(torch.ones(3, 34, dtype=torch.uint8), 'Q8_0', torch.float32)\n"
        "print(tuple(out.shape), runtime.AVAILABLE, runtime.why_not(torch.device('cuda')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.startswith("(3, 32) False Triton cannot be imported")


@pytest.mark.skipif(bool(runtime.REASON) or runtime.INTERPRETED, reason="needs compiling Triton")
def test_kernels_say_that_they_need_a_gpu():
    assert "need a CUDA device; this is 'cpu'" in runtime.why_not(torch.device("cpu"))
