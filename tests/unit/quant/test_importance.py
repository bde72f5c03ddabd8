"""Importance weights: what they change, what they must be, and rows at the edge."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zquant.quant.codec import dequantize, quantize
from zquant.quant.qtypes import QTYPES

SEARCHED = [name for name, qtype in QTYPES.items() if qtype.searched(importance=True)]
IGNORED = [name for name in QTYPES if name not in SEARCHED]
ROW = 512


def gaussian(n_rows, seed=0):
    return np.random.default_rng(seed).standard_normal((n_rows, ROW)).astype(np.float32)


def decoded(packed, name):
    return dequantize(torch.from_numpy(packed), QTYPES[name], torch.float32).numpy()


def skewed(seed=1):
    """Some channels matter a thousand times as much as others."""
    return np.exp(np.random.default_rng(seed).uniform(0, 7, ROW)).astype(np.float32)


@pytest.mark.parametrize("name", SEARCHED)
def test_the_weighted_error_falls(name):
    weights, importance = gaussian(16), skewed()
    errors = [
        (importance * (decoded(quantize(weights, QTYPES[name], given), name) - weights) ** 2).sum()
        for given in (None, importance)
    ]
    assert errors[1] < 0.97 * errors[0]


@pytest.mark.parametrize("name", IGNORED)
def test_types_that_only_round_ignore_it(name):
    weights = gaussian(3)
    packed = quantize(weights, QTYPES[name], skewed())
    np.testing.assert_array_equal(packed, quantize(weights, QTYPES[name]))


@pytest.mark.parametrize("name", SEARCHED)
def test_only_ratios_matter(name):
    """The unit of importance is anybody's choice; powers of two change no rounding."""
    weights, importance = gaussian(3), skewed()
    packed = quantize(weights, QTYPES[name], importance)
    for unit in (2.0**-120, 2.0**-20, 2.0**20, 2.0**110):
        scaled = quantize(weights, QTYPES[name], importance * np.float32(unit))
        np.testing.assert_array_equal(packed, scaled)


@pytest.mark.parametrize("name", SEARCHED)
def test_every_row_has_the_same_importance(name):
    weights, importance = gaussian(5), skewed()
    alone = [quantize(row[None], QTYPES[name], importance) for row in weights]
    np.testing.assert_array_equal(
        quantize(weights, QTYPES[name], importance), np.concatenate(alone)
    )


@pytest.mark.parametrize("name", SEARCHED)
def test_strides_do_not_matter_and_the_numbers_stay(name):
    weights, importance = gaussian(2), skewed()
    importance.flags.writeable = False
    strided = np.repeat(importance, 3)[::3]
    packed = quantize(weights, QTYPES[name], importance)
    np.testing.assert_array_equal(packed, quantize(weights, QTYPES[name], strided))
    np.testing.assert_array_equal(importance, skewed())


@pytest.mark.parametrize("name", SEARCHED)
def test_channels_without_any_importance_give_finite_weights(name):
    """Alone in a qblock, among others, and all of them."""
    weights, importance = gaussian(4), skewed()
    for dead in (slice(7, 8), slice(32, 64), slice(0, 256), slice(None)):
        some = importance.copy()
        some[dead] = 0
        values = decoded(quantize(weights, QTYPES[name], some), name)
        assert np.isfinite(values).all()
        assert np.abs(values).max() < 2 * np.abs(weights).max()


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        *dict.fromkeys(["Q4_0", "Q5_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"], False).items(),
        *dict.fromkeys(["Q4_1", "Q5_1", "IQ4_NL", "IQ4_XS"], True).items(),
    ],
)
def test_a_qblock_without_any_importance_is_zero_or_as_good_as_rounded(name, kept):
    """ggml's searches divide by the sum of the costs, or have a first grid to fall back on."""
    weights = gaussian(4)
    values = decoded(quantize(weights, QTYPES[name], np.zeros(ROW, np.float32)), name)
    if kept:
        assert np.sqrt(((values - weights) ** 2).mean()) < 0.15
    else:
        assert not values.any()


WEIGHTS = [0.0, -0.0, 1.0, -0.37, 1e-3, -1e-7, 1e-16, 1e-39, 6e4, -3e3]
IMPORTANCE = [0.0, 1e-12, 1e-3, 1.0, 7.0, 1e5]


def edge_rows(numbers):
    """A row of two qblocks of 256: constants, outliers, mixed signs and sizes, zeros."""
    number = st.sampled_from(numbers)
    spans = st.tuples(number, number, st.integers(1, 200))
    return st.lists(spans, min_size=1, max_size=12).map(_filled)


def _filled(spans):
    row = [n for a, b, count in spans for n in (a, *[b] * count)]
    return np.resize(np.array(row, np.float32), ROW)


@pytest.mark.parametrize("name", SEARCHED)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    row=edge_rows(WEIGHTS),
    importance=st.none() | edge_rows(IMPORTANCE),
    unit=st.sampled_from([1e-33, 1.0, 1e33]),
)
def test_edge_rows_never_become_nan(name, row, importance, unit):
    """Nor larger than a scale's rounding makes them; warnings are errors here."""
    if importance is not None:
        importance = importance * np.float32(unit)
    values = decoded(quantize(row[None], QTYPES[name], importance), name)
    assert np.isfinite(values).all()
    assert np.abs(values).max() <= 1.3 * np.abs(row).max() + 1e-7


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (np.ones(ROW), r"float32 \[512\], a number per input channel; got float64 \[512\]"),
        (np.ones(256, np.float32), r"float32 \[512\], .* got float32 \[256\]"),
        (np.ones((1, ROW), np.float32), r"got float32 \[1, 512\]"),
        (np.array([1] * 511 + [-2], np.float32), r"1 of 512 numbers are not \(first: .* 511, -2.0"),
        (np.array([np.nan, np.inf] * 256, np.float32), r"512 of 512 .* \(first: channel 0, nan\)"),
    ],
    ids=["dtype", "length", "dimensions", "negative", "not_finite"],
)
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_wrong_importance_is_named(name, importance, message):
    with pytest.raises(ValueError, match=message):
        quantize(gaussian(1), QTYPES[name], importance)
