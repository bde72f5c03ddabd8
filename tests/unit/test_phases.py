"""What phases ask of a GPU, with a GPU that is played."""

from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import zquant
from zquant import phases
from zquant.memory.activations import Picture
from zquant.memory.needs import Machine
from zquant.memory.plan import MemoryPlan, NetworkPlan, Phase, VAEPlan
from zquant.memory.stream import StreamReport
from zquant.phases import Phases

GIB, MIB = 2**30, 2**20


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU of 12 GiB: what is asked of it, and what it answers."""
    said: dict[str, Any] = {"free": 5 * GIB, "allocations": 7, "process": None}

    def fraction(share: float, _: Any) -> None:
        said["share"] = share

    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fraction)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (said["free"], 12 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2 * GIB)
    stats = lambda _: {"num_device_alloc": said["allocations"]}  # noqa: E731 # one line says it
    monkeypatch.setattr(torch.cuda, "memory_stats", stats)
    monkeypatch.setattr(phases, "process_vram_bytes", lambda: said["process"])
    monkeypatch.setattr(phases, "_claim_workspace", lambda _: said.update(claimed="share" in said))
    return said


@pytest.fixture
def played(asked: dict[str, Any], toy_engine: zquant.Engine) -> Phases:
    class Gpu:
        is_cuda, torch_device = True, torch.device("cuda", 0)

        def peak_vram_bytes(self) -> int:
            return 3 * GIB

    machine = Machine(
        is_gpu=True, device_bytes=5 * GIB, outside=GIB // 2, ram_bytes=9 * GIB, ram_held=GIB
    )
    phase = Phase(name="DiT", device={"all": 3 * GIB}, host={"all": GIB}, seconds=1.0)
    plan = MemoryPlan(
        picture=Picture(width=64, height=64, n_prompt=9),
        machine=machine,
        budget_bytes=4 * GIB,
        ram_bytes=9 * GIB,
        text_encoder=NetworkPlan(),
        dit=NetworkPlan(),
        vae=VAEPlan(),
        phases=(phase,),
    )
    return Phases(toy_engine.checkpoint, Gpu(), plan)  # type: ignore[arg-type]


@pytest.mark.usefixtures("played")
def test_libraries_take_their_workspace_before_anything_is_reserved(asked: dict[str, Any]) -> None:
    assert asked["claimed"]  # under the ceiling that the allocator then has


@pytest.mark.usefixtures("played")
def test_torch_may_not_take_more_than_the_budget(asked: dict[str, Any]) -> None:
    assert asked["share"] * 12 * GIB == pytest.approx(4 * GIB - GIB // 2 + phases.WORKSPACES)


@pytest.mark.parametrize("error", [None, KeyError])
def test_torch_may_take_the_whole_card_again_afterwards(
    played: Phases, asked: dict[str, Any], error: type[Exception] | None
) -> None:
    assert asked["share"] < 1
    with suppress(KeyError), phases.uncapped_after(played.device):
        if error is not None:
            raise error
    assert asked["share"] == 1.0


def test_what_is_planned_again_goes_on_with_what_was_reported(played: Phases) -> None:
    played.reports["text_encoder"] = report = StreamReport(
        bytes_read=1, bytes_copied=0, waited_s=0.0, pinned=False, reason=""
    )
    played.notices.append("said")
    after = Phases(played.checkpoint, played.device, played.plan, played)
    assert after.reports == {"text_encoder": report}
    assert after.notices == ["said"]


def test_allocations_after_the_first_step_are_counted(
    played: Phases, asked: dict[str, Any]
) -> None:
    for step, n in enumerate((7, 7, 9)):
        asked["allocations"] = n
        played._watch_allocator(step)
    assert played.growth == 2
    played._watch_allocator(0)  # another picture: its first step may differ in size
    assert played.growth == 0


def test_vram_that_spills_on_windows_is_told(
    played: Phases, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked["free"] = 10 * MIB
    played._watch_allocator(0)
    assert played.notices == []  # elsewhere it would be an error instead
    monkeypatch.setattr(phases, "os", SimpleNamespace(name="nt"))
    played._watch_allocator(0)
    (notice,) = played.notices
    assert "only 10.0 MiB of VRAM are free" in notice
    assert "smaller --budget" in notice


def test_what_the_driver_counts_is_reported(played: Phases, asked: dict[str, Any]) -> None:
    assert played.measured()["measured_vram_bytes"] == 3 * GIB + GIB // 2  # the plan's allowance
    asked["process"] = 2 * GIB + 300 * MIB
    assert played.measured()["measured_vram_bytes"] == 3 * GIB + 300 * MIB
    assert played.measured()["budget_bytes"] == 4 * GIB


def test_a_workspace_is_claimed_by_a_product_in_the_compute_dtype(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    products = []
    monkeypatch.setattr(torch, "mm", lambda a, b: products.append((a.dtype, b.device.type)))
    cpu = SimpleNamespace(compute_dtype=torch.bfloat16, torch_device=torch.device("cpu"))
    phases._claim_workspace(cpu)  # type: ignore[arg-type]
    assert products == [(torch.bfloat16, "cpu")]


def test_convolutions_of_float32_are_not_rounded_to_tf32(
    monkeypatch: pytest.MonkeyPatch, toy_engine: zquant.Engine
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []

    class Seeing(Phases):
        def _decoded(self, *_: Any) -> torch.Tensor:
            seen.append(torch.backends.cudnn.allow_tf32)
            return torch.zeros(3, 8, 8)

    plan = SimpleNamespace(vae=VAEPlan())
    found = Seeing(toy_engine.checkpoint, toy_engine.device, plan)  # type: ignore[arg-type]
    pictures = found.decode([torch.zeros(1, 16, 8, 8)])
    next(pictures)
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32  # for whoever takes the picture
