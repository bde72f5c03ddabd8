"""Requests together, memory that runs out, work that is taken up again, embeddings on disk."""

import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zquant
from tests.unit.engine_testing import count_calls, paint, phases_of, request
from zquant.errors import PlanError
from zquant.formats.embed_cache import EmbedCache
from zquant.memory.needs import Limits
from zquant.models.dit import DiT
from zquant.models.text_encoder import TextEncoder
from zquant.models.vae import VAE
from zquant.painting import Painting
from zquant.phases import Phases


@pytest.fixture
def engine(toy_folder: Path) -> Iterator[zquant.Engine]:
    """An engine without a past, with the tokenizer of the session's."""
    engine = zquant.Engine.open(toy_folder, device="cpu", compute_dtype="float32")
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def tokenizer(toy_engine: zquant.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the vocabulary takes a second; once is enough."""
    from zquant.models.checkpoint import Checkpoint

    tokenizer = toy_engine.prompts.tokenizer
    monkeypatch.setattr(Checkpoint, "tokenizer", lambda _: tokenizer)


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: set[int]) -> None:
    """The calls of those numbers run out of memory."""
    real, n = getattr(owner, name), 0

    def failing(*args: Any) -> Any:
        nonlocal n
        n += 1
        if n in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return real(*args)

    monkeypatch.setattr(owner, name, failing)


def test_the_second_plan_is_made_when_the_first_attempt_is_gone(
    engine: zquant.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    velocity, plan_again = DiT.velocity, Painting._plan_again

    def failing(*args: Any) -> Any:
        if held:
            return velocity(*args)
        tensor = torch.ones(8)  # as activations and weights are: by a frame of the traceback
        held.append(weakref.ref(tensor))
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    def planning(painting: Painting, said: str) -> None:
        alive.append(held[0]() is not None)
        plan_again(painting, said)

    monkeypatch.setattr(DiT, "velocity", failing)
    monkeypatch.setattr(Painting, "_plan_again", planning)
    result = paint(engine)
    assert alive == [False]
    assert any("(Triton Error [CUDA]: out of memory)" in notice for notice in result.notices)


@pytest.mark.parametrize("owner", ["TextEncoder.forward", "DiT.velocity", "VAE.decode_latents"])
def test_memory_that_runs_out_once_costs_nothing(
    engine: zquant.Engine, monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    fields: dict[str, Any] = {"count": 2, "steps": 3}
    wanted = paint(engine, **fields)
    kind, name = owner.split(".")
    n_run = 0
    real = DiT.velocity

    def counted(*args: Any) -> Any:
        nonlocal n_run
        n_run += 1
        return real(*args)

    monkeypatch.setattr(DiT, "velocity", counted)
    networks: dict[str, Any] = {"TextEncoder": TextEncoder, "DiT": DiT, "VAE": VAE}
    fail_at(monkeypatch, networks[kind], name, {5 if kind == "DiT" else 1})
    result = paint(engine, "a red fox" if kind != "TextEncoder" else "a red  fox", **fields)
    if kind != "TextEncoder":
        assert torch.equal(result.latents, wanted.latents)
        assert [i.tobytes() for i in result.images] == [i.tobytes() for i in wanted.images]
    assert n_run == 6  # the steps before it are not repeated
    (notice,) = result.notices
    assert "memory ran out within the budget of" in notice
    assert "Tried to allocate 2 GiB" in notice


def test_memory_that_runs_out_twice_is_an_error(
    engine: zquant.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, DiT, "velocity", {2, 3})
    with pytest.raises(PlanError, match=r"memory ran out twice \(CUDA.*close it, or use a smaller"):
        paint(engine)


class Memo:
    """A journal in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[int, Tensor]] = {}

    def load(self, recipe: Any) -> tuple[int, Tensor] | None:
        return self.kept.get(repr(recipe))

    def save(self, recipe: Any, steps_done: int, latents: Tensor) -> None:
        assert latents.ndim == 3
        self.kept[repr(recipe)] = (steps_done, latents.clone())


def test_requests_go_through_the_phases_together(toy_engine: zquant.Engine) -> None:
    requests = [
        request("a red fox"),
        request("a blue hare", width=64, seed=9, guidance_scale=2.0, negative_prompt="a red fox"),
        request("a red fox", seed=6, steps=3),
    ]
    alone = [toy_engine.generate(each) for each in requests]
    seen: list[str] = []
    together = list(toy_engine.generate_all(requests, lambda phase, *_: seen.append(phase)))
    assert list(dict.fromkeys(seen)) == ["denoise", "vae"]  # embeddings were there
    assert [phase for phase, _ in itertools.groupby(seen)] == ["denoise", "vae"]
    for one, each in zip(alone, together, strict=True):
        assert torch.equal(one.latents, each.latents)
        assert one.images[0].tobytes() == each.images[0].tobytes()
        assert one.recipes == each.recipes


