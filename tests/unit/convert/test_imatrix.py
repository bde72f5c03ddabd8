"""`convert --imatrix`: which tensors get which importance, what is said of it, what is refused."""

import json
import pickle

import gguf
import numpy as np
import pytest
import torch

from zquant.cli.main import main
from zquant.convert import plan as planning
from zquant.convert.execute import convert
from zquant.convert.place import Place
from zquant.convert.plan import ConvertRequest, plan_conversion
from zquant.convert.slabs import slabs_of
from zquant.convert.summary import plan_rows, result_lines
from zquant.errors import CheckpointError, ZQuantError
from zquant.formats.imatrix import Imatrix, InputSums, write_imatrix
from zquant.quant.codec import dequantize, quantize
from zquant.quant.qtypes import QTYPES

QKV = "layers.0.attention.qkv.weight"
W1 = "layers.0.feed_forward.w1.weight"
OUT = "layers.0.attention.out.weight"
GATE = "blk.0.ffn_gate.weight"


def vector(n, seed=0):
    """Importance as networks have it: a few inputs are driven a thousand times as much."""
    return np.exp(np.random.default_rng(seed).normal(0, 3, n)).astype(np.float32)


@pytest.fixture(scope="module")
def plain(official, tmp_path_factory):
    """Plan without importance: names and widths."""
    out = tmp_path_factory.mktemp("plain")
    return plan_conversion(ConvertRequest(source=str(official), out=out))


@pytest.fixture(scope="module")
def widths(plain):
    return {t.name: t.shape[-1] for o in plain.outputs[:2] for t in o.tensors}


@pytest.fixture(scope="module")
def make(widths, tmp_path_factory):
    """Writes an importance file for tensors, by default under their own names."""

    def make(names, *, spelled=str, scale=1.0, count=2.0, chunks=3):
        path = tmp_path_factory.mktemp("imatrix") / "importance.gguf"
        entries = {
            spelled(name): InputSums(
                squares=vector(widths[name]).astype(np.float64) * count * scale, count=count
            )
            for name in names
        }
        write_imatrix(path, Imatrix(entries=entries, datasets=("prompts.txt",), n_chunks=chunks))
        return path

    return make


@pytest.fixture(scope="module")
def weighed(official, run, make, tmp_path_factory):
    """`official` as Q4_K_M with importance for three matrices of two networks."""
    folder = tmp_path_factory.mktemp("weighed")
    run(source=str(official), out=folder, imatrix=(make([QKV, W1, GATE]),))
    return folder


def rows_of(plan, name):
    """float32 weights of a tensor of the plan."""
    (tensor,) = (t for o in plan.outputs for t in o.tensors if t.name == name)
    parts = []
    for part in tensor.parts:
        raw = torch.from_numpy(part.raw().copy()).view(part.shape[0], -1)
        parts.append(dequantize(raw, part.qtype, torch.float32))
    return torch.cat(parts).numpy()


@pytest.mark.parametrize("name", [QKV, W1, GATE])
def test_a_tensor_is_quantized_with_its_importance(weighed, q4, plain, look, name):
    file = "text_encoder-Q4_K_M.gguf" if name == GATE else "dit-Q4_K_M.gguf"
    qtype, (_, n_columns), data = look.data_of(weighed / file)[name]
    weights = rows_of(plain, name)
    assert data == quantize(weights, QTYPES[qtype], vector(n_columns)).tobytes()
    assert data != look.data_of(q4 / file)[name][2]


def test_tensors_without_importance_stay_what_they_are(weighed, q4, look):
    found, before = (look.data_of(folder / "dit-Q4_K_M.gguf") for folder in (weighed, q4))
    assert {name for name in found if found[name] != before[name]} == {QKV, W1}


def test_errors_are_told_with_and_without_importance(weighed, plain, look):
    manifest = json.loads((weighed / "model.json").read_text())
    reported = manifest["tensors"]["dit"]
    assert [n for n, t in reported.items() if "weighted_rms_error" in t] == [QKV, W1]
    weights = rows_of(plain, W1).astype(np.float64)
    qtype, shape, data = look.data_of(weighed / "dit-Q4_K_M.gguf")[W1]
    packed = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(shape[0], -1)
    errors = dequantize(packed, QTYPES[qtype], torch.float32).double().numpy() - weights
    by_input = vector(shape[1]).astype(np.float64)
    expected = np.sqrt((errors**2 * by_input).sum() / (weights**2 * by_input).sum())
    assert reported[W1]["weighted_rms_error"] == pytest.approx(expected, rel=1e-4)
    # that is what importance is for
    assert reported[W1]["weighted_rms_error"] < reported[W1]["relative_rms_error"]


def test_both_errors_are_shown(run, official, make, tmp_path):
    result = run(source=str(official), out=tmp_path, imatrix=(make([QKV]),))
    dit, encoder = list(result_lines(result))[:2]
    of_qkv = result.manifest["tensors"]["dit"][QKV]
    shown = f"; weighted by importance: Q5_K {100 * of_qkv['weighted_rms_error']:.3f} %"
    assert dit.endswith(shown)
    assert "; mean relative RMS error: Q4_K " in dit
    assert "weighted" not in encoder


def test_headers_and_model_json_name_the_importance_file(weighed, q4):
    manifest = json.loads((weighed / "model.json").read_text())
    digests = {}
    for part, n in (("dit", 2), ("text_encoder", 1)):
        (entry,) = manifest["files"][part]["imatrix"]
        assert entry["name"] == "importance.gguf"
        reader = gguf.GGUFReader(weighed / f"{part}-Q4_K_M.gguf")
        found = {k: f.contents() for k, f in reader.fields.items() if "imatrix" in k}
        assert found == {
            "quantize.imatrix.file": "importance.gguf",
            "quantize.imatrix.dataset": "prompts.txt",
            "quantize.imatrix.entries_count": n,
            "quantize.imatrix.chunks_count": 3,
            "zquant.imatrix.sha256": [entry["sha256"]],
        }
        digests[part] = entry["sha256"]
    assert len(set(digests.values())) == 1
    assert "imatrix" not in manifest["files"]["vae"]
    assert b"imatrix" not in (q4 / "dit-Q4_K_M.gguf").read_bytes()[:4096]


