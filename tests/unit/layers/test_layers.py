"""Norm, rotation, attention, linear and embedding layers against their formulas in float64."""

import math

import numpy as np
import pytest
import torch

from zquant.layers.attention import attention
from zquant.layers.linear import QuantEmbedding, QuantLinear, quant_matmul
from zquant.layers.norm import RMSNorm
from zquant.layers.rope import angles, axis_angles, rotate_half
from zquant.layers.swiglu import input_scale, swiglu
from zquant.quant.codec import dequantize, quantize
from zquant.quant.qtypes import QTYPES

# float32 sums of at most some hundred terms; measured below 1e-6
FLOAT32 = {"rtol": 2e-6, "atol": 2e-6}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed_noise(n: int, k: int, qtype: str, seed: int = 0) -> torch.Tensor:
    weights = noise(n, k, seed=seed).numpy() / math.sqrt(k)
    return torch.from_numpy(quantize(weights, QTYPES[qtype]))


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.5], ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.0**-5], ids=["true", "scaled"])
def test_norm_is_its_formula_and_forgets_a_scale_eps_included(eps: float, scale: float) -> None:
    x = noise(3, 7) * 0.1
    norm = RMSNorm(7, eps)
    norm.weight.copy_(noise(7, seed=1))
    x64 = x.double()
    expected = x64 / (x64.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x * scale, scale=scale).double(), expected, **FLOAT32)


def test_norm_of_float16_is_computed_in_float32() -> None:
    x = torch.full((1, 4), 60000.0, dtype=torch.float16)  # its square is not a float16
    norm = RMSNorm(4, 1e-5)
    norm.weight.fill_(1)
    assert norm(x).dtype == torch.float32
    torch.testing.assert_close(norm(x), torch.ones(1, 4))


