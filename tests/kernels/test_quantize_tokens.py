"""Tokens quantized one scale each: the definition, then the kernel, bit for bit."""

import pytest
import torch
from zquant_kernels import hadamard
from zquant_kernels.quantize_tokens import quantize_tokens, reference

from tests.kernels.kernel_testing import DEVICE, assert_same_bits, guarded, needs_launch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # read exactly everywhere
SHAPES = [  # M, K, group
    (1, 1, 0),
    (1, 100, 0),
    (33, 257, 0),
    (1, 64, 64),
    (33, 192, 64),
    (5, 384, 128),
    (3, 768, 256),
    (2, 48, 16),
]


def tokens(m: int, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of all kinds: from the last, one outlier, zeros, the smallest subnormals, ordinary."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m * 1000 + k))
    x[-1, k // 2] = 20000.0
    if m > 2:
        x[-2] = 0.0
        x[-3] = 2.0**-149 if dtype != torch.float16 else 2.0**-24
    return x.to(DEVICE, dtype)


@needs_launch
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}-group{s[2]}")
def test_kernel_equals_reference_bit_for_bit(shape, dtype):
    m, k, group = shape
    x = tokens(m, k, dtype)
    q, scale = quantize_tokens(guarded(x).tensor, group=group)
    expected = reference(x, group=group)
    assert_same_bits(q, expected[0])
    assert_same_bits(scale, expected[1])


@needs_launch
def test_the_widest_rows_equal_the_reference():
    x = tokens(2, 16384, torch.float32)
    for actual, expected in zip(
        quantize_tokens(x, group=256), reference(x, group=256), strict=True
    ):
        assert_same_bits(actual, expected)


@needs_launch
def test_rows_may_be_apart():
    x = tokens(5, 300, torch.float32)
    wide = guarded(torch.full((5, 311), torch.nan, device=DEVICE)).tensor
    wide[:, 7:307] = x
    q, scale = quantize_tokens(wide[:, 7:307])
    assert_same_bits(q, reference(x)[0])
    assert_same_bits(scale, reference(x)[1])


@needs_launch
def test_input_is_not_modified():
    band = guarded(tokens(3, 192, torch.float32))
    before = band.tensor.clone()
    quantize_tokens(band.tensor, group=64)
    band.check()
    assert_same_bits(band.tensor, before)


def test_ties_round_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.49]], device=DEVICE)
    q, scale = quantize_tokens(x)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 3]]
    assert scale.item() == pytest.approx(1.0)


@pytest.mark.parametrize("group", [0, 64])
def test_error_is_at_most_half_a_step_of_the_rotated_row(group):
    x = tokens(9, 256, torch.float32)
    q, scale = quantize_tokens(x, group=group)
    y = hadamard.reference(x, group) if group else x
    # 0.5001 for 0.5: roundings in float32
    error = (q * scale[:, None] - y).abs().amax(-1)
    assert (error <= y.abs().amax(-1) / 127 * 0.5001 + 1e-30).all()
    ordinary = [0, 1, 2, 3, 4, 5, 8]  # neither zeros nor subnormal
    assert (q[ordinary].int().abs().amax(-1) == 127).all()


def test_a_row_of_zeros_gives_zeros_and_a_finite_scale():
    q, scale = quantize_tokens(torch.zeros(2, 64, device=DEVICE), group=64)
    assert not q.any()
    assert ((scale > 0) & (scale < 1e-30)).all()


def test_rotation_keeps_a_row_with_an_outlier_precise():
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x[:, 3] = 100.0
    q, scale = quantize_tokens(x)
    plain = q * scale[:, None]
    q, scale = quantize_tokens(x, group=256)
    rotated = hadamard.reference(q * scale[:, None], 256)
    ordinary = torch.arange(256) != 3
    assert ((rotated - x)[:, ordinary].norm() * 5) < (plain - x)[:, ordinary].norm()


def test_no_rows_give_no_rows():
    q, scale = quantize_tokens(torch.empty(0, 64, dtype=torch.float16), group=64)
    assert (q.shape, q.dtype, scale.shape) == ((0, 64), torch.int8, (0,))


@pytest.mark.parametrize(
    ("x", "group", "match"),
    [
        (torch.zeros(4), 0, r"\[M, K\].*got torch.float32 \[4\]"),
        (torch.zeros(2, 0), 0, r"got torch.float32 \[2, 0\]"),
        (torch.zeros(2, 4, dtype=torch.float64), 0, "got torch.float64"),
        (torch.zeros(4, 2).T, 0, r"contiguous rows.*strides \(1, 2\)"),
        (torch.zeros(2, 100), 64, "divides K = 100; got 64"),
        (torch.zeros(2, 96), 3, "power of two from 16 to 256.*got 3"),
        (torch.zeros(2, 512), 512, "power of two from 16 to 256.*got 512"),
        (torch.zeros(2, 64), -64, "got -64"),
        (torch.zeros(1, 16385), 0, "at most 16384; got 16385"),
    ],
    ids=["rank", "no-columns", "float64", "strides", "divides", "power", "512", "negative", "wide"],
)
def test_wrong_arguments_are_named(x, group, match):
    with pytest.raises(ValueError, match=match):
        quantize_tokens(x, group=group)
