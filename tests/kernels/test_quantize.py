"""Bytes quantized by kernels equal ggml's, and those of `zquant.quant`, on any finite weights."""

from functools import cache
from importlib import import_module
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from zquant_kernels import quantize_offset, runtime
from zquant_kernels.quantize import QTYPES, quantize
from zquant_kernels.runtime import tl, triton

from tests.kernels.kernel_testing import DEVICE, guarded, needs_launch
from zquant.convert import plan, slabs
from zquant.convert.execute import convert
from zquant.convert.place import Place
from zquant.quant import qtypes

# numpy's, of the interpreter: overflow and 0/0 are part of the searches
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "ggml-golden.npz")
GOLDEN_SETS = sorted(k.removeprefix("input/") for k in GOLDEN.files if k.startswith("input/"))
by_qtype = pytest.mark.parametrize("qtype", QTYPES)
ROWS = 8  # of every kind of weights


def on_cpu(qtype: str):
    """The module of `zquant.quant`."""
    return import_module(f"zquant.quant.{qtype.lower()}")


def on_device(weights: np.ndarray, qtype: str) -> np.ndarray:
    """Bytes by the kernel, which reads and writes between guard bands."""
    form = qtypes.QTYPES[qtype]
    shape = (len(weights), form.row_bytes(weights.shape[1]))
    x = guarded(torch.from_numpy(weights).to(DEVICE))
    out = guarded(torch.full(shape, 0xFF, dtype=torch.uint8, device=DEVICE))
    with mock.patch.object(torch, "empty", return_value=out.tensor):
        assert quantize(x.tensor, qtype) is out.tensor
    x.check()
    out.check()
    return out.tensor.cpu().numpy()


def kinds() -> dict[str, np.ndarray]:
    """Kinds of weights that searches treat differently, float32 `[ROWS, 256]` each."""
    rng = np.random.default_rng(0)
    shape = (ROWS, 256)
    gauss = rng.standard_normal(shape)
    bounded = rng.uniform(-1, 1, shape)
    powers = {
        f"magnitude 1e{p}": bounded * 10.0**p for p in (-45, -40, -38, -37, -36, -20, -14, -8, -7)
    }
    found = {
        "gauss": gauss * 0.02,
        "bfloat16": torch.from_numpy(gauss).bfloat16().double().numpy(),
        "heavy tails": rng.standard_t(2, shape),
        "one huge outlier": np.where(np.arange(256) == 77, 1e4, gauss),
        "sparse": np.where(rng.random(shape) < 0.05, gauss, 0),
        "zeros": np.zeros(shape),
        "zeros of both signs": np.where(gauss > 0, 0.0, -0.0),
        "constant": np.repeat(gauss[:, :1], 256, 1),
        "constant sub-blocks": np.repeat(gauss[:, ::16], 16, 1),
        "nearly constant": 1 + 1e-7 * gauss,
        "positive": np.abs(gauss) + 5,
        "negative": -np.abs(gauss) - 5,
        "ties of magnitude": np.where(gauss > 0, 1.0, -1.0),
        "small integers": np.round(3 * gauss),
        "all magnitudes": np.sign(gauss) * 10.0 ** rng.uniform(-9, 1, shape),
        # a sub-block whose stored scale is 0 keeps the levels of its search
        "lost sub-blocks": gauss * np.repeat(10.0 ** rng.uniform(-9, 1, (ROWS, 16)), 16, 1),
        "lost and subnormal": bounded * np.repeat(10.0 ** rng.uniform(-46, -3, (ROWS, 8)), 32, 1),
        **powers,
        "magnitude 1e6": bounded * 1e6,
    }
    return {name: weights.astype(np.float32) for name, weights in found.items()}


def too_large() -> np.ndarray:
    """Sub-blocks of which many have no float16 scale, float32 `[64, 256]`."""
    rng = np.random.default_rng(1)
    magnitudes = 10.0 ** np.repeat(rng.uniform(0, 37, (64, 8)), 32, 1)
    return (rng.standard_normal((64, 256)) * magnitudes).astype(np.float32)


