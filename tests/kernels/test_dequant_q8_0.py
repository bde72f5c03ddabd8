import subprocess
import sys

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from zquant_kernels import runtime
from zquant_kernels.dequant_q8_0 import QBLOCK_BYTES, TILE, dequant_q8_0, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
numpy_warns = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # inf times 0
needs_launch = pytest.mark.skipif(
    bool(runtime.why_not(DEVICE)),
    reason=f"{runtime.why_not(DEVICE)}; run with TRITON_INTERPRET=1",
)
# the interpreter truncates to bfloat16 where a GPU rounds
EXACT = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
SHAPES = [(1, 1), (1, TILE), (3, 1), (5, 7), (2, TILE + 1), (7, 37)]  # rows, qblocks per row


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random_qblocks(rows: int, qblocks: int, *, finite: bool) -> torch.Tensor:
    """Random bytes; with `finite` no scale is inf or NaN."""
    rng = np.random.default_rng(rows * 1000 + qblocks)
    packed = rng.integers(0, 256, (rows, qblocks, QBLOCK_BYTES), dtype=np.uint8)
    if finite:
        packed[:, :, 1] &= 0xBF  # clears the top bit of the exponent
    return torch.from_numpy(packed.reshape(rows, -1))


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_fresh_memory_is_nan():
    assert torch.empty(64, device=DEVICE).isnan().all()


@needs_launch
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_kernel_equals_reference_bit_for_bit(shape, dtype):
    packed = random_qblocks(*shape, finite=True).to(DEVICE)
    out = dequant_q8_0(packed, dtype)
    assert not out.isnan().any()
    assert_same_bits(out, reference(packed, dtype))


@needs_launch
@numpy_warns
def test_kernel_equals_reference_on_scales_that_are_inf_or_nan():
    packed = random_qblocks(4, 50, finite=False).to(DEVICE)
    out = dequant_q8_0(packed, torch.float32)
    assert out.isnan().any()
    assert_same_bits(out, reference(packed, torch.float32))


@needs_launch
def test_kernel_stores_bfloat16_within_one_step():
    packed = random_qblocks(5, 7, finite=True).to(DEVICE)
    out = dequant_q8_0(packed, torch.bfloat16).float()
    # one step of bfloat16's 8 bits: truncation in the interpreter, nothing on a GPU
    torch.testing.assert_close(out, reference(packed, torch.float32), rtol=2**-7, atol=0)


@pytest.mark.parametrize("finite", [True, False], ids=["finite", "any-bytes"])
@numpy_warns
def test_reference_equals_gguf_py(finite):
    packed = random_qblocks(6, 9, finite=finite)
    oracle = quants.dequantize(packed.numpy(), GGMLQuantizationType.Q8_0)
    assert_same_bits(reference(packed, torch.float32), torch.from_numpy(oracle))


def test_no_rows_give_no_rows():
    assert dequant_q8_0(torch.empty(0, 68, dtype=torch.uint8), torch.float16).shape == (0, 64)


@pytest.mark.parametrize(
    ("packed", "dtype", "match"),
    [
        (torch.zeros(2, 33, dtype=torch.uint8), torch.float32, r"\[N, 34 \* n\].*\[2, 33\]"),
        (torch.zeros(68, dtype=torch.uint8), torch.float32, r"got torch.uint8 \[68\]"),
        (torch.zeros(2, 34, dtype=torch.int8), torch.float32, "got torch.int8"),
        (torch.zeros(34, 34, dtype=torch.uint8).T, torch.float32, "contiguous"),
        (torch.zeros(69, dtype=torch.uint8)[1:].view(2, 34), torch.float32, "even address"),
        (torch.zeros(2, 34, dtype=torch.uint8), torch.float64, "not torch.float64"),
    ],
    ids=["width", "rank", "int8", "strides", "address", "float64"],
)
def test_wrong_arguments_are_named(packed, dtype, match):
    with pytest.raises(ValueError, match=match):
        dequant_q8_0(packed, dtype)


def test_without_triton_the_kernels_import_and_the_reference_answers():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from zquant_kernels import runtime\n"
        "from zquant_kernels.dequant_q8_0 import dequant_q8_0\n"
        "out = dequant_q8_0(torch.ones(3, 34, dtype=torch.uint8), torch.float32)\n"
        "print(tuple(out.shape), runtime.AVAILABLE, runtime.why_not(torch.device('cuda')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.startswith("(3, 32) False Triton cannot be imported")


@pytest.mark.skipif(bool(runtime.REASON) or runtime.INTERPRETED, reason="needs compiling Triton")
def test_kernels_say_that_they_need_a_gpu():
    assert "need a CUDA device; this is 'cpu'" in runtime.why_not(torch.device("cpu"))
