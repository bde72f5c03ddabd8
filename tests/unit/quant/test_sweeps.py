"""The sweeping searches against the same steps written down one number at a time."""

import numpy as np
import pytest
import torch

from zquant.quant.search import signed_max
from zquant.quant.sweeps import search_positive, search_swept

F = np.float32


def sums(x, w, levels):
    p = q = F(0)
    for i in range(len(x)):
        p += w[i] * x[i] * F(levels[i])
        q += w[i] * F(levels[i]) * F(levels[i])
    return p, q


def swept(x, w, levels, lowest, highest):
    """Coordinate sweeps of one group; scale and levels."""
    p, q = sums(x, w, levels)
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            old = F(levels[i])
            p_rest, q_rest = p - w[i] * x[i] * old, q - w[i] * old * old
            if p_rest <= 0:
                continue
            new = F(np.clip(np.rint(x[i] * q_rest / p_rest), lowest, highest))
            p_new, q_new = p_rest + w[i] * x[i] * new, q_rest + w[i] * new * new
            if new != old and q_new > 0 and p_new * p_new * q > p * p * q_new:
                levels[i], p, q, changed = new, p_new, q_new, True
        if not changed:
            break
    return (p / q if q > 0 else F(0)), levels


def positive(x, w, top):
    """`search_positive` of one column."""
    if x.max() < 1e-15:
        return F(0), np.zeros(len(x))
    best, least = None, None
    for k in (0, -4, -3, -2, -1, 1, 2, 3, 4):
        t = (F(0.1) * F(k) + F(top)) / x.max()
        rest = x - (F(1) / t) * np.minimum(np.rint(t * x), F(top))
        error = F(0)
        for i in range(len(x)):
            error += w[i] * rest[i] * rest[i]
        if least is None or error < least:
            best, least = t, error
    return swept(x, w, np.minimum(np.rint(best * x), F(top)), 0, top)


def signed(x, half):
    """`search_swept` of one group."""
    largest = x[np.abs(x).argmax()]
    if abs(largest) < 1e-15:
        return F(0), np.full(len(x), -half)
    levels = np.clip(np.rint(F(-half) / largest * x), -half, half - 1)
    return swept(x, x * x, levels, -half, half - 1)


@pytest.mark.parametrize("top", [15, 63])
@pytest.mark.parametrize("n", [2, 60])
def test_positive_search_does_these_steps(top, n):
    rng = np.random.default_rng(n)
    x, w = np.abs(rng.standard_t(2, (2, 16, n)).astype(F))
    x[:, 1] = 0
    x[3:] *= rng.random((13, n), F) < 0.5
    w[:5] = 0
    scale, levels = search_positive(torch.from_numpy(x), torch.from_numpy(w), top)
    for i in range(n):
        expected, numbers = positive(x[:, i], w[:, i], top)
        assert scale[i] == expected
        np.testing.assert_array_equal(levels[:, i], numbers)


@pytest.mark.parametrize("n", [2, 60])
def test_swept_search_does_these_steps(n):
    x = np.random.default_rng(n).standard_t(2, (2, 16, n)).astype(F)
    x[0, :, 1] = 0
    x[1, 1:, 0] = 0
    scale, levels = search_swept(torch.from_numpy(x), 4)
    for g in range(2):
        for i in range(n):
            expected, numbers = signed(x[g, :, i], 4)
            assert scale[g, i] == expected
            np.testing.assert_array_equal(levels[g, :, i], numbers + 4)


def test_sweeps_improve_on_the_grid_of_the_largest_weight():
    x = torch.randn(1, 16, 500, generator=torch.Generator().manual_seed(0))
    scale, levels = search_swept(x, 4)
    grid = torch.from_numpy(signed_max(x))[:, None] / -4
    plain = (x / grid).round().clamp(-4, 3) * grid
    errors = [
        (x * x * (fitted - x) ** 2).sum()
        for fitted in (plain, scale[:, None] * (levels.float() - 4))
    ]
    assert errors[1] < 0.85 * errors[0]
