"""q/k norm and rotation in place against complex multiplication, and the kernel against that."""

import pytest
import torch
from zquant_kernels.fused_qk import fused_qk, reference

from tests.kernels.kernel_testing import DEVICE, guarded, needs_launch

EPS = 1e-5


def case(m: int, length: int, heads: int, head_dim: int, dtype: torch.dtype):
    """qkv, weights and tables; the first token is zeros, the last has an outlier."""
    generator = torch.Generator().manual_seed(m)
    qkv = torch.randn(m, 3, heads, head_dim, generator=generator)
    qkv[0] = 0
    qkv[-1, :, 0, 1] = 3e4
    weights = [1 + 0.1 * torch.randn(head_dim, generator=generator) for _ in range(2)]
    angles = torch.rand(length, head_dim // 2, generator=generator) * 6
    return qkv.to(dtype), *weights, angles.cos(), angles.sin()


def by_complex_numbers(qkv, q_weight, k_weight, cos, sin):
    """float64, by the definition."""
    x = qkv.double()[:, :2]
    weight = torch.stack((q_weight, k_weight)).double()[:, None]
    x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    turn = torch.complex(cos, sin).to(torch.complex128).repeat(len(qkv) // len(cos), 1)
    rotated = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn[:, None, None]
    return torch.view_as_real(rotated).flatten(-2)


@pytest.mark.parametrize("shape", [(6, 3, 2, 64), (5, 5, 3, 48), (1, 1, 1, 2)], ids=str)
def test_reference_is_the_definition(shape):
    args = case(*shape, torch.float32)
    expected, kept = by_complex_numbers(*args), args[0].clone()
    reference(*args, EPS)
    torch.testing.assert_close(args[0][:, :2].double(), expected, rtol=2e-6, atol=2e-6)
    assert torch.equal(args[0][:, 2], kept[:, 2])


@needs_launch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 30, 128), (33, 33, 3, 64), (6, 2, 3, 48), (5, 5, 1, 2)], ids=str
)
def test_kernel_equals_reference(shape, dtype):
    qkv, *rest = (t.to(DEVICE) for t in case(*shape, dtype))
    expected = qkv.clone()
    reference(expected, *rest, EPS)
    buffers = [guarded(t) for t in (qkv, *rest)]
    fused_qk(*(b.tensor for b in buffers), EPS)
    # a mean of head_dim squares, summed in another order, then one rounding to the dtype
    tolerance = 2e-6 if dtype == torch.float32 else 2**-10
    torch.testing.assert_close(buffers[0].tensor, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(buffers[0].tensor[:, 2], qkv[:, 2])
    for buffer in buffers:
        buffer.check()


@needs_launch
def test_kernel_stores_bfloat16_within_one_step():
    qkv, *rest = (t.to(DEVICE) for t in case(3, 3, 2, 128, torch.bfloat16))
    expected = qkv.float()
    reference(expected, *rest, EPS)
    fused_qk(qkv, *rest, EPS)
    # one step of bfloat16's 8 bits: truncation in the interpreter, half of it on a GPU
    torch.testing.assert_close(qkv.float(), expected, rtol=2**-7, atol=2e-6)


@needs_launch
def test_kernel_leaves_what_lies_between_tokens():
    qkv, *rest = (t.to(DEVICE) for t in case(4, 4, 2, 64, torch.float32))
    wide = torch.full((4, 500), 7.0, device=DEVICE)
    view = wide[:, : 3 * 2 * 64].unflatten(1, (3, 2, 64))
    view.copy_(qkv)
    fused_qk(view, *rest, EPS)
    reference(qkv, *rest, EPS)
    torch.testing.assert_close(view, qkv, rtol=2e-6, atol=2e-6)
    assert (wide[:, 3 * 2 * 64 :] == 7).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"qkv": torch.zeros(4, 2, 2, 8)}, r"\[M, 3, heads, head_dim\]; got .*\[4, 2, 2, 8\]"),
        ({"qkv": torch.zeros(4, 3, 2, 7)}, "even head_dim of at most 2048; got 7"),
        ({"qkv": torch.zeros(4, 3, 8, 2).transpose(2, 3)}, "contiguous; got strides"),
        ({"qkv": torch.zeros(4, 3, 2, 8).double()}, "got torch.float64"),
        ({"q_weight": torch.zeros(9)}, r"q_weight float32 \[8\]; got torch.float32 \[9\]"),
        ({"cos": torch.zeros(3, 4)}, "M = 4 and L = 3"),
        ({"sin": torch.zeros(2, 8)[:, ::2]}, "sin contiguous"),
    ],
    ids=["parts", "odd", "strides", "dtype", "weight", "length", "table"],
)
def test_wrong_arguments_are_named(change, match):
    args = {
        "qkv": torch.zeros(4, 3, 2, 8),
        "q_weight": torch.ones(8),
        "k_weight": torch.ones(8),
        "cos": torch.ones(2, 4),
        "sin": torch.zeros(2, 4),
    }
    with pytest.raises(ValueError, match=match):
        fused_qk(**(args | change), eps=EPS)
