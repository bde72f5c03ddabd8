"""Tokens and linears in int8 against the same product in floats."""

import math

import pytest
import torch
from zquant_kernels import hadamard

from zquant.layers.compute import Compute, QuantTokens, enter, split
from zquant.layers.linear import QuantLinear
from zquant.quant.codec import dequantize, quantize
from zquant.quant.qtypes import QTYPES


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def int8_linear(n: int, k: int, qtype: str, group: int) -> QuantLinear:
    weights = noise(n, k, seed=5).numpy() / math.sqrt(k)
    linear = QuantLinear(k, n, bias=True)
    linear.load(torch.from_numpy(quantize(weights, QTYPES[qtype])), QTYPES[qtype])
    linear.bias = torch.nn.Parameter(noise(n, seed=6), requires_grad=False)
    linear.use_int8(group)
    return linear


@pytest.mark.parametrize("group", [0, 64, 256])
def test_tokens_remember_what_they_were_before_rotation(group):
    x = noise(5, 512)
    tokens = enter(x, group)
    assert isinstance(tokens, QuantTokens)
    assert (tokens.q.dtype, tokens.scale.shape, tokens.dtype) == (torch.int8, (5,), torch.float32)
    # a value is rounded to 1 / 127 of the largest of some hundred, 3 to 4 sigma
    assert ((tokens.plain() - x).norm() / x.norm()) < 0.012
    if group:
        rotated = tokens.q.float() * tokens.scale[:, None]
        assert ((rotated - hadamard.reference(x, group)).norm() / x.norm()) < 0.012


def test_tokens_that_are_not_quantized_stay_as_they_are():
    x = noise(3, 64)
    assert enter(x, None) is x


@pytest.mark.parametrize("qtype", ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q5_0", "Q4_0", "BF16", "F16"])
@pytest.mark.parametrize("group", [0, 256])
def test_int8_linear_is_near_the_product_of_the_decoded_weight(qtype, group):
    n, k = 37, 512
    linear, x = int8_linear(n, k, qtype, group), noise(9, k, seed=1)
    weight = dequantize(linear.weight, QTYPES[qtype], torch.float32)
    expected = x @ weight.T + linear.bias
    out = linear(enter(x, group))
    assert (out.dtype, out.shape) == (torch.float32, (9, n))
    error = (out - expected).norm() / (expected - linear.bias).norm()
    # tokens and weights are each rounded by about 0.7 %, more where a row has a large value
    assert error < 0.02


def test_rotation_saves_tokens_with_outlier_channels():
    linear = {group: int8_linear(64, 512, "Q8_0", group) for group in (0, 256)}
    x = noise(16, 512, seed=1)
    x[:, ::100] *= 40
    weight = dequantize(linear[0].weight, QTYPES["Q8_0"], torch.float32)
    expected = x @ weight.T
    error = {
        group: float((linear[group](enter(x, group)) - linear[group].bias - expected).norm())
        for group in linear
    }
    assert error[256] < error[0] / 3


def test_linear_writes_into_a_part_of_a_buffer():
    linear, x = int8_linear(32, 256, "Q8_0", 256), noise(4, 256)
    for tokens in (x, enter(x, 256)):
        buffer = torch.full((4, 96), 7.0)
        out = linear(tokens, out=buffer[:, 32:64])
        assert torch.equal(out, linear(tokens))
        assert out.data_ptr() == buffer[:, 32:].data_ptr()
        assert (buffer[:, :32] == 7).all()
        assert (buffer[:, 64:] == 7).all()


def test_new_weights_need_new_scales():
    linear = int8_linear(4, 256, "Q8_0", 256)
    linear(enter(noise(2, 256), 256))
    scales = linear.row_scale
    linear.place(linear.weight.detach().clone())  # the same weight at another place
    assert linear.row_scale is scales
    linear.load(linear.weight.detach(), linear.qtype)
    assert linear.row_scale is None


@pytest.mark.parametrize("group", [None, 64])
def test_chunks_are_equal_and_lose_nothing(group):
    tokens = enter(noise(10, 64), group)
    assert split(tokens, 10) == [tokens]
    parts = split(tokens, 4)
    values = [part.q if group else part for part in parts]
    assert [len(v) for v in values] == [4, 3, 3]
    assert torch.equal(torch.cat(values), tokens.q if group else tokens)
    if group:
        assert torch.equal(torch.cat([part.scale for part in parts]), tokens.scale)


def test_rotation_takes_the_widest_group_that_fits():
    compute = Compute(dtype=torch.float32, int8=True)
    assert [compute.group(k) for k in (3840, 10240, 192, 48)] == [256, 256, 64, 0]
    assert Compute(dtype=torch.float32, rotate=False).group(3840) == 0
