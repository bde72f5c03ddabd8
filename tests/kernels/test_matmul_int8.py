"""The integer product: exact sums, then the kernel and the epilogue for cards without one."""

import pytest
import torch
from zquant_kernels import matmul_int8 as subject
from zquant_kernels.matmul_int8 import matmul_int8, reference

from tests.kernels.kernel_testing import DEVICE, assert_same_bits, guarded, needs_launch


def case(m: int, n: int, k: int, dtype: torch.dtype = torch.float32):
    """Operands of every value, -128 too, and what may be added."""
    generator = torch.Generator().manual_seed(m + n + k)
    x, weight = (
        torch.randint(-128, 128, (rows, k), dtype=torch.int8, generator=generator).to(DEVICE)
        for rows in (m, n)
    )
    x_scale, w_scale, bias = (
        torch.rand(rows, generator=generator).to(DEVICE) / 100 for rows in (m, n, n)
    )
    x_scale[0], w_scale[0] = 1e-38, 0
    residual = torch.randn(m, n, generator=generator).to(dtype).to(DEVICE)
    return x, x_scale, weight, w_scale, bias, residual


def test_reference_has_exact_sums_where_float32_has_not():
    x = torch.full((2, 16384), -128, dtype=torch.int8)
    weight = x.clone()
    weight[1, 0] = 127
    one = torch.ones(2)
    out = reference(x, one, weight, one, torch.float32)
    exact = 128 * 128 * 16384
    assert out.tolist() == [[exact, torch.tensor(float(exact - 128 * 255)).item()]] * 2


def test_reference_sums_like_integers():
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        # of one sign, so that float32 would lose bits of the sum
        torch.randint(64, 128, (rows, 16384), dtype=torch.int8, generator=generator)
        for rows in (33, 19)
    )
    out = reference(x, torch.ones(33), weight, torch.ones(19), torch.float32)
    assert_same_bits(out, (x.long() @ weight.long().t()).float())


@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 19, 70), (1030, 5, 8), (3, 1030, 1030)], ids=str)
def test_reference_is_its_formula(shape):
    x, x_scale, weight, w_scale, bias, residual = case(*shape)
    expected = (x.double() @ weight.double().t()) * x_scale.double()[:, None] * w_scale.double()
    out = reference(x, x_scale, weight, w_scale, torch.float32)
    torch.testing.assert_close(out.double(), expected, rtol=3e-7, atol=1e-30)
    out = reference(x, x_scale, weight, w_scale, torch.float32, bias=bias, residual=residual)
    torch.testing.assert_close(out.double(), expected + bias + residual, rtol=1e-6, atol=1e-5)


@needs_launch
@pytest.mark.parametrize("added", [False, True], ids=["product", "with bias and residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    # the last has more rows of tiles than share weights
    "shape",
    [(1, 1, 1), (33, 19, 70), (40, 96, 128), (290, 40, 32)],
    ids=str,
)
def test_kernel_equals_reference_bit_for_bit(shape, dtype, added):
    m, n, _ = shape
    x, x_scale, weight, w_scale, bias, residual = case(*shape, dtype)
    more = {"bias": bias, "residual": residual} if added else {}
    expected = reference(x, x_scale, weight, w_scale, dtype, **more)
    buffers = [guarded(t) for t in (x, x_scale, weight, w_scale)]
    out = guarded(torch.full((m, n), 7.0, device=DEVICE).to(dtype))
    matmul_int8(*(b.tensor for b in buffers), dtype, **more, out=out.tensor)
    assert_same_bits(out.tensor, expected)
    for buffer in (*buffers, out):
        buffer.check()


@needs_launch
def test_kernel_stores_bfloat16_within_one_step():
    x, x_scale, weight, w_scale, *_ = case(17, 33, 64)
    out = matmul_int8(x, x_scale, weight, w_scale, torch.bfloat16).float()
    expected = reference(x, x_scale, weight, w_scale, torch.float32)
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-38)


@needs_launch
def test_kernel_writes_into_a_slice_of_a_packed_buffer():
    x, x_scale, weight, w_scale, *_ = case(33, 19, 70)
    packed = torch.full((33, 60), 7.0, device=DEVICE)
    matmul_int8(x, x_scale, weight, w_scale, torch.float32, out=packed[:, 20:39])
    assert_same_bits(packed[:, 20:39], reference(x, x_scale, weight, w_scale, torch.float32))
    assert (packed[:, :20] == 7).all()
    assert (packed[:, 39:] == 7).all()


@needs_launch
@pytest.mark.skipif(DEVICE.type == "cuda", reason="a real card takes its own path")
@pytest.mark.parametrize("m", [1, 16, 17, 40])
def test_path_of_turing_equals_reference_bit_for_bit(m, monkeypatch):
    monkeypatch.setattr(subject, "capability", lambda _: (7, 5))
    monkeypatch.setattr(subject, "CHUNK_M", 24)
    x, x_scale, weight, w_scale, bias, residual = case(m, 24, 64)
    more = {"bias": bias, "residual": residual}
    expected = reference(x, x_scale, weight, w_scale, torch.float32, **more)
    assert_same_bits(matmul_int8(x, x_scale, weight, w_scale, torch.float32, **more), expected)


@pytest.mark.parametrize(
    ("capability", "added", "tiles"),
    [
        ((8, 0), False, subject.WIDE),
        ((8, 0), True, subject.NARROW),
        ((8, 6), False, subject.NARROW),
        ((8, 9), False, subject.NARROW),
        ((9, 0), False, subject.WIDE),
        ((10, 0), False, subject.WIDE),
        ((12, 0), False, subject.NARROW),
        ((12, 1), True, subject.NARROW),
    ],
)
def test_every_capability_has_tiles(capability, added, tiles, monkeypatch):
    monkeypatch.setattr(subject, "capability", lambda _: capability)
    assert subject._tiles(DEVICE, added) == tiles


def test_no_tokens_give_no_tokens():
    x, x_scale, weight, w_scale, *_ = case(4, 8, 16)
    assert matmul_int8(x[:0], x_scale[:0], weight, w_scale, torch.float16).shape == (0, 8)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.zeros(4, 9, dtype=torch.int8)}, r"x \[4, 9\] and weight \[6, 8\]"),
        ({"x": torch.zeros(4, 0, dtype=torch.int8)}, r"x \[4, 0\]"),
        ({"out": torch.ones(1, 6).expand(4, 6)}, "row stride from 6"),
        ({"x": torch.zeros(4, 8)}, "x contiguous torch.int8 .*got torch.float32"),
        ({"x_scale": torch.ones(5)}, r"x_scale .*\[4\]"),
        ({"w_scale": torch.ones(6).half()}, "w_scale .*torch.float16"),
        ({"bias": torch.ones(5)}, "bias"),
        ({"residual": torch.ones(4, 6).half()}, "residual"),
        ({"out": torch.ones(6, 4).T}, "contiguous columns"),
        ({"dtype": torch.float64}, "not torch.float64"),
    ],
    ids=[
        "widths",
        "empty",
        "overlap",
        "x",
        "x_scale",
        "w_scale",
        "bias",
        "residual",
        "out",
        "dtype",
    ],
)
def test_wrong_arguments_are_named(change, match):
    args = {
        "x": torch.zeros(4, 8, dtype=torch.int8),
        "x_scale": torch.ones(4),
        "weight": torch.zeros(6, 8, dtype=torch.int8),
        "w_scale": torch.ones(6),
        "dtype": torch.float32,
    }
    with pytest.raises(ValueError, match=match):
        matmul_int8(**(args | change))
