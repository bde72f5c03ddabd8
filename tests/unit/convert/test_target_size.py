"""`--target-size` and `--allocation`: a DiT for a number of bytes, and the same one again."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from zquant.cli.main import main
from zquant.convert import measure
from zquant.convert.execute import convert
from zquant.convert.measure import measure_losses
from zquant.convert.plan import ConvertRequest, plan_conversion
from zquant.convert.target_size import plan_to_size, sensitivity
from zquant.errors import CheckpointError, PlanError
from zquant.formats.imatrix import Imatrix, InputSums, write_imatrix
from zquant.quant.codec import dequantize, quantize
from zquant.quant.qtypes import QTYPES

OUT = "layers.0.attention.out.weight"


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """A sixth of the usual sample: quick."""
    monkeypatch.setattr(measure, "RUNS", 2)


@pytest.fixture
def all_rows(monkeypatch, few_rows):
    monkeypatch.setattr(measure, "RUNS", 10**6)


@pytest.fixture
def request_(official, tmp_path):
    return ConvertRequest(source=str(official), out=tmp_path / "out", device="cpu")


def dit(plan):
    return next(output for output in plan.outputs if output.component == "dit")


def qtypes(plan):
    return {tensor.name: tensor.qtype.name for tensor in dit(plan).tensors}


def size_of(request, qtype):
    return dit(plan_conversion(replace(request, qtype=qtype))).total_size


@pytest.mark.parametrize("policy", ["Q4_0", "Q4_K_M", "Q8_0"])
def test_the_file_has_at_most_the_size_and_promises_less_error_than_the_policy(request_, policy):
    target = size_of(request_, policy) + 64  # room for a header that says more
    sized = plan_to_size(request_, target)
    assert 0.9 * target < dit(sized.plan).total_size <= target
    assert not sized.is_widest
    assert sized.beside[policy] <= 1
    convert(sized.plan)
    assert (request_.out / "dit-mixed.gguf").stat().st_size == dit(sized.plan).total_size


def test_the_plan_is_the_same_on_every_run_and_for_any_number_of_threads(request_):
    target = size_of(request_, "Q4_K_M")
    plans = [plan_to_size(replace(request_, threads=n), target).plan for n in (1, 3)]
    assert dit(plans[0]).header == dit(plans[1]).header


def test_a_byte_less_than_the_least_is_refused_and_the_least_is_taken(request_):
    with pytest.raises(PlanError, match=r"a DiT of 100 B \(100 bytes\) was asked for") as error:
        plan_to_size(request_, 100)
    least = int(str(error.value).split("--target-size ")[1].split()[0])
    assert dit(plan_to_size(request_, least).plan).total_size == least
    with pytest.raises(PlanError, match="in its smallest qtype"):
        plan_to_size(request_, least - 1)


def test_more_than_all_there_is_takes_the_widest_and_says_so(request_, capsys):
    sized = plan_to_size(request_, 2**40)
    assert sized.is_widest
    assert set(qtypes(sized.plan).values()) == {"F32", "BF16"}
    main(["convert", request_.source, str(request_.out), "--target-size", "1TiB", "--dry-run"])
    assert "every matrix is as wide as it can be" in capsys.readouterr().err


def test_tensor_types_and_wide_tensors_stay(request_):
    fixed = replace(request_, tensor_types=(("layers[.]0[.].*out", QTYPES["BF16"]),))
    plan = plan_to_size(fixed, size_of(request_, "Q4_K_M")).plan
    base = qtypes(plan_conversion(replace(request_, qtype="Q4_K_M")))
    assert qtypes(plan)[OUT] == "BF16"
    wide = {name for name, qtype in base.items() if qtype == "F32"}
    assert {name for name in wide if qtypes(plan)[name] != "F32"} == set()


def test_a_size_with_nothing_to_choose_is_refused(request_):
    fixed = replace(request_, tensor_types=((r"\.weight$", QTYPES["BF16"]),))
    with pytest.raises(PlanError, match="no matrix of the DiT to choose for"):
        plan_to_size(fixed, 2**40)


def test_model_json_is_an_allocation_that_makes_the_same_files(request_, tmp_path, look):
    sized = plan_to_size(request_, size_of(request_, "Q4_K_M"))
    convert(sized.plan)
    again, allocation = tmp_path / "again", str(request_.out / "model.json")
    assert main(["convert", request_.source, str(again), "--allocation", allocation]) == 0
    data = [look.data_of(out / "dit-mixed.gguf") for out in (request_.out, again)]
    assert data[0] == data[1]
    said = json.loads((again / "model.json").read_text())["tensors"]["dit"]
    assert {name: entry["qtype"] for name, entry in said.items()} == qtypes(sized.plan)


def test_what_a_dry_run_prints_is_a_allocation(request_, tmp_path, capsys):
    size = str(size_of(request_, "Q4_0"))
    out = str(request_.out)
    words = ["convert", request_.source, out, "--dry-run", "--json"]
    assert main([*words, "--target-size", size]) == 0
    (tmp_path / "allocation.json").write_text(printed := capsys.readouterr().out)
    assert main([*words, "--allocation", str(tmp_path / "allocation.json")]) == 0
    assert json.loads(capsys.readouterr().out)["dit"] == json.loads(printed)["dit"]


ALLOCATIONS = {
    "{}": "holds no allocation",
    '{"vae": {"a": "F32"}}': "holds no allocation",
    '{"tensors": 3}': "holds no allocation",
    '{"dit": {}}': "holds no allocation",
    '{"dit": {"a": 8}}': "holds no allocation",
    '{"dit": {"a": "Q9_K"}}': "unknown qtype 'Q9_K'",
    '{"dit": {"a": "Q8_0"}}': "says nothing of '",
}


@pytest.mark.parametrize("text", ALLOCATIONS)
def test_what_is_no_allocation_of_this_model_is_refused(request_, tmp_path, text, capsys):
    path = tmp_path / "allocation.json"
    path.write_text(text)
    words = ["convert", request_.source, str(request_.out), "--allocation", str(path)]
    assert main(words) != 0
    assert ALLOCATIONS[text] in capsys.readouterr().err


def test_an_allocation_that_names_too_much_or_asks_too_much_is_refused(request_):
    whole = {t.name: t.qtype for t in dit(plan_conversion(request_)).tensors}
    more = replace(request_, allocation={"dit": whole | {"layers.99.w": QTYPES["F32"]}})
    with pytest.raises(PlanError, match=r"it has an unknown 'layers.99.w'"):
        plan_conversion(more)
    norm = next(name for name in whole if name.endswith("norm1.weight"))
    with pytest.raises(PlanError, match=r"gives Q8_0 to .*norm1\.weight"):
        plan_conversion(replace(request_, allocation={"dit": whole | {norm: QTYPES["Q8_0"]}}))
    with pytest.raises(ValueError, match="ask for one of the two"):
        plan_to_size(replace(request_, allocation={"dit": whole}), 2**40)


def test_a_matrix_of_few_rows_is_measured_whole(request_, all_rows):
    tensor, weights = attention_out(request_)
    error = stored(weights, "Q4_0") - weights
    found = measure_losses([tensor], [[QTYPES["Q4_0"], QTYPES["BF16"]]])[OUT]
    assert found == {"Q4_0": pytest.approx((error**2).sum() / (weights**2).sum()), "BF16": 0.0}


def test_of_many_rows_runs_in_the_middle_of_equal_shares_are_measured(request_):
    tensor, weights = attention_out(request_)
    assert len(weights) == 256
    sample = np.concatenate([weights[60:68], weights[188:196]])
    error = stored(sample, "Q4_0") - sample
    found = measure_losses([tensor], [[QTYPES["Q4_0"]]])[OUT]["Q4_0"]
    assert found == pytest.approx((error**2).sum() / (sample**2).sum())


def test_importance_weighs_the_loss(request_, tmp_path, all_rows):
    """Where only one input is ever driven, only the errors of its column count."""
    squares = np.zeros(256)
    squares[5] = 7.0
    path = tmp_path / "imatrix.gguf"
    entries = {OUT: InputSums(squares=squares, count=2.0)}
    write_imatrix(path, Imatrix(entries=entries, datasets=("test",)))
    tensor, weights = attention_out(replace(request_, imatrix=(path,)))
    found = measure_losses([tensor], [[QTYPES["Q4_0"]]])[OUT]["Q4_0"]
    error = (stored(weights, "Q4_0", tensor.importance) - weights)[:, 5]
    assert found == pytest.approx((error**2).sum() / (weights[:, 5] ** 2).sum())


def attention_out(request):
    """The tensor as it is planned to be Q4_0, and its weights in float64."""
    planned = dit(plan_conversion(replace(request, qtype="Q4_0"))).tensors
    tensor = next(t for t in planned if t.name == OUT)
    weights = torch.from_numpy(tensor.parts[0].raw().copy()).view(torch.bfloat16)
    return tensor, weights.view(tensor.shape).double().numpy()


def stored(weights, qtype, *importance):
    """What the qtype makes of the weights, float64."""
    packed = quantize(weights.astype(np.float32), QTYPES[qtype], *importance)
    return dequantize(torch.from_numpy(packed), QTYPES[qtype], torch.float32).double().numpy()


def test_a_weight_that_is_not_finite_is_refused(comfy, tmp_path, all_rows):
    tensors = load_file(comfy["dit"])
    tensors[OUT][3, 4] = float("nan")
    save_file(tensors, tmp_path / "damaged.safetensors")
    damaged = {**comfy, "dit": tmp_path / "damaged.safetensors"}
    request = ConvertRequest(out=tmp_path / "out", device="cpu", **damaged)
    with pytest.raises(CheckpointError, match=rf"tensor '{OUT}' holds NaN"):
        plan_to_size(request, 2**40)


def test_late_layers_count_more_and_refiners_less():
    def of(name):
        return sensitivity(name, 30)

    out = [of(f"layers.{i}.attention.out.weight") for i in range(30)]
    assert out[0] == 1
    assert out == sorted(out)
    assert of("noise_refiner.1.attention.out.weight") < 1
    assert of("context_refiner.1.feed_forward.w1.weight") < of("layers.0.feed_forward.w1.weight")
    assert sensitivity("layers.0.attention.out.weight", 1) == 1
