"""Where a conversion quantizes: chosen and said, and the same bytes on a GPU, played by the CPU."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from zquant.cli.main import main
from zquant.convert import place as module
from zquant.convert import plan, slabs, workers
from zquant.convert.place import Place, choose_place
from zquant.convert.plan import ConvertRequest, plan_conversion
from zquant.convert.summary import plan_rows, result_lines
from zquant.errors import CheckpointError, DeviceError, PlanError
from zquant.quant.codec import quantize
from zquant.quant.qtypes import QTYPES

OLD = "Triton kernels need compute capability 7.5; 'Quadro P4000' has 6.1"


@pytest.fixture
def gpu(monkeypatch):
    """Sets what `choose_place` finds: a GPU with this name, and why kernels cannot run there."""

    def found(name, why=""):
        device = SimpleNamespace(is_cuda=True, torch_device=torch.device("cuda", 0), name=name)
        monkeypatch.setattr(module, "probe", lambda *_: device)
        monkeypatch.setattr(module, "why_not", lambda _: why)

    return found


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "why_not", lambda device: f"this is '{device.type}'")


@pytest.fixture
def played(monkeypatch):
    """Every conversion has a GPU, which is the CPU's quantizer; lists what was quantized there."""
    seen = []

    def quantized(weights, name):
        seen.append((name, len(weights), os.getpid()))
        return torch.from_numpy(quantize(weights.numpy(), QTYPES[name]))

    place = Place(torch.device("cpu"), "Toy 1", "")
    monkeypatch.setattr(plan, "choose_place", lambda _: place)
    monkeypatch.setattr(slabs.kernels, "quantize", quantized)
    return seen


def test_a_gpu_is_taken_where_kernels_run(gpu):
    gpu("Toy 1")
    for device, said in [
        ("auto", "quantizing on Toy 1"),
        ("cuda", "quantizing on Toy 1 (as asked)"),
    ]:
        place = choose_place(device)
        assert place.gpu == torch.device("cuda", 0)
        assert place.summary == said


def test_where_kernels_cannot_run_the_reason_is_kept_or_the_choice_refused(gpu):
    gpu("Quadro P4000", OLD)
    place = choose_place("auto")
    assert place.gpu is None
    assert place.summary == f"quantizing on the CPU ({OLD})"
    message = f"--device cuda cannot quantize: {OLD}. Use --device cpu, which writes the same bytes"
    with pytest.raises(DeviceError, match=message):
        choose_place("cuda")


def test_without_a_gpu(no_gpu):
    assert choose_place("auto").summary == "quantizing on the CPU (this is 'cpu')"
    assert choose_place("cpu").summary == "quantizing on the CPU (as asked)"
    with pytest.raises(DeviceError, match=r"'cuda' is not there: .* no CUDA device"):
        choose_place("cuda")


def test_the_plan_and_the_result_say_where(official, run, tmp_path, no_gpu):
    request = {"source": str(official), "qtype": "BF16", "device": "cpu"}
    rows = list(plan_rows(plan_conversion(ConvertRequest(**request, out=tmp_path))))
    assert "quantizing on the CPU (as asked)" in rows
    assert list(result_lines(run(**request, out=tmp_path)))[-2].startswith("done in ")
    assert " on the CPU: " in list(result_lines(run(**request, out=tmp_path)))[-2]


def test_the_command_refuses_before_it_writes_and_says_where_beside_json(
    official, tmp_path, capsys, no_gpu
):
    command = ["convert", str(official), str(tmp_path / "out"), "--qtype", "BF16"]
    assert main([*command, "--device", "cuda"]) == 1
    assert "zquant: error: device 'cuda' is not there" in capsys.readouterr().err
    assert main([*command, "--device", "gpu"]) == 1
    assert "device 'gpu' is unknown. Use auto, cpu, cuda or cuda:0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "quantizing on the CPU (this is 'cpu')\n"
    assert json.loads(out)["files"]


def test_a_gpu_writes_the_bytes_of_the_cpu(official, q4, run, look, tmp_path, played, monkeypatch):
    monkeypatch.setattr(workers, "WORTH_PROCESSES", 1)  # a GPU leaves no searches to processes
    result = run(source=str(official), out=tmp_path, threads=3)
    ours, theirs = look.contents(tmp_path), look.contents(q4)
    manifests = [json.loads(files.pop("model.json"))["tensors"] for files in (ours, theirs)]
    assert ours == theirs
    for component, tensors in manifests[1].items():
        for name, expected in tensors.items():
            error = manifests[0][component][name]["relative_rms_error"]
            # the same sum in another order
            assert error == pytest.approx(expected["relative_rms_error"], rel=1e-5)
    assert {process for _, _, process in played} == {os.getpid()}
    stored = {t["qtype"] for tensors in manifests[0].values() for t in tensors.values()}
    assert {name for name, _, _ in played} == stored - {"F32", "BF16"}
    assert any(" on Toy 1: " in line for line in result_lines(result))


def test_what_is_not_quantized_stays_on_the_cpu(official, q4, run, look, tmp_path, played):
    run(source=str(official), out=tmp_path / "bf16", qtype="BF16")
    dit = {"dit": q4 / "dit-Q4_K_M.gguf", "text_encoder": q4 / "text_encoder-Q4_K_M.gguf"}
    request = {**dit, "vae": q4 / "vae.safetensors", "allow_requantize": True}
    run(**request, out=tmp_path / "again")
    assert played == []
    assert look.data_of(tmp_path / "again" / "dit-Q4_K_M.gguf") == look.data_of(dit["dit"])


def test_a_conversion_begun_on_the_cpu_is_finished_on_a_gpu(
    official, q4, run, look, tmp_path, played, monkeypatch
):
    def stop(*_):
        if len(played) == 5:
            raise KeyboardInterrupt
        return on_gpu(*_)

    on_gpu = slabs.kernels.quantize
    with monkeypatch.context() as patch:
        patch.setattr(slabs.kernels, "quantize", stop)
        with pytest.raises(KeyboardInterrupt):
            run(source=str(official), out=tmp_path, threads=1)
    with monkeypatch.context() as patch:
        patch.setattr(plan, "choose_place", choose_place)
        run(source=str(official), out=tmp_path, threads=1, resume=True, device="cpu")
    assert len(played) == 5
    ours, theirs = look.contents(tmp_path), look.contents(q4)
    del ours["model.json"], theirs["model.json"]
    assert ours == theirs


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (float("nan"), CheckpointError, r"'layers.0.attention.out.weight' holds nan \(row 200, "),
        (1e36, PlanError, r"'layers.0.attention.out.weight' holds a weight of 1e\+36, too large"),
    ],
    ids=["nan", "too large"],
)
def test_a_gpu_names_weights_that_cannot_be_stored(
    value, error, message, comfy, run, tmp_path, played, monkeypatch
):
    monkeypatch.setattr(slabs, "SLAB_WEIGHTS", 2**14)
    tensors = load_file(comfy["dit"])
    tensors["layers.0.attention.out.weight"][200, 17] = value
    save_file(tensors, tmp_path / "spoilt.safetensors")
    with pytest.raises(error, match=message):
        run(**{**comfy, "dit": tmp_path / "spoilt.safetensors"}, out=tmp_path / "out")


def test_a_full_gpu_is_one_message(official, run, tmp_path, played, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(slabs.kernels, "quantize", full)
    with pytest.raises(DeviceError, match=r"no memory left on cpu for .* --device cpu --resume"):
        run(source=str(official), out=tmp_path)
