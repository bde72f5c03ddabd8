"""What the NVIDIA driver answers, and the reason why torch sees no card beside it."""

import os
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch

from zquant.memory import driver

MIB = 2**20
Played = Callable[..., None]


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch) -> Played:
    """Makes the driver's tool answer, fail, or be absent (None)."""

    def play(output: str | Exception | None) -> None:
        def run(command: list[str], **_: Any) -> Any:
            if isinstance(output, Exception):
                raise output
            return subprocess.CompletedProcess(command, 0, output)

        monkeypatch.setattr(driver.shutil, "which", lambda _: None if output is None else "smi")
        monkeypatch.setattr(driver.subprocess, "run", run)

    return play


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Played:
    """Makes torch a build for this CUDA that sees no device."""

    def play(cuda: str | None, *, loads: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch, "__version__", "2.13.0")
        monkeypatch.setattr(driver, "_loads", lambda _: loads)
        monkeypatch.delenv(driver.HIDES, raising=False)

    return play


def test_the_driver_counts_the_process(smi: Played) -> None:
    pid = os.getpid()
    for output, n_bytes in (
        (f"1, 700\n{pid}, 512\n", 512 * MIB),
        ("1, 700\n", None),
        (f"{pid}, [N/A]\n", None),
        (subprocess.TimeoutExpired("nvidia-smi", 10), None),
        (None, None),
    ):
        smi(output)
        assert driver.process_vram_bytes() == n_bytes, output


def test_the_driver_tells_its_version(smi: Played) -> None:
    for output, version in (("580.65.06\n580.65.06\n", "580.65.06"), ("", None), (None, None)):
        smi(output)
        assert driver.driver_version() == version
    smi(subprocess.CalledProcessError(9, "nvidia-smi"))
    assert driver.driver_version() is None


def test_a_torch_without_cuda_beside_a_driver_says_what_to_install(
    smi: Played, build: Played
) -> None:
    smi("580.65.06\n")
    build(None)
    assert driver.why_no_gpu() == (
        "this PyTorch, 2.13.0, has no CUDA: pip install --force-reinstall torch --index-url "
        "https://download.pytorch.org/whl/cu130"
    )
    smi(None)
    build(None, loads=True)
    assert "has no CUDA" in driver.why_no_gpu()


def test_a_driver_too_old_for_torch_is_to_be_updated(smi: Played, build: Played) -> None:
    smi("470.42.01\n")
    build("13.0")
    assert driver.why_no_gpu() == (
        "PyTorch 2.13.0, for CUDA 13.0, finds no card through the NVIDIA driver 470.42.01: update "
        "the driver and restart"
    )


def test_a_card_that_the_user_hides_is_told(
    smi: Played, build: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi("580.65.06\n")
    build("13.0")
    monkeypatch.setenv(driver.HIDES, "")
    assert driver.why_no_gpu() == "CUDA_VISIBLE_DEVICES is '', which may hide the card: unset it"
    monkeypatch.setenv(driver.HIDES, "0")
    assert "update the driver" in driver.why_no_gpu()


def test_nothing_is_said_without_a_driver_and_nothing_is_asked_beside_a_gpu(
    smi: Played, build: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi(None)
    build("13.0")
    assert driver.why_no_gpu() == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(driver, "driver_version", lambda: pytest.fail("asked"))
    monkeypatch.setattr(driver, "_loads", lambda _: pytest.fail("loaded"))
    assert driver.why_no_gpu() == ""


def test_a_library_that_is_absent_does_not_load() -> None:
    assert not driver._loads("libzquant-has-no-such.so.1")
