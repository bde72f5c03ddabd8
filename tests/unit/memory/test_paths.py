"""Every choice of path has its reason; torch.cuda is played by the test."""

import pytest
import torch
from zquant_kernels import runtime

from zquant.errors import DeviceError
from zquant.memory import paths as subject
from zquant.memory.device import probe
from zquant.memory.doctor import diagnose, diagnosis_text
from zquant.memory.paths import Paths, choose

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Makes kernels possible on a GPU of a capability, or impossible for a reason."""

    def make(capability: tuple[int, int], why: str = "", name: str = "NVIDIA GPU") -> None:
        monkeypatch.setattr(subject.runtime, "capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
        monkeypatch.setattr(subject.runtime, "why_not", lambda _: why)

    return make


def row(paths: Paths, family: str) -> tuple[str, str]:
    (found,) = [p for p in paths.families if p.family == family]
    return found.path, found.reason


@pytest.mark.parametrize(
    ("capability", "mode"),
    {
        (7, 5): "int8",  # Turing
        (8, 0): "exact",  # A100
        (8, 6): "int8",  # GeForce 30
        (8, 9): "int8",  # GeForce 40
        (9, 0): "exact",  # H100
        (10, 0): "exact",  # B200
        (12, 0): "int8",  # GeForce 50
    }.items(),
    ids=str,
)
def test_auto_multiplies_int8_where_it_pays(gpu, capability, mode):
    gpu(capability)
    paths = choose(GPU, torch.bfloat16)
    assert paths.compute.mode == mode
    assert "compute capability {}.{}".format(*capability) in paths.reason


@pytest.mark.parametrize("name", ["NVIDIA GeForce GTX 1650", "NVIDIA T600", "Quadro T1000"])
def test_auto_is_exact_on_turing_without_tensor_cores(gpu, name):
    gpu((7, 5), name=name)
    paths = choose(GPU, torch.float16)
    assert paths.compute.mode == "exact"
    assert paths.reason == f"'{name}' has no tensor cores for int8"


def test_auto_is_exact_where_triton_cannot_run_and_says_why(gpu):
    gpu((8, 6), "Triton cannot be imported (no module)")
    paths = choose(GPU, torch.bfloat16)
    assert paths.compute.mode == "exact"
    assert "int8 needs Triton to be fast: Triton cannot be imported" in paths.reason
    for family in ("dequantize", "linear, int8", "fused block", "VAE norm"):
        assert row(paths, family) == ("torch", "Triton cannot be imported (no module)")


def test_auto_is_exact_on_a_cpu():
    paths = choose(CPU, torch.float32)
    assert (paths.compute.mode, paths.forbidden) == ("exact", "")
    assert "'cpu'" in paths.reason


def test_what_is_asked_is_done():
    paths = choose(CPU, torch.float32, compute="int8", attention="int8")
    assert (paths.compute.int8, paths.compute.int8_attention, paths.reason) == (
        True,
        True,
        "as asked",
    )


def test_turing_finishes_torchs_integer_product_with_triton(gpu):
    gpu((7, 5))
    path, reason = row(choose(GPU, torch.float16), "linear, int8")
    assert path == "torch._int_mm, finished by Triton"
    assert "no matrix instructions for compute capability below 8.0" in reason


def test_triton_can_be_forbidden(gpu):
    gpu((8, 6))
    paths = choose(GPU, torch.bfloat16, kernels="torch")
    assert paths.forbidden == "switched off by --kernels torch"
    assert row(paths, "dequantize") == ("torch", "switched off by --kernels torch")


def test_triton_can_be_insisted_on(gpu):
    gpu((8, 6))
    assert row(choose(GPU, torch.bfloat16, kernels="triton"), "dequantize") == ("Triton", "")
    gpu((6, 1), "Triton kernels need compute capability 7.5; 'Quadro P4000' has 6.1")
    with pytest.raises(DeviceError, match=r"cannot run here: .*'Quadro P4000' has 6.1. Use"):
        choose(GPU, torch.bfloat16, kernels="triton")


@pytest.mark.parametrize("name", ["compute", "kernels", "attention"])
def test_an_unknown_choice_is_named(name):
    with pytest.raises(ValueError, match=f"{name} 'fast' is unknown; known: "):
        choose(CPU, torch.float32, **{name: "fast"})


def test_forbidden_kernels_are_not_launched_in_this_context_only():
    with runtime.forbidden("for the test"):
        assert runtime.why_not(GPU) == "for the test"
    assert runtime.why_not(CPU) != "for the test"


def test_every_fallback_has_its_reason_in_the_diagnosis():
    document = diagnose(probe("cpu", "float32", kernels="torch"))
    text = diagnosis_text(document)
    rows = {p["family"]: p for p in document["paths"]}
    assert rows["dequantize"]["reason"] == "switched off by --kernels torch"
    for p in document["paths"]:
        assert p["path"] in text
        assert p["reason"] in text
    for said in (torch.__version__, document["compute_reason"], "context_refiner"):
        assert said in text
    assert document["machine"]["gpus"] == [] or torch.cuda.is_available()
