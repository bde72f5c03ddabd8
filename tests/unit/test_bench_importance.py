"""The benchmark of importance: its output error is that of outputs, its inputs are calibrate's."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zquant
from zquant.calibrate import Calibration, calibrate
from zquant.formats.model_folder import find_model
from zquant.memory.device import probe
from zquant.quant.codec import dequantize, quantize
from zquant.quant.qtypes import QTYPES

with pytest.MonkeyPatch.context() as patch:  # its neighbours are on the path for the import only
    patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    importance: Any = importlib.import_module("importance")


def driven(n: int, k: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Inputs that hang together, some of them driven a hundred times as much."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 8)) @ rng.standard_normal((8, k)) + rng.standard_normal((n, k))
    return (x * np.exp(rng.normal(0, 2, k))).astype(np.float32)


@pytest.mark.parametrize("qtype", ["Q4_0", "Q4_K"])
def test_the_error_is_that_of_outputs_and_importance_lowers_it(qtype: str) -> None:
    x = driven(300, 256)
    weights = np.random.default_rng(1).standard_normal((24, 256)).astype(np.float32)
    moments = x.astype(np.float64).T @ x.astype(np.float64)
    kind = QTYPES[qtype]
    stored = dequantize(torch.from_numpy(quantize(weights, kind)), kind, torch.float32).numpy()
    exact = x.astype(np.float64) @ weights.T
    wanted = np.linalg.norm(x @ stored.T.astype(np.float64) - exact) / np.linalg.norm(exact)
    found = importance.output_error(weights, kind, None, moments)
    assert found == pytest.approx(wanted, rel=1e-9)
    means = (moments.diagonal() / len(x)).astype(np.float32)
    assert importance.output_error(weights, kind, means, moments) < found


def test_second_moments_are_of_the_inputs_that_calibrate_sees(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = probe("cpu", "float32", compute="exact")
    monkeypatch.setattr(importance, "exact_device", lambda _: device)
    request = zquant.RunRequest(prompt="a red fox", width=32, height=48, steps=2, seed=5)
    weights, moments = importance.second_moments(toy_folder, [request])
    calibration = Calibration(
        files=find_model(toy_folder), requests=[request], dataset="a", device=device
    )
    entries = calibrate(calibration).entries
    assert {"layers.1.attention.qkv.weight", "blk.0.ffn_down.weight"} < set(moments)
    assert not any("adaLN" in name or "embedder" in name for name in moments)
    for name, h in moments.items():
        assert weights[name].shape[1] == len(h)
        np.testing.assert_allclose(h.diagonal(), entries[name].squares, rtol=1e-5, err_msg=name)
