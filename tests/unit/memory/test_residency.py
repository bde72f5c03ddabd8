"""Where the weights are never changes what is painted: the same latents to the last bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import zquant
from zquant.memory import stream
from zquant.memory.forecast import Forecast
from zquant.memory.plan import NetworkPlan, spread
from zquant.memory.stream import StreamShape
from zquant.models.checkpoint import Checkpoint

SMALL: dict[str, Any] = {"width": 64, "height": 48, "steps": 2, "seed": 5, "keep_latents": True}
SHAPE = StreamShape(n_slots=2, n_ring=0, kept=frozenset())


def network_plan(n_blocks: int, kind: str) -> NetworkPlan:
    """Placements that real plans choose, and ones that they do not."""
    streamed = {
        "resident": frozenset[int](),
        "streamed": spread(n_blocks, n_blocks),
        "half streamed": spread(n_blocks, n_blocks // 2),
        "one streamed": frozenset({n_blocks - 1}),
        "expanded": frozenset[int](),
        "half expanded": frozenset[int](),
    }[kind]
    n_expanded = {"expanded": n_blocks, "half expanded": n_blocks // 2}.get(kind, 0)
    return NetworkPlan(
        streamed=streamed,
        expanded=spread(n_blocks, n_expanded),
        shape=SHAPE if streamed else None,
    )


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Forces the placement that the list holds, whatever fits."""
    kind = ["resident"]
    real = Forecast.plan

    def forced(self: Forecast, *args: Any) -> Any:
        plan = real(self, *args)
        n_encoder, n_dit = len(self.sizes.text_encoder.blocks), len(self.sizes.dit.blocks)
        encoder = network_plan(n_encoder, kind[0] if "expanded" not in kind[0] else "resident")
        return replace(plan, dit=network_plan(n_dit, kind[0]), text_encoder=encoder)

    monkeypatch.setattr(Forecast, "plan", forced)
    return kind


@pytest.fixture(autouse=True)
def tokenizer(toy_engine: zquant.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the vocabulary takes a second; once is enough."""
    tokenizer, real = toy_engine.prompts.tokenizer, Checkpoint.tokenizer
    folder = toy_engine.checkpoint.files.dit.parent

    def quick(self: Checkpoint) -> Any:
        return tokenizer if self.files.dit.parent == folder else real(self)

    monkeypatch.setattr(Checkpoint, "tokenizer", quick)


KINDS = ("streamed", "half streamed", "one streamed", "expanded", "half expanded")
WAYS = {
    "float32": {"compute_dtype": "float32"},
    "bfloat16": {"compute_dtype": "bfloat16"},
    "int8": {"compute_dtype": "float32", "compute": "int8"},
}


@pytest.mark.parametrize(
    ("model", "way"),
    [("toy", WAYS["bfloat16"]), ("demo", WAYS["float32"]), ("demo", WAYS["int8"])],
    ids=["toy in bfloat16", "demo in float32", "demo in int8"],
)
def test_every_placement_gives_the_same_bits(
    toy_folder: Path, placed: list[str], model: str, way: dict[str, str]
) -> None:
    pictures = {}
    for kind in ("resident", *KINDS):
        if "int8" in way.values() and "expanded" in kind:
            continue  # never planned: int8 reads packed weights
        placed[0] = kind
        engine = zquant.Engine.open(toy_folder if model == "toy" else model, device="cpu", **way)
        result = engine.generate(zquant.RunRequest(prompt="a red circle", **SMALL))
        pictures[kind] = (result.latents, result.prompt_embeds[0])
        streams = result.memory["streams"]
        assert ("dit" in streams) == ("streamed" in kind)
        engine.close()
    for kind, (latents, embeds) in pictures.items():
        assert torch.equal(latents, pictures["resident"][0]), kind
        assert torch.equal(embeds, pictures["resident"][1]), kind


def test_a_stream_that_mixes_up_blocks_changes_the_picture(
    toy_folder: Path, placed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above can fail."""
    engine = zquant.Engine.open(toy_folder, device="cpu", compute_dtype="float32")
    request = zquant.RunRequest(prompt="a red circle", **SMALL)
    wanted = engine.generate(request)
    placed[0] = "streamed"
    real = stream.BlockStream.__init__

    def swapped(self: Any, blocks: Any, *args: Any) -> None:
        real(self, [*blocks[:-2], blocks[-1], blocks[-2]], *args)

    monkeypatch.setattr(stream.BlockStream, "__init__", swapped)
    assert not torch.equal(engine.generate(request).latents, wanted.latents)
    engine.close()


def test_every_streamed_byte_is_read_once_per_pass(toy_folder: Path, placed: list[str]) -> None:
    placed[0] = "streamed"
    engine = zquant.Engine.open(toy_folder, device="cpu", compute_dtype="float32")
    result = engine.generate(zquant.RunRequest(prompt="a red circle", **SMALL))
    sizes = Forecast(engine.checkpoint, engine.device).sizes
    streams = result.memory["streams"]
    dit, passes = sum(sizes.dit.blocks), SMALL["steps"]
    ahead = 2 * sizes.dit.slot  # the reader does not know that the last step is the last
    assert passes * dit <= streams["dit"]["bytes_read"] <= passes * dit + ahead
    encoder = sum(sizes.text_encoder.blocks)
    read = streams["text_encoder"]["bytes_read"]
    assert encoder <= read <= encoder + 2 * sizes.text_encoder.slot
    engine.close()
