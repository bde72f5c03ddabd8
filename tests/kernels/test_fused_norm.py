"""Norm, modulation and quantization in one pass: the formula, then the kernel."""

import pytest
import torch
from zquant_kernels import quantize_tokens
from zquant_kernels.fused_norm import fused_norm, reference

from tests.kernels.kernel_testing import DEVICE, guarded, needs_launch
from tests.kernels.test_quantize_tokens import tokens

EPS = 1e-5
# an integer may come out next to its neighbour where the sum of squares, added in another order,
# moves a value across a half: one in a thousand at most
NEIGHBOURS = 1e-3


def vectors(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(k)
    return tuple(1 + 0.3 * torch.randn(k, generator=generator) for _ in range(2))


def assert_quantized_alike(q, scale, expected_q, expected_scale) -> None:
    # a dozen roundings of 2**-24, mostly those of the inverse root and of `exp`
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=1e-36)
    off = (q.int() - expected_q.int()).abs()
    assert off.max() <= 1
    assert (off > 0).sum() <= max(1, NEIGHBOURS * off.numel())


@pytest.mark.parametrize("factor", [1.0, 2.0**-5])
@pytest.mark.parametrize("modulated", [True, False])
def test_reference_is_its_formula(modulated, factor):
    x, (weight, modulation) = tokens(7, 96), vectors(96)
    y = x.double() / (x.double().square().mean(1, keepdim=True) + EPS).sqrt() * weight * factor
    if modulated:
        y *= modulation
    out, scale = reference(
        x, weight, modulation if modulated else None, EPS, torch.float32, factor=factor
    )
    torch.testing.assert_close(out.double(), y, rtol=3e-6, atol=1e-9)
    assert scale is None
    q, scale = reference(
        x, weight, modulation if modulated else None, EPS, torch.int8, factor=factor
    )
    assert_quantized_alike(q, scale, *quantize_tokens.reference(y.float()))


@needs_launch
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (33, 77), (3, 3840)])
def test_kernel_equals_reference(m, k, dtype, modulated):
    x, weight, modulation = (guarded(t.to(DEVICE)) for t in (tokens(m, k), *vectors(k)))
    args = (x.tensor, weight.tensor, modulation.tensor if modulated else None, EPS, dtype)
    out, scale = fused_norm(*args, factor=0.5)
    expected, _ = reference(*args, factor=0.5)
    assert scale is None
    # one step of the dtype, which the interpreter cuts off bfloat16
    step = {torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(out, expected, rtol=step, atol=1e-7)
    for buffer in (x, weight, modulation):
        buffer.check()


@needs_launch
@pytest.mark.parametrize(
    ("m", "k", "group"), [(1, 1, 0), (33, 77, 0), (5, 192, 64), (3, 3840, 256)]
)
def test_quantizing_kernel_equals_reference(m, k, group):
    x, weight, modulation = (guarded(t.to(DEVICE)) for t in (tokens(m, k), *vectors(k)))
    args = (x.tensor, weight.tensor, modulation.tensor, EPS, torch.int8)
    out, scale = fused_norm(*args, group=group)
    assert_quantized_alike(out, scale, *reference(*args, group=group))
    for buffer in (x, weight, modulation):
        buffer.check()


@needs_launch
def test_factor_and_absent_modulation_change_no_bit():
    x, (weight, _) = tokens(9, 100).to(DEVICE), (v.to(DEVICE) for v in vectors(100))
    plain, _ = fused_norm(x, weight, torch.ones(100, device=DEVICE), EPS, torch.float32)
    scaled, _ = fused_norm(x, weight, None, EPS, torch.float32, factor=2.0**-5)
    ordinary = [0, 1, 2, 3, 4, 5, 7, 8]  # a subnormal times a power of two is rounded
    assert torch.equal(scaled[ordinary], plain[ordinary] * 2.0**-5)


def test_no_tokens_give_no_tokens():
    out, scale = fused_norm(torch.empty(0, 64), torch.ones(64), None, EPS, torch.int8, group=64)
    assert (out.shape, scale.shape) == ((0, 64), (0,))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.zeros(4, 8).half()}, "contiguous float32 .*got torch.float16"),
        ({"x": torch.zeros(8, 4).T}, "strides"),
        ({"weight": torch.ones(9)}, r"weight .*\[8\].*\[9\]"),
        ({"modulation": torch.ones(8).half()}, "modulation .*torch.float16"),
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"group": 8}, "rotates int8 only; got group 8 and torch.float32"),
        ({"group": 3, "dtype": torch.int8}, "got 3"),
    ],
    ids=["dtype", "strides", "weight", "modulation", "output", "float group", "odd group"],
)
def test_wrong_arguments_are_named(change, match):
    args = {"x": torch.zeros(4, 8), "weight": torch.ones(8), "modulation": None}
    args |= {"eps": EPS, "dtype": torch.float32}
    with pytest.raises(ValueError, match=match):
        fused_norm(**(args | change))
