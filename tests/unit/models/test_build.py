"""Loading is strict, and a packed weight is the stored bytes themselves."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from zquant.errors import CheckpointError
from zquant.layers.linear import QuantEmbedding, QuantLinear
from zquant.layers.norm import RMSNorm
from zquant.models.build import check_names, expand, load, on_meta, packed
from zquant.quant.codec import dequantize, quantize
from zquant.quant.qtypes import QTYPES, QType


@dataclass(frozen=True, slots=True)
class Stored:
    bytes: np.ndarray
    shape: tuple[int, ...]
    qtype: QType
    scaling: None = None

    def raw(self) -> np.ndarray:
        return self.bytes


def stored(*shape: int, qtype: str = "F32", seed: int = 0) -> Stored:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    rows = values.reshape(-1, shape[-1] if shape[-1] % QTYPES[qtype].qblock == 0 else 32)
    return Stored(quantize(rows, QTYPES[qtype]).reshape(-1), shape, QTYPES[qtype])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = QuantEmbedding(5, 64)
        self.linear = QuantLinear(64, 3, bias=True)
        self.norm = RMSNorm(3, 1e-5)
        self.conv = nn.Conv2d(4, 8, 3)
        self.token = nn.Parameter(torch.empty(1, 3))


def parts() -> dict[str, Stored]:
    return {
        "table.weight": stored(5, 64, qtype="Q8_0"),
        "linear.weight": stored(3, 64, qtype="Q4_0"),
        "linear.bias": stored(3, qtype="F16"),
        "norm.weight": stored(3, qtype="BF16"),
        "conv.weight": stored(8, 4, 3, 3, qtype="Q8_0"),
        "conv.bias": stored(8),
        "token": stored(1, 3, qtype="BF16"),
    }


def test_every_tensor_arrives() -> None:
    given = parts()
    net = load(on_meta(Net), given, label="net.gguf")
    for name in ("table.weight", "linear.weight"):
        weight = net.get_parameter(name)
        assert weight.dtype == torch.uint8
        assert weight.data_ptr() == given[name].bytes.ctypes.data, "the bytes were copied"
    assert (net.table.qtype, net.linear.qtype) == (QTYPES["Q8_0"], QTYPES["Q4_0"])
    for name in ("linear.bias", "norm.weight", "conv.weight", "conv.bias", "token"):
        parameter = net.get_parameter(name)
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, expand(given[name], torch.float32))
    assert not net.training
    assert not any(p.requires_grad or p.is_meta for p in net.parameters())


def test_floats_take_the_dtype_that_is_asked_for_and_packed_weights_do_not() -> None:
    net = load(on_meta(Net), parts(), label="net", dtype=torch.bfloat16)
    assert net.conv.weight.dtype == torch.bfloat16
    assert net.linear.weight.dtype == torch.uint8


def test_a_convolution_whose_rows_are_shorter_than_a_qblock() -> None:
    part = stored(8, 4, 3, 3, qtype="Q8_0")
    flat = torch.from_numpy(part.bytes).view(-1, QTYPES["Q8_0"].row_bytes(32))
    expected = dequantize(flat, QTYPES["Q8_0"], torch.float32).view(8, 4, 3, 3)
    assert torch.equal(expand(part, torch.float32), expected)


def test_packed_is_rows_of_stored_bytes() -> None:
    assert packed(stored(3, 64, qtype="Q4_0")).shape == (3, 36)


def test_a_missing_tensor() -> None:
    given = parts()
    del given["norm.weight"], given["conv.bias"]
    message = r"net.gguf: 2 of 7 tensors missing \(first: 'conv.bias'\).*get or convert it again"
    with pytest.raises(CheckpointError, match=message):
        load(on_meta(Net), given, label="net.gguf")


def test_an_unexpected_tensor() -> None:
    given = parts() | {"linear.lora_A.weight": stored(2, 2)}
    message = r"net.gguf: 1 unexpected tensors \(first: 'linear.lora_A.weight'\)"
    with pytest.raises(CheckpointError, match=message):
        load(on_meta(Net), given, label="net.gguf")


def test_a_tensor_that_is_known_to_be_unused() -> None:
    given = parts() | {"head.weight": stored(2, 2)}
    assert load(on_meta(Net), given, label="net", unused=("head.",)).norm.eps == 1e-5


@pytest.mark.parametrize(
    ("name", "shape"),
    [("linear.weight", (64, 3)), ("table.weight", (6, 64)), ("token", (3,)), ("conv.bias", (1, 8))],
    ids=lambda v: str(v),
)
def test_a_tensor_of_the_wrong_shape(name: str, shape: tuple[int, ...]) -> None:
    wanted = list(parts()[name].shape)
    message = rf"tensor '{name}' has shape \[{', '.join(map(str, shape))}\]; expected \["
    with pytest.raises(CheckpointError, match=message) as caught:
        check_names(on_meta(Net), parts() | {name: stored(*shape)}, "net.gguf")
    assert f"expected {wanted}" in str(caught.value)


def test_meta_modules_take_no_memory() -> None:
    assert all(p.is_meta for p in on_meta(Net).parameters())
