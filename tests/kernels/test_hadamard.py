"""The rotation against the matrix it stands for."""

import math

import pytest
import torch
from zquant_kernels import hadamard
from zquant_kernels.runtime import tl, triton

from tests.kernels.kernel_testing import DEVICE, assert_same_bits, guarded, needs_launch


@triton.jit
def rotate_rows(x, out, ROWS: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(out + at, hadamard.rotate(tl.load(x + at), ROWS, K, GROUP))


def matrix(group):
    """Sylvester's construction."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < group:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / math.sqrt(group)


@pytest.mark.parametrize("group", [2, *hadamard.GROUPS])
def test_reference_is_the_matrix_on_every_group(group):
    x = torch.randn(3, 2, 512)
    expected = (x.double().reshape(-1, group) @ matrix(group)).reshape(x.shape)
    # eight sums of float32, some of which cancel
    torch.testing.assert_close(hadamard.reference(x, group).double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("group", hadamard.GROUPS)
def test_rotating_twice_gives_everything_back(group):
    x = torch.randn(5, 512)
    twice = hadamard.reference(hadamard.reference(x, group), group)
    torch.testing.assert_close(twice, x, rtol=0, atol=4e-6)


def test_reference_leaves_its_input_alone():
    x = torch.randn(2, 256)
    kept = x.clone()
    hadamard.reference(x, 256)
    assert torch.equal(x, kept)


@needs_launch
@pytest.mark.parametrize("group", hadamard.GROUPS)
@pytest.mark.parametrize("rows", [1, 4])
def test_kernel_equals_reference_bit_for_bit(group, rows):
    x, out = guarded(torch.randn(rows, 512).to(DEVICE)), guarded(torch.empty(rows, 512).to(DEVICE))
    rotate_rows[(1,)](x.tensor, out.tensor, ROWS=rows, K=512, GROUP=group)
    assert_same_bits(out.tensor, hadamard.reference(x.tensor, group))
    x.check()
    out.check()


@pytest.mark.parametrize(("n", "group"), [(3840, 256), (10240, 256), (192, 64), (48, 0), (1, 0)])
def test_the_widest_group_that_divides_is_taken(n, group):
    assert hadamard.group_of(n) == group
