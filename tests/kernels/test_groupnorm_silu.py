import pytest
import torch
import torch.nn.functional as F
from zquant_kernels import groupnorm_silu as family
from zquant_kernels import runtime
from zquant_kernels.groupnorm_silu import groupnorm_silu, reference

from tests.kernels.kernel_testing import DEVICE, EXACT, assert_same_bits, guarded, needs_launch

EPS = 1e-6
# B, C, H, W, groups: one part, many parts and tiles, odd sizes, a group of one channel
SHAPES = [
    (1, 16, 8, 8, 4),
    (2, 6, 17, 9, 2),
    (1, 6, 1, 1, 2),
    (2, 2, 33, 31, 2),
    (1, 4, 47, 41, 2),
]
# every size above in several programs and steps, as a picture of 1536x1536 is with the real numbers
SMALL = {"TILE": 512, "MAX_PARTS": 4}
compute = pytest.mark.parametrize(
    "compute",
    [reference, pytest.param(groupnorm_silu, marks=needs_launch)],
    ids=["torch", "kernel"],
)


def random_case(shape, dtype, *, scale=1.0, mean=0.0):
    """x, weight, bias, groups."""
    *size, groups = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(size, generator=generator) * scale + mean
    weight, bias = torch.randn(2, size[1], generator=generator)
    return *(tensor.to(DEVICE, dtype) for tensor in (x, weight, bias)), groups


