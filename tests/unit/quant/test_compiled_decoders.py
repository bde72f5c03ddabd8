"""The compiled decoders give the bits of the decoders in passes."""

import sys

import numpy as np
import pytest
import torch

from zquant.quant import codec
from zquant.quant.qtypes import QTYPES

pytest.importorskip("numba")
from zquant.quant import compiled_decoders

NAMES = tuple(compiled_decoders.UNITS)


def qblocks_of(name: str, n: int) -> torch.Tensor:
    """Any bytes, scales among them that are infinite or no numbers."""
    rng = np.random.default_rng(n)
    return torch.from_numpy(rng.integers(0, 256, (n, QTYPES[name].qblock_bytes), dtype=np.uint8))


def in_passes(name: str, qblocks: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(qblocks), 256)
    codec._MODULES[name].dequantize(qblocks, out)
    return out


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Numbers bit for bit; which of the many NaNs one is says nothing."""
    nan = a.isnan()
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    same = (a.view(bits) == b.view(bits)) | nan
    return torch.equal(nan, b.isnan()) and bool(same.all()) and not bool(nan.all())


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 511, 512, 1025, 4096])
@pytest.mark.parametrize("name", NAMES)
def test_bits_are_the_same(
    name: str, n: int, n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    qblocks = qblocks_of(name, n)
    out = torch.full((n, 256), 7.0)
    compiled_decoders.decode(name, qblocks, out)
    assert same_bits(out, in_passes(name, qblocks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_large_weights_are_decoded_by_them(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_rows = 2 * codec.COMPILED_FROM // 1024
    packed = qblocks_of(name, 4 * n_rows).view(n_rows, -1)
    expected = in_passes(name, packed.view(4 * n_rows, -1)).view(n_rows, 1024).to(dtype)
    monkeypatch.setattr(codec, "_MODULES", {})  # nothing else can
    found = codec.dequantize(packed, QTYPES[name], dtype)
    assert same_bits(found, expected)
    with pytest.raises(KeyError):
        codec.dequantize(packed[:1], QTYPES[name], dtype)  # not worth loading numba


def test_without_numba_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "zquant.quant.compiled_decoders")
    monkeypatch.delattr("zquant.quant.compiled_decoders")
    monkeypatch.setitem(sys.modules, "numba", None)
    assert codec.compiled_decoders.__wrapped__() is None