def rotated(pairs: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Complex `[B, L, heads, d / 2]` times e^(i angle), in complex128."""
    d = 2 * pairs.shape[-1]
    frequency = theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    turn = torch.polar(torch.ones(()).double(), torch.outer(positions.double(), frequency))
    return pairs * turn[:, None]


def test_rotation_of_halves_is_complex_multiplication() -> None:
    x, positions = noise(1, 4, 3, 8), torch.arange(4)
    a = angles(positions, 8, 1e6)
    first, second = x.double().chunk(2, dim=-1)
    expected = rotated(torch.complex(first, second), positions, 1e6)
    out = rotate_half(x, a.cos(), a.sin()).double()
    torch.testing.assert_close(out, torch.cat((expected.real, expected.imag), -1), **FLOAT32)


def test_axes_are_joined_in_order_each_with_its_own_frequencies() -> None:
    positions = torch.tensor([[3, 5, 7], [0, 1, 2]])
    joined = axis_angles(positions, (8, 4, 6), 256.0)
    assert joined.shape == (2, 9)
    parts = [angles(positions[:, i], d, 256.0) for i, d in enumerate((8, 4, 6))]
    assert torch.equal(joined, torch.cat(parts, -1))


@pytest.mark.parametrize("kv_heads", [6, 2, 1], ids=lambda n: f"6 on {n} heads")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_attention_is_softmax_of_products(kv_heads: int, causal: bool) -> None:
    q, k, v = (noise(2, 5, h, 4, seed=i) for i, h in enumerate((6, kv_heads, kv_heads)))
    expected = torch.empty(2, 5, 6, 4, dtype=torch.float64)
    for head in range(6):
        shared = head // (6 // kv_heads)
        scores = q[:, :, head].double() @ k[:, :, shared].double().transpose(1, 2) / 2  # sqrt(4)
        if causal:
            later = torch.ones(5, 5, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        expected[:, :, head] = scores.softmax(-1) @ v[:, :, shared].double()
    out = attention(q, k, v, causal=causal)
    assert out.dtype == v.dtype
    torch.testing.assert_close(out.double(), expected.flatten(2), **FLOAT32)


def test_attention_takes_no_mask_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        seen.update(options)
        return real(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    attention(*(noise(1, 3, 2, 4, seed=i) for i in range(3)), causal=True)
    assert seen == {"is_causal": True}


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_linear_is_the_decoded_weight_times_x(qtype: str, dtype: torch.dtype) -> None:
    n, k = 37, 2 * QTYPES[qtype].qblock if QTYPES[qtype].qblock > 1 else 51
    linear = QuantLinear(k, n, bias=True)
    linear.load(packed_noise(n, k, qtype), QTYPES[qtype])
    linear.bias = torch.nn.Parameter(noise(n, seed=2), requires_grad=False)
    x = noise(2, 3, k, seed=1).to(dtype)
    out = linear(x)
    weight = dequantize(linear.weight, QTYPES[qtype], dtype).double()
    expected = x.double() @ weight.T + linear.bias.double()
    assert out.dtype == dtype
    assert out.shape == (2, 3, n)
    # product and sum are each rounded once to `dtype`, at up to 4; float32 also sums 512 terms
    tolerance = max(4 * torch.finfo(dtype).eps, 4e-6)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_matmul_in_slabs_is_the_matmul_whole() -> None:
    n, k = 8195, 512  # 4 Mi weights and an odd rest: more than fit a cache
    packed, x = packed_noise(n, k, "Q8_0"), noise(1, k, seed=1)
    out = quant_matmul(x, packed, QTYPES["Q8_0"])
    whole = x @ dequantize(packed, QTYPES["Q8_0"], torch.float32).T
    torch.testing.assert_close(out, whole, **FLOAT32)


def test_linear_keeps_the_bytes_it_is_given() -> None:
    packed = packed_noise(4, 256, "Q4_K")
    linear = QuantLinear(256, 4)
    linear.load(packed, QTYPES["Q4_K"])
    assert linear.weight.data_ptr() == packed.data_ptr()
    with pytest.raises(AssertionError):
        linear.load(packed[:3], QTYPES["Q4_K"])


@pytest.mark.parametrize("qtype", QTYPES)
def test_embedding_decodes_the_rows_it_is_asked_for(qtype: str) -> None:
    k = 256
    packed = packed_noise(9, k, qtype)
    table = QuantEmbedding(9, k)
    table.load(packed, QTYPES[qtype])
    ids = torch.tensor([8, 0, 8, 3])
    expected = dequantize(packed, QTYPES[qtype], torch.float32)[ids]
    assert torch.equal(table(ids), expected)
    assert table.weight.data_ptr() == packed.data_ptr()


def test_embedding_reads_no_other_row() -> None:
    rows = np.full((4, 8), np.nan, np.float32)
    rows[2] = 1
    table = QuantEmbedding(4, 8)
    table.load(torch.from_numpy(rows.view(np.uint8)), QTYPES["F32"])
    assert torch.equal(table(torch.tensor([2])), torch.ones(1, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_swiglu_of_a_product_past_float16(dtype: torch.dtype) -> None:
    gate, up, down = (
        noise(n, k, seed=i) for i, (n, k) in enumerate([(48, 32), (48, 32), (32, 48)])
    )
    gate, up, down = (w.to(dtype) for w in (gate * 60, up * 60, down * 2))
    x = noise(5, 32, seed=3)
    h = (x * input_scale(dtype)).to(dtype)
    product = torch.nn.functional.silu(x @ gate.float().T) * (x @ up.float().T)
    expected = product @ down.float().T
    assert product.abs().max() > 65504
    assert expected.abs().max() > 65504
    out, scale = swiglu(h, *(lambda t, w=w, **_: t @ w.T for w in (gate, up, down)))
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    error = (out.float() / scale - expected).norm() / expected.norm()
    # four roundings (x, gate and up, product, out) of relative size eps / 2 or less each
    assert error < 2 * torch.finfo(dtype).eps + 1e-6
