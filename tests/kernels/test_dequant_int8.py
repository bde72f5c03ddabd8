import numpy as np
import pytest
import torch
import zquant_kernels.dequant_int8
from zquant_kernels import hadamard
from zquant_kernels.dequant_int8 import dequant_int8, reference, row_scales
from zquant_kernels.dequantize import QTYPES
from zquant_kernels.dequantize import reference as decode

from tests.kernels.kernel_testing import DEVICE, assert_same_bits, guarded, needs_launch
from tests.kernels.test_dequantize import HALVES, ordinary_rows

COLUMNS = 768  # three programs
GROUPS = [0, *hadamard.GROUPS]
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16}


def packed_floats(qtype: str, values: torch.Tensor) -> torch.Tensor:
    return values.to(FLOATS[qtype]).view(torch.uint8).to(DEVICE)


def rows_of(qtype: str, n: int, columns: int = COLUMNS) -> torch.Tensor:
    """Rows with any scales; of zeros, of subnormals only, and the last with one huge outlier."""
    if qtype in FLOATS:
        values = torch.randn(n, columns, generator=torch.Generator().manual_seed(n))
        values[0] = 0
        values[1] *= 2.0**-136 if qtype == "BF16" else 2.0**-16
        values[-1, 5] = 3e4
        return packed_floats(qtype, values)
    packed = ordinary_rows(qtype, n, columns // QTYPES[qtype].qblock).numpy()
    qblocks = packed.reshape(n, -1, QTYPES[qtype].qblock_bytes)
    for at in HALVES.get(qtype, [0]):
        units = qblocks[:, :, at : at + 2].view(np.float16)
        units[0], units[1], units[-1] = 0, 2.0**-24, 1e-4
        units[-1, 0] = 300
    return torch.from_numpy(packed).to(DEVICE)


def rotated(packed: torch.Tensor, qtype: str, group: int) -> torch.Tensor:
    weights = decode(packed, qtype, torch.float32)
    return hadamard.reference(weights, group) if group else weights


def expected_scales(packed: torch.Tensor, qtype: str, group: int) -> torch.Tensor:
    return rotated(packed, qtype, group).abs().amax(1).clamp_min(1e-30) * (1 / 127)


@needs_launch
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("qtype", QTYPES)
def test_kernel_equals_reference_bit_for_bit(qtype, group):
    packed = guarded(rows_of(qtype, 19))
    scales = guarded(row_scales(packed.tensor, qtype, group))
    out = guarded(torch.full((19, COLUMNS), 99, dtype=torch.int8, device=DEVICE))
    assert dequant_int8(packed.tensor, qtype, scales.tensor, group, out.tensor) is out.tensor
    assert_same_bits(out.tensor, reference(packed.tensor, qtype, scales.tensor, group))
    for buffer in (packed, scales, out):
        buffer.check()


@needs_launch
@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(1, 64, 64), (33, 320, 64), (8, 32, 0), (17, 352, 0)]
)
@pytest.mark.parametrize("qtype", ["Q8_0", "Q4_0", "BF16"])
def test_kernel_stays_within_rows_that_are_no_multiple_of_its_tile(qtype, rows, columns, group):
    packed = guarded(ordinary_rows(qtype, rows, columns // QTYPES[qtype].qblock).to(DEVICE))
    scales = torch.full((rows,), 0.01, device=DEVICE)
    out = guarded(torch.full((rows, columns), 99, dtype=torch.int8, device=DEVICE))
    if qtype == "BF16":
        packed = guarded(packed_floats(qtype, torch.randn(rows, columns)))
    dequant_int8(packed.tensor, qtype, scales, group, out.tensor)
    assert_same_bits(out.tensor, reference(packed.tensor, qtype, scales, group))
    packed.check()
    out.check()


@needs_launch
@pytest.mark.parametrize("qtype", QTYPES)
def test_kernel_reads_bytes_at_any_even_address(qtype):
    rows = rows_of(qtype, 5, 256)
    shifted = torch.cat((torch.zeros(2, dtype=torch.uint8, device=DEVICE), rows.flatten()))[2:]
    scales = row_scales(shifted.view(rows.shape), qtype, 256)
    assert_same_bits(scales, expected_scales(rows, qtype, 256))
    out = dequant_int8(shifted.view(rows.shape), qtype, scales, 256)
    assert_same_bits(out, reference(rows, qtype, scales, 256))


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_scales_are_the_largest_rotated_weights_over_127(qtype, group):
    packed = rows_of(qtype, 6)
    assert_same_bits(row_scales(packed, qtype, group), expected_scales(packed, qtype, group))


def test_rows_that_are_not_expanded_together_are_all_there(monkeypatch):
    monkeypatch.setattr(zquant_kernels.dequant_int8, "SLAB_WEIGHTS", 1)
    packed = rows_of("Q4_K", 35, 256)
    scales = row_scales(packed, "Q4_K", 256)
    assert_same_bits(scales, expected_scales(packed, "Q4_K", 256))
    levels = rotated(packed, "Q4_K", 256) * (torch.ones_like(scales) / scales)[:, None]
    assert_same_bits(reference(packed, "Q4_K", scales, 256), levels.round().to(torch.int8))


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_rows_times_scale_are_the_rotated_weights(qtype, group):
    packed = rows_of(qtype, 6)
    scales = row_scales(packed, qtype, group)
    restored = dequant_int8(packed, qtype, scales, group).float() * scales[:, None]
    # half a level, and the roundings of scale and reciprocal at 127 levels
    error = (restored - rotated(packed, qtype, group)).abs()
    assert (error <= scales[:, None] * 0.50002).all()


def test_a_row_of_zeros_and_a_row_of_subnormals_become_zeros():
    values = torch.zeros(2, 256)
    values[1] = 1e-40
    packed = packed_floats("BF16", values)
    scales = row_scales(packed, "BF16", 256)
    assert_same_bits(scales, torch.full((2,), 1e-30, device=DEVICE) * (1 / 127))
    assert (dequant_int8(packed, "BF16", scales, 256) == 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_what_scales_make_too_large_is_limited(sign):
    packed = packed_floats("F16", torch.full((1, 64), sign * 6e4))
    for scale in (1e-3, 1e-30):
        out = dequant_int8(packed, "F16", torch.full((1,), scale, device=DEVICE), 0)
        assert (out == sign * 127).all()


def test_ties_round_to_even():
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 127.5, -127.5])
    packed = packed_floats("F16", values.repeat(8)[None])
    out = dequant_int8(packed, "F16", torch.ones(1, device=DEVICE), 0)
    assert out[0, :10].tolist() == [0, 2, 2, 0, -2, -2, 126, -126, 127, -127]


@pytest.mark.parametrize("group", GROUPS)
def test_product_with_rotated_activations_is_near_the_plain_product(group):
    gguf = pytest.importorskip("gguf")
    x, weights = torch.randn(2, 33, COLUMNS).unbind()
    stored = gguf.quants.quantize(weights.numpy(), gguf.GGMLQuantizationType.Q8_0)
    packed, x = torch.from_numpy(stored).to(DEVICE), x.to(DEVICE)
    scales = row_scales(packed, "Q8_0", group)
    rows = dequant_int8(packed, "Q8_0", scales, group).float() * scales[:, None]
    out = (hadamard.reference(x, group) if group else x) @ rows.T
    expected = x @ decode(packed, "Q8_0", torch.float32).T
    # a weight is rounded to 1 / 127 of the largest of some hundred, 3 to 4 sigma
    assert (out - expected).norm() / expected.norm() < 0.012


def test_a_rotation_spreads_an_outlier():
    values = torch.randn(4, 256)
    values[:, 7] = 1000
    packed = packed_floats("F16", values)
    assert (row_scales(packed, "F16", 256) < row_scales(packed, "F16", 0) / 10).all()


def test_no_rows_give_no_rows():
    packed = torch.empty(0, 68, dtype=torch.uint8)
    scales = row_scales(packed, "Q8_0", 64)
    assert scales.shape == (0,)
    assert dequant_int8(packed, "Q8_0", scales, 64).shape == (0, 64)


@pytest.mark.parametrize(
    ("scales", "group", "match"),
    [
        (torch.ones(3), 0, r"scales float32 \[2\], contiguous; got torch.float32 \[3\]"),
        (torch.ones(2).double(), 0, "got torch.float64"),
        (torch.ones(4)[::2], 0, "contiguous"),
        (torch.ones(2, device="meta"), 0, "scales on cpu, not meta"),
        (torch.ones(2), 32, "rotates groups of 256, 64 that divide 64; not 32"),
        (torch.ones(2), 256, "not 256"),
    ],
    ids=["shape", "dtype", "strides", "device", "unknown group", "group too wide"],
)
def test_wrong_arguments_are_named(scales, group, match):
    with pytest.raises(ValueError, match=match):
        dequant_int8(torch.zeros(2, 68, dtype=torch.uint8), "Q8_0", scales, group)


@pytest.mark.parametrize("expand", [row_scales, lambda *a: dequant_int8(*a[:2], torch.ones(2), 0)])
def test_floats_need_rows_of_whole_chunks(expand):
    with pytest.raises(ValueError, match="needs K a multiple of 16 for BF16; got 24"):
        expand(torch.zeros(2, 48, dtype=torch.uint8), "BF16", 0)


def test_a_wrong_buffer_is_named():
    packed, scales = torch.zeros(2, 34, dtype=torch.uint8), torch.ones(2)
    with pytest.raises(
        ValueError, match=r"out contiguous torch.int8 \[2, 32\]; got torch.int8 \[2, 31\]"
    ):
        dequant_int8(packed, "Q8_0", scales, 0, torch.empty(2, 31, dtype=torch.int8))