def exact(x, weight, bias, groups, *, silu=True):
    """The definition in float64."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    part = x.unflatten(1, (groups, -1)).flatten(2)
    part = part - part.mean(2, keepdim=True)
    y = (part / (part.square().mean(2, keepdim=True) + EPS).sqrt()).view(x.shape)
    y = y * weight[:, None, None] + bias[:, None, None]
    return F.silu(y) if silu else y


def assert_close(actual, expected):
    """float32 within 1e-5, which is some steps of numbers around 4; halves within one step."""
    assert actual.dtype in (torch.float32, torch.float16, torch.bfloat16)
    step = torch.finfo(actual.dtype).eps
    rtol = 1e-5 if actual.dtype == torch.float32 else step
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=1e-5)


@pytest.fixture(params=[{}, SMALL], ids=["tiles as launched", "small tiles"])
def tiles(request, monkeypatch):
    for name, value in request.param.items():
        monkeypatch.setattr(family, name, value)


@needs_launch
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("tiles")
def test_kernel_equals_reference(shape, dtype):
    x, weight, bias, groups = random_case(shape, dtype)
    out = groupnorm_silu(x, weight, bias, groups, EPS)
    assert out.dtype == dtype
    assert_close(out, reference(x.float(), weight, bias, groups, EPS))


@needs_launch
def test_kernel_without_silu_equals_reference():
    case = random_case((2, 6, 17, 9, 2), torch.float32)
    assert_close(groupnorm_silu(*case, EPS, silu=False), reference(*case, EPS, silu=False))


@needs_launch
def test_kernel_stores_bfloat16_within_one_step():
    case = random_case((2, 6, 17, 9, 2), torch.bfloat16)
    out = groupnorm_silu(*case, EPS)
    assert out.dtype == torch.bfloat16
    # the interpreter truncates, a GPU rounds
    assert_close(out, exact(*case))


@compute
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_is_the_definition_in_float64(compute, shape, dtype, silu):
    case = random_case(shape, dtype)
    assert_close(compute(*case, EPS, silu=silu), exact(*case, silu=silu))


@needs_launch
@pytest.mark.usefixtures("tiles")
def test_a_mean_a_million_times_the_deviation_loses_nothing():
    case = random_case((1, 4, 37, 29, 2), torch.float32, scale=1e-2, mean=1e4)
    # the same bits in float64: x itself has steps of 1e-3 there
    assert_close(groupnorm_silu(*case, EPS), exact(*case))


def test_reference_holds_a_large_mean_to_the_steps_of_float32():
    case = random_case((1, 4, 37, 29, 2), torch.float32, scale=1e-2, mean=1e4)
    # two steps of 1e4 over the deviation, times the weights and the steepest slope of SiLU
    atol = 2 * 2**-10 / 1e-2 * case[1].abs().max().item() * 1.1
    torch.testing.assert_close(reference(*case, EPS).double(), exact(*case), rtol=0, atol=atol)


@needs_launch
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("at", [0, 1, 500, -1], ids=["first", "second", "middle", "last"])
def test_one_huge_element_is_normalized_with_its_group(at):
    x, weight, bias, groups = random_case((1, 4, 33, 31, 2), torch.float32)
    x.view(-1)[at] = 1e6
    out = groupnorm_silu(x, weight, bias, groups, EPS)
    expected = exact(x, weight, bias, groups)
    # the pivot may be that element: differences from it are then exact to 1e6 * 2**-24, and the
    # deviation of n = 2046 elements is at least 1e6 / sqrt(n)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-5)


@needs_launch
@pytest.mark.parametrize("value", [0.0, 1e-40, 3.0, 1e4], ids=str)
def test_a_constant_group_gives_the_bias(value):
    x, weight, bias, groups = random_case((1, 4, 17, 5, 2), torch.float32)
    out = groupnorm_silu(x.fill_(value), weight, bias, groups, EPS)
    assert_close(out, F.silu(bias)[:, None, None].expand(x.shape))


@compute
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_in_place_and_into_out_give_the_same_bits(compute, dtype, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(family, name, value)
    x, weight, bias, groups = random_case((2, 4, 17, 29, 2), dtype)
    before = x.clone()
    expected = compute(x, weight, bias, groups, EPS)
    assert_same_bits(x, before)
    out = torch.empty_like(x)
    assert compute(x, weight, bias, groups, EPS, out=out) is out
    assert_same_bits(out, expected)
    assert compute(x, weight, bias, groups, EPS, out=x) is x
    assert_same_bits(x, expected)


@needs_launch
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_outside_the_tensors_is_read_or_written(shape, monkeypatch):
    x, weight, bias, groups = random_case(shape, torch.float16)
    expected = groupnorm_silu(x, weight, bias, groups, EPS)
    given = [guarded(tensor) for tensor in (x, weight, bias, torch.empty_like(x))]
    made, empty = [], torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **kw: made.append(guarded(empty(*a, **kw))) or made[-1].tensor
    )
    inputs = [tensor.tensor for tensor in given]
    out = groupnorm_silu(*inputs[:3], groups, EPS, out=inputs[3])
    monkeypatch.undo()
    assert_same_bits(out, expected)
    assert made  # the parts' numbers
    for tensor in (*given, *made):
        tensor.check()


def test_dtypes_of_the_vectors_are_free():
    x, weight, bias, groups = random_case((1, 8, 5, 7, 4), torch.float16)
    weight, bias = weight.float(), bias.bfloat16()
    assert_close(groupnorm_silu(x, weight, bias, groups, EPS), exact(x, weight, bias, groups))


def test_forbidden_kernels_are_answered_by_the_reference():
    case = random_case((1, 8, 5, 7, 4), torch.float16)
    with runtime.forbidden("for this test"):
        assert_same_bits(groupnorm_silu(*case, EPS), reference(*case, EPS))


def test_no_pixels_give_no_pixels():
    x, weight, bias, groups = random_case((0, 8, 5, 7, 4), torch.float16)
    assert groupnorm_silu(x, weight, bias, groups, EPS).shape == (0, 8, 5, 7)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.zeros(8, 5, 7)}, r"x \[B, C, H, W\].*got torch.float32 \[8, 5, 7\]"),
        ({"x": torch.zeros(1, 8, 5, 7).double()}, r"got torch.float64"),
        ({"x": torch.zeros(1, 8, 7, 5).mT}, r"contiguous.*strides \(280, 35, 1, 5\)"),
        ({"groups": 3}, "groups that divide 8 channels; got 3"),
        ({"groups": 0}, "groups that divide 8 channels; got 0"),
        ({"weight": torch.zeros(4)}, r"weight \[8\].*got torch.float32 \[4\]"),
        ({"bias": torch.zeros(16)[::2]}, r"bias \[8\].*strides \(2,\)"),
        ({"bias": torch.zeros(8, device="meta")}, "bias on cpu; got meta"),
        ({"out": torch.zeros(1, 8, 5, 6)}, r"out like x.*got torch.float32 \[1, 8, 5, 6\]"),
        ({"out": torch.zeros(1, 8, 5, 7).half()}, r"out like x.*got torch.float16"),
        ({"out": torch.zeros(1, 8, 7, 5).mT}, "out contiguous; got strides"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change, match):
    good = {
        "x": torch.zeros(1, 8, 5, 7), "weight": torch.zeros(8), "bias": torch.zeros(8), "groups": 4,
    }  # fmt: skip
    with pytest.raises(ValueError, match=match):
        groupnorm_silu(**{**good, **change}, eps=EPS)
