"""What the searches rely on: sums in index order, and groups that do not influence each other."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from zquant.quant.codec import quantize
from zquant.quant.columns import MIN_COLUMNS, column_sums, scale_and_shift
from zquant.quant.qtypes import QTYPES
from zquant.quant.search import OffsetGrid, scaled_differences, search_offset, search_signed

GRID = OffsetGrid(top=15, first=-1, step=0.1, last_k=20)


def columns(n_groups, seed=0):
    return torch.randn(32, n_groups, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n_groups", [MIN_COLUMNS, 3, 8, 16, 100, 8192, 9001])
def test_sums_run_in_row_order(n_groups):
    a = columns(n_groups) * 1000
    expected = a[0].numpy().copy()
    for row in a[1:].numpy():
        expected = expected + row
    np.testing.assert_array_equal(column_sums(a), expected)


def test_a_single_group_is_refused_because_it_would_be_summed_pairwise():
    with pytest.raises(AssertionError):
        column_sums(columns(1))


def test_fused_passes_round_every_operation():
    """They are torch's, whose next version may compute them differently."""
    x, numbers = columns(1001), torch.rand(2, 1001) + 0.1
    offset, t = numbers.numpy()
    out = torch.empty_like(x)
    scaled_differences(x, offset, t, out)
    np.testing.assert_array_equal(out, (x.numpy() - offset) * t)
    shifted = scale_and_shift(x.clone(), numbers[:1], numbers[1:])
    np.testing.assert_array_equal(shifted, x.numpy() * offset + t)


def test_offset_fit_beats_the_plain_grid_and_never_has_a_positive_offset():
    x = columns(64).add_(0.5)
    w = torch.ones_like(x)
    scale, minimum, levels = search_offset(x, w, GRID, keep_levels=True)
    assert levels is not None
    plain = (x.amax(0) - x.amin(0).clamp(max=0)) / 15
    grid = ((x - x.amin(0).clamp(max=0)) / plain).round() * plain + x.amin(0).clamp(max=0)
    fitted = scale * levels - minimum
    assert (minimum >= 0).all()
    assert set(levels.unique().tolist()) <= set(range(16))
    assert ((fitted - x) ** 2).sum() < 0.95 * ((grid - x) ** 2).sum()


def test_offset_fit_follows_the_error_weights():
    """Importance is a matter of `w`: weights that count more come out closer."""
    x = columns(64)
    w = torch.ones_like(x)
    w[:4] = 1000
    errors = []
    for weights in (torch.ones_like(x), w):
        scale, minimum, levels = search_offset(x, weights, GRID, keep_levels=True)
        assert levels is not None
        errors.append(float(((scale * levels - minimum - x)[:4] ** 2).sum()))
    assert errors[1] < 0.5 * errors[0]


def test_signed_fit_returns_levels_of_its_scale():
    x = columns(64)[:16].contiguous()
    x[:, 5] = 0
    scale, levels = search_signed(x, x * x, 32, keep_levels=True)
    assert levels is not None
    assert scale[5] == 0
    assert not levels[:, 5].any()
    alive = torch.arange(64) != 5
    error = (scale * (levels - 32) - x)[:, alive]
    assert (error.abs() <= scale[alive].abs() * 1.01).all()


@pytest.mark.parametrize("qtype", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("n_lost", [1, 2, 5])
@pytest.mark.parametrize("importance", [None, np.ones(256, np.float32)], ids=["plain", "weighed"])
def test_groups_whose_scale_is_lost_do_not_depend_on_their_number(qtype, n_lost, importance):
    """Groups too small for the shared scale keep the levels of the search, alone or together."""
    weights = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
    weights[:, :32] *= np.float32(1e-7)
    weights[n_lost:, :32] = 0
    together = quantize(weights, QTYPES[qtype], importance)
    alone = np.concatenate([quantize(row[None], QTYPES[qtype], importance) for row in weights])
    np.testing.assert_array_equal(together, alone)
    emptied = weights.copy()
    emptied[:, :32] = 0
    changed = together != quantize(emptied, QTYPES[qtype], importance)
    assert changed.any(axis=1).sum() == n_lost


def test_absolute_error_is_another_fit_than_squared_error():
    x = columns(64)
    w = torch.ones_like(x)
    grids = [replace(GRID, top=3, absolute=absolute) for absolute in (False, True)]
    sums = []
    for grid in grids:
        scale, minimum, levels = search_offset(x, w, grid, keep_levels=True)
        assert levels is not None
        far = scale * levels - minimum - x
        sums.append([float((far**2).sum()), float(far.abs().sum())])
    (square, magnitude), (other_square, other_magnitude) = sums
    assert square < other_square
    assert other_magnitude < magnitude