def test_a_journal_resumes_between_steps(
    engine: zquant.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(seed=seed, steps=4, keep_latents=False) for seed in (1, 2)]
    wanted = [result.images[0].tobytes() for result in engine.generate_all(requests)]
    memo = Memo()

    def stop(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("denoise", 6):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(engine.generate_all(requests, stop, journal=memo))
    assert sorted(steps for steps, _ in memo.kept.values()) == [2, 4]
    calls = count_calls(monkeypatch, "velocity")
    again = [result.images[0].tobytes() for result in engine.generate_all(requests, journal=memo)]
    assert again == wanted
    assert calls["velocity"] == 2


def test_latents_of_another_size_are_not_resumed(engine: zquant.Engine) -> None:
    memo = Memo()
    memo.load = lambda _: (1, torch.zeros(16, 2, 2))  # type: ignore[method-assign]
    (result,) = engine.generate_all([request()], journal=memo)
    assert torch.equal(result.latents, paint(engine).latents)


def test_embeddings_come_from_disk(toy_folder: Path, tmp_path: Path) -> None:
    def opened() -> zquant.Engine:
        cache = EmbedCache(tmp_path, max_bytes=2**20)
        return zquant.Engine.open(toy_folder, device="cpu", compute_dtype="float32", cache=cache)

    first, second = opened(), opened()
    wanted = paint(first)
    assert phases_of(second) == ["denoise", "vae"]
    assert torch.equal(paint(second).prompt_embeds[0], wanted.prompt_embeds[0])
    other = zquant.Engine.open(
        toy_folder, device="cpu", compute_dtype="bfloat16", cache=EmbedCache(tmp_path, max_bytes=1)
    )
    assert phases_of(other)[0] == "text encoder"  # another dtype, other bits
    for each in (first, second, other):
        each.close()


def test_a_cache_that_cannot_be_written_is_told_once(toy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = EmbedCache(tmp_path / "file" / "cache", max_bytes=2**20)
    machine = {"device": "cpu", "compute_dtype": "float32"}
    with zquant.Engine.open(toy_folder, **machine, cache=cache) as engine:
        (notice,) = paint(engine).notices
        assert notice.startswith("embeddings of prompts on disk: ")
        assert "cannot be written (Not a directory)" in notice
        assert paint(engine, "another").notices == []


def test_a_gpu_that_is_full_when_painting_begins_is_one_message(
    engine: zquant.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, Phases, "__init__", {1})
    with pytest.raises(PlanError, match=r"VRAM ran out \(CUDA.*Close programs that use the GPU"):
        paint(engine)


def test_a_run_that_fails_lifts_the_cap_of_torch(
    engine: zquant.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lifted = []

    @contextmanager
    def seen(device: Any) -> Iterator[None]:
        try:
            yield
        finally:
            lifted.append(device)

    monkeypatch.setattr("zquant.engine.uncapped_after", seen)
    fail_at(monkeypatch, DiT, "velocity", {1, 2})
    with pytest.raises(PlanError, match="memory ran out twice"):
        paint(engine)
    assert lifted == [engine.device]


def test_a_plan_is_announced_and_reported(toy_engine: zquant.Engine) -> None:
    said: list[str] = []
    result = toy_engine.generate(request(), announce=said.append)
    assert said[0].startswith("plan: 3 of 3 blocks resident")
    memory = result.memory
    assert memory["predicted_host_bytes"] <= memory["max_ram_bytes"]
    assert memory["measured_host_bytes"] > 0
    assert memory["budget_bytes"] is None  # of a GPU


def test_a_budget_of_vram_on_a_cpu_is_told_to_change_nothing(toy_folder: Path) -> None:
    limits = Limits(budget_bytes=2**30)
    engine = zquant.Engine.open(toy_folder, device="cpu", compute_dtype="float32", limits=limits)
    (notice,) = paint(engine).notices
    assert "changes nothing on a CPU" in notice
    engine.close()


def test_a_ceiling_that_is_too_low_is_refused_before_any_work(toy_folder: Path) -> None:
    limits = Limits(ram_bytes=2**20)
    engine = zquant.Engine.open(toy_folder, device="cpu", limits=limits)
    with pytest.raises(PlanError, match=r"32x48: the .* of RAM.*Use --max-ram \d\.\d\dGiB"):
        phases_of(engine)
    engine.close()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("for numpy"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 5 bytes"),
        RuntimeError("DefaultCPUAllocator: not enough memory: 5 bytes"),
    ],
    ids=["numpy", "Linux", "Windows"],
)
def test_ram_that_runs_out_is_an_error_with_a_remedy(
    engine: zquant.Engine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(DiT, "velocity", fail)
    with pytest.raises(PlanError, match=r"RAM ran out \(.*use a smaller --max-ram"):
        paint(engine)
    monkeypatch.setattr(DiT, "velocity", lambda *_: fail_otherwise())
    with pytest.raises(RuntimeError, match="another fault"):
        paint(engine)


def fail_otherwise() -> None:
    raise RuntimeError("another fault")