@cache
def packed(qtype: str) -> list[np.ndarray]:
    """Bytes from one launch, which is what costs time under the interpreter.

    One array for each golden set, then for each of `kinds()`, then of `too_large()`.
    """
    golden = [GOLDEN[f"input/{name}"].reshape(-1, 256) for name in GOLDEN_SETS]
    parts = [*golden, *kinds().values(), too_large()]
    together = on_device(np.concatenate(parts), qtype)
    return np.split(together, np.cumsum([len(part) for part in parts])[:-1])


@needs_launch
@pytest.mark.parametrize("name", GOLDEN_SETS)
@by_qtype
def test_bytes_equal_ggml(qtype, name):
    ours = packed(qtype)[GOLDEN_SETS.index(name)]
    expected = GOLDEN[f"bytes/{qtype}/{name}"]
    np.testing.assert_array_equal(ours.reshape(expected.shape), expected)


@needs_launch
@pytest.mark.parametrize("kind", kinds())
@by_qtype
def test_bytes_equal_the_cpu(qtype, kind):
    ours = packed(qtype)[len(GOLDEN_SETS) + list(kinds()).index(kind)]
    np.testing.assert_array_equal(ours, on_cpu(qtype).quantize(kinds()[kind]))


@needs_launch
@by_qtype
def test_weights_too_large_are_not_finite_when_decoded_as_on_the_cpu(qtype):
    """That is how a conversion notices them; what the other bytes are does not matter."""
    finite = []
    for stored in (packed(qtype)[-1], on_cpu(qtype).quantize(too_large())):
        qblocks = torch.from_numpy(stored.copy()).view(-1, qtypes.QTYPES[qtype].qblock_bytes)
        decoded = torch.empty(len(qblocks), qtypes.QTYPES[qtype].qblock)
        on_cpu(qtype).dequantize(qblocks, decoded)
        finite.append(decoded.isfinite().all(dim=1))
    assert not finite[1].all()
    assert torch.equal(*finite)


@needs_launch
@pytest.mark.parametrize(
    ("qtype", "rows"),
    # Q4_K and Q5_K share a kernel, a slow one under the interpreter
    [("Q5_K", 1), *((q, n) for q in QTYPES if q not in ("Q4_K", "Q5_K") for n in (1, 33))],
)
def test_few_qblocks_equal_the_cpu(qtype, rows):
    shape = (rows, qtypes.QTYPES[qtype].qblock)
    weights = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    np.testing.assert_array_equal(on_device(weights, qtype), on_cpu(qtype).quantize(weights))


@needs_launch
@pytest.mark.parametrize("qtype", ["Q8_0", "Q6_K"])
def test_rows_beyond_one_program_come_out_like_the_first(qtype):
    """More qblocks than any program handles, and not a multiple of it."""
    n_columns = 5 * qtypes.QTYPES[qtype].qblock
    weights = np.random.default_rng(3).standard_normal((211, n_columns)).astype(np.float32)
    np.testing.assert_array_equal(on_device(weights, qtype), on_cpu(qtype).quantize(weights))


@needs_launch
@pytest.mark.parametrize("qtype", ["Q5_0", "Q4_0"])
def test_the_scale_of_zeros_is_ggmls_whatever_the_sign_of_the_first(qtype):
    weights = torch.zeros(2, 32, device=DEVICE)
    weights[1, 0] = -0.0
    assert quantize(weights, qtype)[:, :2].tolist() == [[0, 0x80]] * 2


@triton.jit
def store_six_bit(values, half, multiples, ROWS: tl.constexpr):
    i, k = tl.arange(0, ROWS), tl.arange(0, 8)
    at = i[:, None] * 8 + k[None, :]
    d, m = quantize_offset.six_bit(tl.load(values + at))
    tl.store(half + i, d)
    tl.store(multiples + at, m)