def plan(official, tmp_path, *files, **fields):
    request = ConvertRequest(source=str(official), out=tmp_path / "out", imatrix=files, **fields)
    return plan_conversion(request)


def importance(plan, name):
    (found,) = (t.importance for o in plan.outputs for t in o.tensors if t.name == name)
    return found


@pytest.mark.parametrize(
    "spelled",
    [
        lambda name: f"model.diffusion_model.{name}",
        lambda name: name.replace("attention.qkv", "attention.to_v"),
        lambda name: "model.diffusion_model." + name.replace("attention.qkv", "attention.to_q"),
    ],
    ids=["prefixed", "split", "both"],
)
def test_other_spellings_of_a_name_are_found(official, make, tmp_path, spelled):
    found = importance(plan(official, tmp_path, make([QKV], spelled=spelled)), QKV)
    np.testing.assert_array_equal(found, vector(len(found)))


def test_several_files_are_one_sample(official, make, tmp_path):
    files = make([QKV, GATE], count=1.0), make([QKV], scale=5.0, count=3.0)
    found = plan(official, tmp_path, *files)
    n = len(importance(found, QKV))
    np.testing.assert_allclose(importance(found, QKV), vector(n) * (1 + 5 * 3) / 4, rtol=1e-6)
    assert [len(output.imatrix) for output in found.outputs] == [2, 1, 0]


def test_importance_of_nothing_is_none(official, make, tmp_path):
    found = plan(official, tmp_path, make([QKV], scale=0.0), make([W1]))
    assert importance(found, QKV) is None
    assert importance(found, W1) is not None


def test_the_plan_says_what_has_no_importance(official, make, tmp_path):
    found = plan(official, tmp_path, make([QKV, W1]))
    lacking = found.outputs[0].unweighed
    assert OUT in lacking
    assert QKV not in lacking
    assert not {n for n in lacking if "norm" in n or "adaLN" in n}  # floats, and Q8_0
    (line,) = (row for row in plan_rows(found) if "importance" in row)
    assert line == (
        f"dit-Q4_K_M.gguf: importance from importance.gguf for 2 tensors; {len(lacking)} without "
        f"(first: {lacking[0]})"
    )


def test_a_slab_takes_its_importance_to_another_process(official, make, tmp_path):
    output = plan(official, tmp_path, make([QKV])).outputs[0]
    slabs = [slab for slab in slabs_of(output.tensors) if slab.name == QKV]
    assert len(slabs) == 3  # q, k and v share an input
    for slab in slabs:
        there = pickle.loads(pickle.dumps(slab))
        np.testing.assert_array_equal(there.importance, vector(slab.part.shape[1]))


def test_importance_is_weighed_on_the_cpu_and_said_so(official, make, tmp_path, monkeypatch):
    gpu = Place(torch.device("cuda"), "a GPU", "")
    monkeypatch.setattr(planning, "choose_place", lambda _: gpu)
    assert plan(official, tmp_path).place == gpu
    place = plan(official, tmp_path, make([QKV])).place
    assert place.gpu is None
    assert place.summary == "quantizing on the CPU (importance is weighed there only)"


def test_another_importance_is_another_conversion(official, make, tmp_path):
    plans = [plan(official, tmp_path, make([QKV], chunks=n), make([W1])) for n in (1, 1, 2)]
    dits = [each.outputs[0].fingerprint for each in plans]
    encoders = [each.outputs[1].fingerprint for each in plans]
    assert dits[0] == dits[1] != dits[2]
    assert len(set(encoders)) == 1  # it has none of these, and may be resumed


def test_a_resumed_run_needs_the_same_importance(official, make, tmp_path, monkeypatch):
    first = plan(official, tmp_path, make([QKV]))
    monkeypatch.setattr("zquant.convert.execute.publish", lambda *_: None)
    convert(first)
    with pytest.raises(ZQuantError, match="with other options"):
        convert(plan(official, tmp_path, make([W1]), resume=True))


def test_the_width_must_be_the_models(official, make, widths, tmp_path, monkeypatch):
    monkeypatch.setitem(widths, QKV, 96)
    message = rf"has 96 inputs of '{QKV}', expected 256\. It was made for another model"
    with pytest.raises(CheckpointError, match=message):
        plan(official, tmp_path, make([QKV]))


def test_a_file_that_helps_nothing_is_refused(official, make, tmp_path):
    message = "has none of the .* its names look like 'other'.*Make one for this model"
    with pytest.raises(CheckpointError, match=message):
        plan(official, tmp_path, make([QKV]), make([W1], spelled=lambda _: "other"))
    with pytest.raises(CheckpointError, match=r"Q8_0 have no use for it\. Choose another --qtype"):
        plan(official, tmp_path, make([QKV]), qtype="Q8_0")


def test_the_command_takes_several_files(official, make, tmp_path, capsys):
    files = [word for name in (QKV, GATE) for word in ("--imatrix", str(make([name])))]
    assert main(["convert", str(official), str(tmp_path / "out"), *files, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "dit-Q4_K_M.gguf: importance from importance.gguf for 1 tensors" in out
    assert "text_encoder-Q4_K_M.gguf: importance from importance.gguf for 1 tensors" in out
