"""A branch closed and the next opened in one pass: the formula, then the kernels."""

import pytest
import torch
from zquant_kernels.fused_residual import (
    Norms,
    fused_residual,
    reference,
    residual,
    residual_reference,
)

from tests.kernels.kernel_testing import DEVICE, guarded, needs_launch
from tests.kernels.test_fused_norm import assert_quantized_alike
from tests.kernels.test_quantize_tokens import tokens

EPS, H_EPS = 1e-5, 1e-5 * 2.0**-18


def case(m: int, k: int, h_dtype: torch.dtype, *, gated: bool):
    """x, h and both norms, on the device."""
    generator = torch.Generator().manual_seed(m + k)
    x = torch.randn(m, k, generator=generator) * 3
    vectors = [
        guarded((1 + 0.3 * torch.randn(k, generator=generator)).to(DEVICE)).tensor for _ in range(4)
    ]
    norms = Norms(
        h_weight=vectors[0],
        gate=vectors[1] if gated else None,
        weight=vectors[2],
        modulation=vectors[3] if gated else None,
        h_eps=H_EPS,
        eps=EPS,
        factor=0.5,
    )
    return x.to(DEVICE), tokens(m, k, h_dtype).to(DEVICE), norms


def by_definition(x, h, n):
    """r and y, float64."""
    h, x = h.double(), x.double()
    h = h / (h.square().mean(1, keepdim=True) + n.h_eps).sqrt() * n.h_weight
    r = x + (h if n.gate is None else h * n.gate)
    y = r / (r.square().mean(1, keepdim=True) + n.eps).sqrt() * n.weight * n.factor
    return r, y if n.modulation is None else y * n.modulation


@pytest.mark.parametrize("gated", [True, False])
def test_references_are_the_formula(gated):
    x, h, norms = case(7, 96, torch.float32, gated=gated)
    expected_r, expected_y = by_definition(x, h, norms)
    kept = x.clone()
    r, y, scale = reference(x, h, norms, torch.float32)
    torch.testing.assert_close(r.double(), expected_r, rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(y.double(), expected_y, rtol=5e-6, atol=1e-6)
    assert scale is None
    alone = residual_reference(x, h, norms.h_weight, norms.gate, H_EPS)
    assert torch.equal(alone, r)
    assert torch.equal(x, kept)


@needs_launch
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (33, 77), (3, 3840)])
def test_kernel_equals_reference(m, k, dtype, gated):
    x, h, norms = case(m, k, dtype, gated=gated)
    guards = [guarded(x), guarded(h)]
    expected_r, expected_y, _ = reference(x, h, norms, dtype)
    r, y, scale = fused_residual(guards[0].tensor, guards[1].tensor, norms, dtype)
    assert scale is None
    # sums of squares in another order, then one step of the dtype, cut off by the interpreter
    torch.testing.assert_close(r, expected_r, rtol=4e-6, atol=4e-6)
    step = {torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(y, expected_y, rtol=step, atol=4e-6)
    assert torch.equal(guards[0].tensor, x)
    for guard in guards:
        guard.check()


@needs_launch
@pytest.mark.parametrize(
    ("m", "k", "group"), [(1, 1, 0), (33, 77, 0), (5, 192, 64), (3, 3840, 256)]
)
def test_quantizing_kernel_equals_reference(m, k, group):
    x, h, norms = case(m, k, torch.float16, gated=True)
    expected_r, expected_y, expected_scale = reference(x, h, norms, torch.int8, group=group)
    r, y, scale = fused_residual(x, h, norms, torch.int8, group=group)
    torch.testing.assert_close(r, expected_r, rtol=4e-6, atol=4e-6)
    assert_quantized_alike(y, scale, expected_y, expected_scale)


@needs_launch
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (33, 77), (3, 3840)])
def test_kernel_that_ends_a_block_equals_reference_in_place(m, k, gated):
    x, h, norms = case(m, k, torch.float16, gated=gated)
    expected = residual_reference(x, h, norms.h_weight, norms.gate, H_EPS)
    guard = guarded(x)
    out = residual(guard.tensor, h, norms.h_weight, norms.gate, H_EPS, out=guard.tensor)
    assert out is guard.tensor
    torch.testing.assert_close(out, expected, rtol=4e-6, atol=4e-6)
    torch.testing.assert_close(
        residual(x, h, norms.h_weight, norms.gate, H_EPS), expected, rtol=4e-6, atol=4e-6
    )
    guard.check()


def test_the_sum_may_take_the_place_of_its_input():
    x, h, norms = case(5, 64, torch.float32, gated=True)
    expected = fused_residual(x, h, norms, torch.float32)
    taken = x.clone()
    r, y, _ = fused_residual(taken, h, norms, torch.float32, out=taken)
    assert r is taken
    assert torch.equal(r, expected[0])
    assert torch.equal(y, expected[1])


@needs_launch
def test_a_branch_and_its_eps_may_be_scaled_by_a_power_of_two():
    x, h, norms = case(5, 192, torch.float32, gated=True)
    args = (norms.h_weight, norms.gate)
    expected = residual(x, h, *args, 1e-3)
    assert torch.equal(residual(x, h * 2.0**-9, *args, 1e-3 * 2.0**-18), expected)


@needs_launch
def test_the_kernel_may_write_the_sum_over_its_input():
    x, h, norms = case(5, 300, torch.float16, gated=True)
    expected = fused_residual(x, h, norms, torch.int8)
    guard = guarded(x)
    r, y, scale = fused_residual(guard.tensor, h, norms, torch.int8, out=guard.tensor)
    assert r is guard.tensor
    for actual, wanted in zip((r, y, scale), expected, strict=True):
        assert torch.equal(actual, wanted)
    guard.check()


def test_no_tokens_give_no_tokens():
    x, h, norms = case(3, 64, torch.float32, gated=True)
    r, y, scale = fused_residual(x[:0], h[:0], norms, torch.int8, group=64)
    assert (r.shape, y.shape, scale.shape) == ((0, 64), (0, 64), (0,))


@pytest.mark.parametrize(
    ("x", "h", "dtype", "match"),
    [
        (torch.zeros(4, 8).half(), torch.zeros(4, 8), torch.float32, "x float32 .*torch.float16"),
        (torch.zeros(4, 8), torch.zeros(4, 9), torch.float32, r"h \[4, 8\] .*\[4, 9\]"),
        (torch.zeros(4, 8), torch.zeros(4, 8).double(), torch.float32, "torch.float64"),
        (torch.zeros(8, 4).T, torch.zeros(4, 8), torch.float32, "contiguous"),
        (torch.zeros(4, 8), torch.zeros(4, 8), torch.float64, "not torch.float64"),
    ],
    ids=["x dtype", "h shape", "h dtype", "strides", "output"],
)
def test_wrong_arguments_are_named(x, h, dtype, match):
    one = torch.ones(8)
    norms = Norms(h_weight=one, gate=one, weight=one, modulation=one, h_eps=EPS, eps=EPS)
    with pytest.raises(ValueError, match=match):
        fused_residual(x, h, norms, dtype)
