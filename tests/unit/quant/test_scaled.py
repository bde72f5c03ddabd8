"""Scaled and rotated weights decode with one rounding, in chunks or at once."""

import math

import numpy as np
import pytest
import torch

from zquant.quant import scaled
from zquant.quant.codec import dequantize
from zquant.quant.qtypes import EIGHT_BIT, QTYPES
from zquant.quant.scaled import Scaling, dequantize_scaled


def every_byte(n_rows: int, n_columns: int) -> torch.Tensor:
    return torch.arange(n_rows * n_columns).remainder(256).to(torch.uint8).view(n_rows, n_columns)


@pytest.mark.parametrize("name", EIGHT_BIT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_byte_is_torchs_number(name, dtype):
    storage = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8}
    packed = every_byte(2, 256)
    expected = packed.view(storage[name]).to(torch.float64).to(dtype)
    decoded = dequantize(packed, EIGHT_BIT[name], dtype)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("group", [4, 16, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotated_numbers_are_rounded_once(group, dtype, monkeypatch):
    monkeypatch.setattr(scaled, "CHUNK", 3 * 512)  # rows that do not divide
    q, factors = every_byte(7, 512), torch.rand(7, generator=torch.manual_seed(0))
    seed = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float64)
    h = np.ones((1, 1))
    while len(h) < group:
        h = np.kron(h, seed)
    assert np.array_equal(h @ h, group * np.eye(group))
    whole = q.view(torch.int8).numpy().astype(np.float64).reshape(-1, group) @ h
    exact = whole.reshape(7, 512) / math.sqrt(group) * factors.numpy().astype(np.float64)[:, None]
    decoded = dequantize_scaled(q, EIGHT_BIT["I8"], dtype, Scaling(factors, group))
    expected = torch.from_numpy(exact).float().to(dtype)
    assert torch.equal(decoded, expected)


def test_rows_have_their_own_factors():
    q = every_byte(8, 32)
    scaling = Scaling(torch.arange(8.0))
    whole = dequantize_scaled(q, EIGHT_BIT["I8"], torch.float32, scaling)
    rows = torch.tensor([5, 1, 1])
    assert torch.equal(
        dequantize_scaled(q[rows], EIGHT_BIT["I8"], torch.float32, scaling.of(rows)), whole[rows]
    )
    last = slice(6, 8)
    assert torch.equal(
        dequantize_scaled(q[last], EIGHT_BIT["I8"], torch.float32, scaling.of(last)), whole[last]
    )
    assert Scaling(torch.ones(1)).of(rows).factors.shape == (1,)


def test_nothing_beside_a_weight_is_plain_decoding():
    packed = every_byte(2, 64)
    plain = dequantize(packed, QTYPES["BF16"], torch.float32)
    decoded = dequantize_scaled(packed, QTYPES["BF16"], torch.float32, None)
    torch.testing.assert_close(decoded, plain, rtol=0, atol=0, equal_nan=True)
