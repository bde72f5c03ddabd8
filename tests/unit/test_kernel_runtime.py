"""When Triton's kernels run, and why not."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from zquant_kernels import runtime

GPU = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[int]]]:
    """A GPU of a capability whose launcher is built by a function; how often it was asked to."""
    asked: list[int] = []

    def make(capability: tuple[int, int], build: Callable[[], int]) -> list[int]:
        def current() -> int:
            asked.append(1)
            return build()

        active = SimpleNamespace(get_current_device=current)
        parts = SimpleNamespace(driver=SimpleNamespace(active=active))
        monkeypatch.setattr(runtime, "triton", SimpleNamespace(runtime=parts))
        monkeypatch.setattr(runtime, "AVAILABLE", True)
        monkeypatch.setattr(runtime, "INTERPRETED", False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GPU")
        return asked

    runtime._launcher_trouble.cache_clear()
    yield make
    runtime._launcher_trouble.cache_clear()


def test_kernels_run_where_the_launcher_is_built(card: Callable[..., list[int]]) -> None:
    asked = card((8, 6), lambda: 0)
    assert [runtime.why_not(GPU) for _ in range(3)] == [""] * 3
    assert len(asked) == 1


def test_without_a_compiler_kernels_do_not_run(card: Callable[..., list[int]]) -> None:
    def build() -> int:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    asked = card((8, 6), build)
    expected = (
        "Triton cannot build its launcher (RuntimeError: Failed to find C compiler.); it needs a "
        "C compiler and Python's headers, e.g. the packages gcc and python3-dev"
    )
    assert [runtime.why_not(GPU) for _ in range(2)] == [expected] * 2
    assert len(asked) == 1


def test_an_old_gpu_needs_no_launcher(card: Callable[..., list[int]]) -> None:
    asked = card((6, 1), lambda: 0)
    assert runtime.why_not(GPU) == (
        "Triton kernels need compute capability 7.5; 'NVIDIA GPU' has 6.1"
    )
    assert not asked
