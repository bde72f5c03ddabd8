"""The device and the dtype are chosen for a reason; torch.cuda is played by the test."""

from collections.abc import Callable

import pytest
import torch

from zquant.errors import DeviceError, PlanError
from zquant.memory import device as subject
from zquant.memory.device import peak_host_bytes, probe
from zquant.memory.doctor import diagnose, diagnosis_text

Gpus = Callable[..., None]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """Makes torch see GPUs of these compute capabilities."""

    current: list[torch.device] = []

    def make(*capabilities: tuple[int, int]) -> None:
        for name, value in {
            "is_available": lambda: bool(capabilities),
            "device_count": lambda: len(capabilities),
            "get_device_capability": lambda d: capabilities[d.index],
            "get_device_name": lambda d: f"GPU {d.index}",
            "set_device": current.append,
            "reset_peak_memory_stats": lambda device: current.remove(device),
            "max_memory_reserved": lambda _: 5,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    return make


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Makes this CPU multiply bfloat16 so many times as fast as float32."""

    def make(ratio: float) -> None:
        seconds = {torch.float32: 1.0, torch.bfloat16: 1 / ratio}
        monkeypatch.setattr(subject, "_matmul_seconds", seconds.__getitem__)

    return make


def test_auto_is_the_first_gpu(gpus: Gpus) -> None:
    gpus((8, 9), (7, 5))
    chosen = probe()
    assert chosen.torch_device == torch.device("cuda", 0)
    assert (chosen.name, chosen.is_cuda, chosen.peak_vram_bytes()) == ("GPU 0", True, 5)


def test_auto_is_the_cpu_without_a_gpu(gpus: Gpus) -> None:
    gpus()
    chosen = probe(compute_dtype="float32")
    assert chosen.torch_device == torch.device("cpu")
    assert chosen.name.startswith("CPU, ")
    assert not chosen.is_cuda
    assert chosen.peak_vram_bytes() is None


def test_cuda_is_the_first_and_a_number_picks_another(gpus: Gpus) -> None:
    gpus((8, 0), (8, 6))
    assert probe("cuda").torch_device.index == 0
    assert probe("cuda:1").torch_device.index == 1


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((6, 1), torch.float32),
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((8, 9), torch.bfloat16),
        ((12, 0), torch.bfloat16),
    ],
    ids=str,
)
def test_auto_dtype_is_what_the_gpu_multiplies(
    gpus: Gpus, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    gpus(capability)
    chosen = probe("cuda")
    assert chosen.compute_dtype == dtype
    assert chosen.reason.startswith("compute capability {}.{} multiplies".format(*capability))


@pytest.mark.parametrize(
    ("ratio", "dtype"), [(0.2, torch.float32), (1.4, torch.float32), (4.0, torch.bfloat16)]
)
def test_auto_dtype_of_a_cpu_is_measured(
    gpus: Gpus, speeds: Callable[[float], None], ratio: float, dtype: torch.dtype
) -> None:
    gpus()
    speeds(ratio)
    chosen = probe()
    assert chosen.compute_dtype == dtype
    assert f"at {ratio:.2f} times the float32 rate" in chosen.reason


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_dtype_that_is_asked_for_is_taken(dtype: str) -> None:
    chosen = probe("cpu", dtype)
    assert chosen.compute_dtype == getattr(torch, dtype)
    assert chosen.reason == "as asked"


def test_float16_does_not_reach_the_autoencoder() -> None:
    assert probe("cpu", "float16").vae_dtype == torch.float32
    assert probe("cpu", "bfloat16").vae_dtype == torch.bfloat16
    assert probe("cpu", "float32").vae_dtype == torch.float32


@pytest.mark.parametrize(
    "name", ["tpu", "", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "CUDA", "cuda:٣"]
)
def test_unknown_device(gpus: Gpus, name: str) -> None:
    gpus((8, 0))
    with pytest.raises(DeviceError, match=r"is unknown\. Use auto, cpu, cuda or cuda:0"):
        probe(name)


def test_cuda_without_a_gpu(gpus: Gpus) -> None:
    gpus()
    with pytest.raises(
        DeviceError, match=r"'cuda' is not there: .* no CUDA device\. Use --device cpu"
    ):
        probe("cuda")


def test_a_gpu_that_is_not_there(gpus: Gpus) -> None:
    gpus((8, 0))
    with pytest.raises(DeviceError, match=r"'cuda:1' is not there: .* one CUDA device, cuda:0"):
        probe("cuda:1")
    gpus((8, 0), (8, 0))
    with pytest.raises(DeviceError, match=r"'cuda:9999' is not there: .* devices 0 to 1\. Use one"):
        probe("cuda:9999")


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="'int8' is unknown; known: auto, bfloat16, float16, floa"):
        probe("cpu", "int8")


@pytest.fixture
def idle(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that torch does not see."""
    gpus()
    monkeypatch.setattr(subject, "why_no_gpu", lambda: "this PyTorch has no CUDA: install it")


@pytest.mark.usefixtures("idle")
def test_a_card_that_is_not_used_is_told_where_auto_is_the_cpu() -> None:
    chosen = probe(compute_dtype="float32")
    assert not chosen.is_cuda
    assert chosen.summary.endswith("; no GPU: this PyTorch has no CUDA: install it")
    document = diagnose(chosen)
    assert document["no_gpu_reason"] == chosen.no_gpu
    assert "\nno gpu   this PyTorch has no CUDA: install it\n" in diagnosis_text(document)
    assert "no GPU" not in probe("cpu", "float32").summary  # as asked


@pytest.mark.usefixtures("idle")
def test_a_card_that_is_asked_for_and_not_seen_has_its_reason() -> None:
    with pytest.raises(
        DeviceError, match=r"Use --device cpu; this PyTorch has no CUDA: install it$"
    ):
        probe("cuda")


def test_a_full_card_is_one_message(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: torch.device) -> None:
        raise torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be")

    gpus((8, 6))
    monkeypatch.setattr(torch.cuda, "set_device", full)
    with pytest.raises(PlanError, match=r"out of memory\)\. Close programs that use the GPU"):
        probe()


def test_peak_host_memory_is_at_least_what_torch_takes() -> None:
    peak = peak_host_bytes()
    assert peak is not None
    assert 2**26 < peak < 2**40
