"""Streaming on a GPU: the same bits at every budget, never more memory than planned."""

from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from zquant import Engine, RunRequest, RunResult
from zquant.memory.forecast import Forecast
from zquant.memory.lanes import CudaLanes
from zquant.memory.needs import Limits
from zquant.memory.plan import NetworkPlan, spread
from zquant.memory.stream import BlockStream, StreamShape
from zquant.models.vae_memory import striped_bytes
from zquant.models.vae_stripes import decode_striped

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

REQUEST = RunRequest(prompt="a red circle left of a blue square", seed=3, keep_latents=True)


class Numbered:
    """A block of one number."""

    def __init__(self, number: int) -> None:
        self.name, self.n_bytes, self.number = str(number), 2**22 + 256 * number, number

    def read_into(self, out: Any) -> None:
        out[:] = self.number


@pytest.mark.parametrize("kept", [frozenset[int](), frozenset({1, 4}), frozenset(range(7))])
def test_every_block_is_whole_while_it_is_used(kept: frozenset[int]) -> None:
    blocks = [Numbered(i) for i in range(7)]
    shape = StreamShape(n_slots=2, n_ring=0 if len(kept) == 7 else 2, kept=kept)
    stream = BlockStream(blocks, shape, CudaLanes(torch.device("cuda", 0)))
    right = []
    for _ in range(20):
        for i, block in enumerate(blocks):
            with stream.using(i) as slot:
                used = slot[: block.n_bytes]
                busy = torch.ones(1024, 1024, device="cuda")
                for _ in range(4):  # so that a copy which does not wait would come before the end
                    busy = busy @ busy / 1024
                right.append((used == i).all() & (busy == 1).all())
    assert all(torch.stack(right).tolist())
    assert stream.report.bytes_copied >= 20 * sum(block.n_bytes for block in blocks)
    stream.close()


def test_what_registers_is_copied_without_blocking() -> None:
    stream = BlockStream(
        [Numbered(1)] * 3,
        StreamShape(n_slots=2, n_ring=2, kept=frozenset()),
        CudaLanes(torch.device("cuda", 0)),
    )
    report = stream.report
    stream.close()
    assert report.pinned, report.reason


def network_plan(n: int, n_streamed: int, kept: bool) -> NetworkPlan:
    if not n_streamed:
        return NetworkPlan(working=2**26)
    keeps = frozenset(range(n_streamed)) if kept else frozenset[int]()
    shape = StreamShape(n_slots=2, n_ring=0 if kept else 2, kept=keeps)
    return NetworkPlan(streamed=spread(n, n_streamed), shape=shape, working=2**26)


def painted(compute: str, n_streamed: int, kept: bool, patch: pytest.MonkeyPatch) -> RunResult:
    real = Forecast.plan

    def forced(self: Forecast, *args: Any) -> Any:
        plan, sizes = real(self, *args), self.sizes
        networks = {
            name: network_plan(n, min(n, n_streamed), kept)
            for name, n in (
                ("dit", len(sizes.dit.blocks)),
                ("text_encoder", len(sizes.text_encoder.blocks)),
            )
        }
        return replace(plan, **networks)

    with patch.context() as forcing:
        forcing.setattr(Forecast, "plan", forced)
        with closing(Engine.open("demo", device="cuda", compute=compute)) as engine:
            return engine.generate(REQUEST)


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_where_the_blocks_are_changes_no_bit(compute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = painted(compute, 0, False, monkeypatch).latents
    assert resident is not None
    for n_streamed, kept in ((1, False), (3, True), (7, False), (7, True)):
        result = painted(compute, n_streamed, kept, monkeypatch)
        assert torch.equal(result.latents, resident), (n_streamed, kept)
        assert result.memory["streams"]["dit"]["bytes_copied"] > 0


def test_the_plan_holds_and_the_allocator_stands_still() -> None:
    with closing(Engine.open("demo", device="cuda", limits=Limits(budget_bytes=2**31))) as engine:
        result = engine.generate(REQUEST)
    memory = result.memory
    assert memory["measured_vram_bytes"] <= memory["budget_bytes"] == 2**31
    assert memory["measured_vram_bytes"] <= memory["predicted_vram_bytes"]
    assert memory["allocations_after_step_1"] == 0


@pytest.mark.parametrize("store", ["cuda", "cpu"])
def test_stripes_are_the_whole_picture_within_their_memory(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with closing(Engine.open("demo", device="cuda")) as engine:
        vae = engine.checkpoint.vae(torch.device("cuda"), torch.float32)
        config = vae.config
    latents = torch.randn(1, 16, 64, 48, generator=torch.Generator().manual_seed(1)).cuda()

    def peak(make: Any) -> tuple[Tensor, int]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return make().cpu(), torch.cuda.max_memory_allocated() - before

    with torch.inference_mode():
        whole, _ = peak(lambda: vae.decode_latents(latents))
        striped, used = peak(lambda: decode_striped(vae, latents, rows=32, store=store))
    assert (striped - whole).norm() / whole.norm() < 1e-4  # rounding alone
    planned, _ = striped_bytes(config, 64, 48, 4, rows=32, stored=store == "cuda")
    assert used <= planned + 64 * 2**20  # cuDNN's workspaces
