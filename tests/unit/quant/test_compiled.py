"""The compiled searches give the bytes of the searches in passes."""

import sys

import numpy as np
import pytest
import torch

from zquant.quant import codec, search
from zquant.quant.qtypes import QTYPES
from zquant.quant.search import TINY, OffsetGrid, importance_grid, search_offset, search_signed

pytest.importorskip("numba")
SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


@pytest.fixture
def in_passes(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Undoing it brings the compiled loops back."""
    assert search.compiled_loops() is not None
    for module in (search, codec):
        monkeypatch.setattr(module, "compiled_loops", lambda: None)
    return monkeypatch


def awkward(n_rows: int = 24, n_columns: int = 768) -> np.ndarray:
    """Weights with heavy tails, and rows at the limits of what a search meets."""
    rng = np.random.default_rng(0)
    x = rng.standard_t(3, (n_rows, n_columns)).astype(np.float32) * np.float32(0.02)
    x[0] = 0
    x[1] = -0.3
    x[2] = 0.25
    x[3] = rng.choice(np.float32([-0.5, 0.5]), n_columns)  # ties of the largest
    x[4, ::2] = -0.0
    x[4, 1::2] = 0.0
    x[5] *= 1e-18  # below what counts as a scale
    x[6] *= 1e-8
    x[7, 10] = 60000.0
    return x


@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("name", SEARCHED)
def test_bytes_are_the_same(name: str, weighed: bool, in_passes: pytest.MonkeyPatch) -> None:
    x = awkward()
    rng = np.random.default_rng(1)
    importance = rng.random(x.shape[1]).astype(np.float32) ** 4 if weighed else None
    slow = codec.quantize(x, QTYPES[name], importance)
    in_passes.undo()
    assert np.array_equal(codec.quantize(x, QTYPES[name], importance), slow)


@pytest.mark.parametrize("n", [2, 63, 64, 65, 200])
@pytest.mark.parametrize("keep_levels", [False, True])
def test_fits_are_the_same_for_any_number_of_columns(
    n: int, keep_levels: bool, in_passes: pytest.MonkeyPatch
) -> None:
    x = (
        torch.from_numpy(awkward(3 * max(n, 8), 32)[: 3 * n])
        .view(3, n, 32)
        .transpose(1, 2)
        .contiguous()
    )
    w = x * x + 0.01
    grids = (importance_grid(15), OffsetGrid(top=3, first=-0.5, step=0.1, last_k=15, absolute=True))

    def fits() -> list[torch.Tensor | None]:
        found: list[torch.Tensor | None] = []
        for grid in grids:
            found += search_offset(x, w, grid, keep_levels=keep_levels)
        for half in (4, 32):
            found += search_signed(x, w, half, keep_levels=keep_levels)
        return found

    slow = fits()
    in_passes.undo()
    for ours, theirs in zip(fits(), slow, strict=True):
        if theirs is None:
            assert ours is None
        else:
            assert ours is not None
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_columns_of_two_axes_are_one_group(in_passes: pytest.MonkeyPatch) -> None:
    x = torch.from_numpy(awkward(70, 16).T.copy())
    slow = search_signed(x, x * x, 32, keep_levels=True)
    in_passes.undo()
    scale, levels = search_signed(x, x * x, 32, keep_levels=True)
    assert torch.equal(scale, slow[0])
    assert levels is not None
    assert levels.shape == x.shape
    assert torch.equal(levels, slow[1])
    assert (scale[x.abs().amax(dim=0) < TINY] == 0).all()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K", "IQ4_XS", "F16"])
def test_only_what_is_not_compiled_waits_for_the_interpreter(
    name: str, in_passes: pytest.MonkeyPatch
) -> None:
    qtype = QTYPES[name]
    assert codec.holds_lock(qtype, importance=False) == (name in ("Q4_K", "IQ4_XS"))
    assert codec.holds_lock(qtype, importance=True) == (name in ("Q4_0", "Q4_K", "IQ4_XS"))
    in_passes.undo()
    assert codec.holds_lock(qtype, importance=True) == (name == "IQ4_XS")


def test_without_numba_there_are_no_compiled_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "zquant.quant.compiled")
    monkeypatch.delattr("zquant.quant.compiled")
    monkeypatch.setitem(sys.modules, "numba", None)
    assert search.compiled_loops.__wrapped__() is None
