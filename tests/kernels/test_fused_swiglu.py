"""The gated product: the formula, then the kernels, which read a row in pieces."""

import pytest
import torch
from zquant_kernels import quantize_tokens
from zquant_kernels.fused_swiglu import fused_swiglu, reference

from tests.kernels.kernel_testing import DEVICE, guarded, needs_launch
from tests.kernels.test_fused_norm import assert_quantized_alike


def halves(m: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up, halves of a joint product; zeros and a huge outlier are among them."""
    both = torch.randn(m, 2 * k, generator=torch.Generator().manual_seed(m + k))
    both[0] = 0
    both[-1, k // 2] = 200.0
    both[-1, k + k // 2] = 300.0
    return tuple(both.to(dtype).to(DEVICE).chunk(2, dim=1))


@pytest.mark.parametrize("factors", [(1.0, 1.0), (32.0, 2.0**-4)], ids=["plain", "float16's"])
def test_reference_is_its_formula(factors):
    gate, up = halves(5, 96, torch.float32)
    g = gate.double() * factors[0]
    expected = g * torch.sigmoid(g) * up.double() * factors[1]
    out, scale = reference(gate, up, torch.float32, gate_factor=factors[0], factor=factors[1])
    torch.testing.assert_close(out.double(), expected, rtol=3e-6, atol=1e-6)
    assert scale is None
    q, scale = reference(gate, up, torch.int8, gate_factor=factors[0], factor=factors[1])
    assert_quantized_alike(q, scale, *quantize_tokens.reference(expected.float()))


@needs_launch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (33, 77), (2, 4099)])
def test_kernel_equals_reference(m, k, dtype):
    gate, up = halves(m, k, dtype)
    out = guarded(torch.full((m, k), 7.0, device=DEVICE).to(dtype))
    fused_swiglu(gate, up, dtype, gate_factor=2.0, factor=0.5, out=out.tensor)
    expected, _ = reference(gate, up, torch.float32, gate_factor=2.0, factor=0.5)
    # exp of another library, then one step of the dtype, cut off by the interpreter
    step = {torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(out.tensor.float(), expected, rtol=step, atol=1e-6)
    out.check()


@needs_launch
@pytest.mark.parametrize(
    ("m", "k", "group"), [(1, 1, 0), (33, 77, 0), (5, 192, 64), (3, 2560, 256), (2, 10240, 256)]
)
def test_quantizing_kernel_equals_reference(m, k, group):
    gate, up = halves(m, k, torch.float16)
    out = guarded(torch.full((m, k), 99, dtype=torch.int8, device=DEVICE))
    q, scale = fused_swiglu(gate, up, torch.int8, group=group, out=out.tensor)
    assert q is out.tensor
    assert_quantized_alike(q, scale, *reference(gate, up, torch.int8, group=group))
    out.check()


@needs_launch
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_gates_far_below_zero_give_zeros_not_nans(dtype):
    gate = torch.tensor([[-60000.0, -200.0, -89.0, 1.0]], device=DEVICE)
    out, _ = fused_swiglu(gate, torch.full_like(gate, 60000.0), dtype, gate_factor=32.0)
    assert (out[0, :3] == 0).all()
    assert out[0, 3] > 0


@needs_launch
def test_halves_of_a_joint_product_are_read_where_they_lie():
    gate, up = halves(3, 100, torch.float32)
    assert gate.stride() == (200, 1)
    for dtype in (torch.float32, torch.int8):
        apart = fused_swiglu(gate.contiguous(), up.contiguous(), dtype)[0]
        assert torch.equal(fused_swiglu(gate, up, dtype)[0], apart)


@needs_launch
def test_the_kernel_may_write_the_product_over_a_factor():
    gate, up = (t.contiguous() for t in halves(3, 2100, torch.float16))
    expected, _ = fused_swiglu(gate, up, torch.float16)
    guard = guarded(gate)
    out, _ = fused_swiglu(guard.tensor, up, torch.float16, out=guard.tensor)
    assert torch.equal(out, expected)
    guard.check()


def test_the_product_may_take_the_place_of_a_factor():
    gate, up = (t.contiguous() for t in halves(4, 64, torch.float32))
    expected, _ = fused_swiglu(gate, up, torch.float32)
    out, _ = fused_swiglu(gate, up, torch.float32, out=gate)
    assert out is gate
    assert torch.equal(out, expected)


def test_no_tokens_give_no_tokens():
    out, scale = fused_swiglu(torch.empty(0, 64), torch.empty(0, 64), torch.int8, group=64)
    assert (out.shape, scale.shape) == ((0, 64), (0,))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"up": torch.zeros(4, 9)}, r"alike; got .*\[4, 8\] .*\[4, 9\]"),
        ({"up": torch.zeros(4, 8).half()}, "alike"),
        ({"gate": torch.zeros(8, 4).T}, "contiguous rows; got strides"),
        ({"dtype": torch.float16}, "gives torch.float32 or int8, not torch.float16"),
        ({"group": 8}, "rotates int8 only"),
        ({"group": 16, "dtype": torch.int8}, "got 16"),
        ({"out": torch.zeros(4, 9)}, r"\[4, 9\]"),
    ],
    ids=["shapes", "dtypes", "strides", "output", "float group", "group", "out"],
)
def test_wrong_arguments_are_named(change, match):
    args = {"gate": torch.zeros(4, 8), "up": torch.zeros(4, 8), "dtype": torch.float32}
    with pytest.raises(ValueError, match=match):
        fused_swiglu(**(args | change))