@needs_launch
def test_a_negative_multiple_wraps_in_a_byte_and_an_overflowing_inverse_gives_none():
    rows = [
        [63.0, 1.0, -1.0, -193.0, -200.0, 0.5, 1.5, -0.0],  # ties go to the even neighbour
        [0.0, -1.0, -0.0, 0.0, 0.0, 0.0, 0.0, -5.0],
        [1e-40, 1e-41, 0.0, -1e-40, 1e-42, 1e-45, 0.0, 0.0],
    ]
    values = torch.tensor([*rows, rows[0]], device=DEVICE)
    half = torch.empty(4, dtype=torch.float16, device=DEVICE)
    multiples = torch.empty(4, 8, dtype=torch.int32, device=DEVICE)
    store_six_bit[(1,)](values, half, multiples, ROWS=4, enable_fp_fusion=False)
    assert half.view(torch.int16).tolist() == [0x3C00, 0, 0, 0x3C00]
    assert multiples[0].tolist() == [63, 1, 63, 63, 56, 0, 2, 0]
    assert not multiples[1:3].any()


@needs_launch
@by_qtype
def test_no_rows_give_no_bytes(qtype):
    form = qtypes.QTYPES[qtype]
    packed = quantize(torch.empty(0, 3 * form.qblock, device=DEVICE), qtype)
    assert packed.shape == (0, 3 * form.qblock_bytes)


@needs_launch
def test_a_conversion_by_kernels_writes_the_files_of_the_cpu(tmp_path, monkeypatch):
    """One tensor of every type but the source's, so that it takes seconds if interpreted."""
    tensors = {"attn_q": "Q4_K", "attn_k": "Q5_K", "attn_v": "Q6_K", "ffn_up": "Q5_0"}
    tensors["ffn_down"] = "Q4_0"
    types = [(rf"blk\.0\.{name}\.", qtypes.QTYPES[q]) for name, q in tensors.items()]
    request = {"source": "demo", "allow_requantize": True, "tensor_types": tuple(types)}
    request |= {"qtype": "BF16", "threads": 2}
    files, launched = [], set()

    def spy(weights, qtype):
        launched.add(qtype)
        return quantize(weights, qtype)

    monkeypatch.setattr(slabs.kernels, "quantize", spy)
    for place in (Place(None, "the CPU", ""), Place(DEVICE, "here", "")):
        monkeypatch.setattr(plan, "choose_place", lambda _, place=place: place)
        out = tmp_path / place.name
        convert(plan.plan_conversion(plan.ConvertRequest(**request, out=out)))
        files.append({f.name: f.read_bytes() for f in out.iterdir() if f.name != "model.json"})
        assert launched == (set(tensors.values()) if place.gpu else set())
    assert len(files[0]) == 3
    assert files[0] == files[1]


def test_types_without_a_kernel_are_known():
    quantized = {name for name, q in qtypes.QTYPES.items() if not q.is_float}
    on_a_cpu = {"Q4_1", "Q5_1", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS"}
    assert set(QTYPES) == quantized - on_a_cpu


@pytest.mark.parametrize(
    ("weights", "qtype", "message"),
    [
        (torch.zeros(2, 256), "Q2_K", "Q8_0, .*, not 'Q2_K'"),
        (torch.zeros(2, 256, dtype=torch.float16), "Q4_K", r"float32 \[N, 256 \* n\] for Q4_K"),
        (torch.zeros(2, 288), "Q6_K", r"got torch.float32 \[2, 288\]"),
        (torch.zeros(256), "Q8_0", r"float32 \[N, 32 \* n\]"),
        (torch.zeros(32, 4).t(), "Q8_0", r"strides are \(1, 4\)"),
    ],
    ids=["qtype", "dtype", "columns", "dimensions", "strides"],
)
def test_what_the_kernels_cannot_take_is_refused(weights, qtype, message):
    with pytest.raises(ValueError, match=message):
        quantize(weights, qtype)


def test_there_is_no_reference_to_fall_back_to():
    with runtime.forbidden("not today"), pytest.raises(RuntimeError, match="run: not today"):
        quantize(torch.zeros(1, 32), "Q8_0")
