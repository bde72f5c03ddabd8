"""The sixteen values of the IQ4 types and which of them is nearest."""

import itertools

import numpy as np
import pytest
import torch

from zquant.quant.iq4 import VALUES, nearest, search_values

BOUNDARIES = [(a + b) / 2 for a, b in itertools.pairwise(VALUES)]


def indices(numbers):
    x = torch.tensor(numbers, dtype=torch.float32).view(1, -1, 1)
    return nearest(x, torch.ones(1, 1)).flatten().tolist()


def test_halfway_is_the_upper_one_and_just_below_the_lower_one():
    below = np.nextafter(np.float32(BOUNDARIES), np.float32(-np.inf)).tolist()
    assert indices(BOUNDARIES) == list(range(1, 16))
    assert indices(below) == list(range(15))


def test_any_number_gets_the_value_nearest_to_it():
    numbers = np.random.default_rng(0).uniform(-140, 130, 5000).astype(np.float32)
    expected = np.abs(numbers[:, None] - np.float32(VALUES)).argmin(axis=1)
    assert indices(numbers) == expected.tolist()


@pytest.mark.parametrize(
    ("number", "index"), [(np.inf, 15), (-np.inf, 0), (3e38, 15), (-3e38, 0)], ids=str
)
def test_numbers_beyond_the_ends_get_the_ends(number, index):
    assert indices([number]) == [index]


def test_a_nan_gets_some_index():
    assert 0 <= indices([np.nan])[0] < 16


def test_multiples_of_the_values_are_found_exactly():
    weights = np.float32(VALUES * 2)[None] * np.float32(0.25)
    x, scale = search_values(weights, None, 32)
    assert (scale == 0.25).all()
    assert nearest(x, 1 / scale)[0, :, 0].tolist() == [*range(16), *range(16)]
