"""One engine, many requests: what is run, what is kept, and that nothing depends on the past."""

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import zquant
from tests.unit.engine_testing import count_calls, paint, phases_of, request
from zquant import sampling
from zquant.errors import CheckpointError, DeviceError, ZQuantError
from zquant.formats.names import Part
from zquant.memory import forecast
from zquant.memory.needs import Machine


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


def test_a_result_has_what_it_says(toy_engine: zquant.Engine) -> None:
    result = paint(toy_engine, count=2)
    assert [image.size for image in result.images] == [(32, 48)] * 2
    assert result.latents is not None
    assert result.latents.shape == (2, 2, 16, 6, 4)
    assert result.latents.dtype == torch.float32
    (embeds,) = result.prompt_embeds
    assert embeds.shape == (3 + 8, 32)  # words and template
    assert embeds.dtype == torch.float32
    assert result.seed == 5
    assert [r["seed"] for r in result.recipes] == [5, 6]
    assert len(result.timings["steps"]) == 4
    assert result.timings["total"] >= result.timings["denoise"] >= sum(result.timings["steps"]) / 2
    assert result.peak_host_bytes is not None
    assert result.peak_vram_bytes is None
    assert result.notices == []


def test_latents_are_kept_only_on_demand(toy_engine: zquant.Engine) -> None:
    assert paint(toy_engine, keep_latents=False).latents is None


def test_defaults_are_the_models(toy_engine: zquant.Engine) -> None:
    recipe = paint(toy_engine, steps=None).recipes[0]
    assert (recipe["steps"], recipe["shift"], recipe["guidance_scale"]) == (8, 3.0, 0.0)


def test_defaults_of_base(toy_folder: Path) -> None:
    engine = zquant.Engine.open(toy_folder, variant="base", device="cpu", compute_dtype="float32")
    result = paint(engine, steps=None, width=16, height=16)
    recipe = result.recipes[0]
    assert (recipe["steps"], recipe["shift"], recipe["guidance_scale"]) == (30, 6.0, 4.0)
    assert len(result.prompt_embeds) == 2
    engine.close()


def test_guidance_of_zero_is_not_the_models_default(toy_folder: Path) -> None:
    engine = zquant.Engine.open(toy_folder, variant="base", device="cpu", compute_dtype="float32")
    result = paint(engine, guidance_scale=0.0)
    assert result.recipes[0]["guidance_scale"] == 0.0
    assert len(result.prompt_embeds) == 1
    engine.close()


def test_a_seed_is_drawn_and_told(toy_engine: zquant.Engine) -> None:
    drawn = paint(toy_engine, seed=None)
    again = paint(toy_engine, seed=drawn.seed)
    assert drawn.images[0].tobytes() == again.images[0].tobytes()


def test_picture_i_of_a_count_is_the_single_picture_of_its_seed(toy_engine: zquant.Engine) -> None:
    many = paint(toy_engine, count=3)
    for i in range(3):
        single = paint(toy_engine, seed=5 + i)
        assert torch.equal(many.latents[:, i], single.latents[:, 0])
        assert many.images[i].tobytes() == single.images[0].tobytes()


def test_noise_is_drawn_on_the_cpu_in_float32(toy_engine: zquant.Engine) -> None:
    noise = sampling.initial_noise((1, 16, 6, 4), 5)
    given = paint(toy_engine, initial_latents=noise, seed=99)
    assert torch.equal(given.latents, paint(toy_engine).latents)
    assert given.recipes[0]["initial_latents"] is True


def test_the_same_prompt_is_encoded_once(engine: zquant.Engine) -> None:
    first = paint(engine)
    assert phases_of(engine) == ["denoise", "vae"]
    second = paint(engine, width=64)
    assert torch.equal(first.prompt_embeds[0], second.prompt_embeds[0])
    assert phases_of(engine, prompt="another") == ["text encoder", "denoise", "vae"]


def test_the_negative_prompt_is_encoded_only_when_guidance_is_on(engine: zquant.Engine) -> None:
    paint(engine, negative_prompt="blur")
    assert phases_of(engine, negative_prompt="blur", guidance_scale=2.0)[0] == "text encoder"


def test_only_so_many_prompts_are_kept(engine: zquant.Engine) -> None:
    for i in range(10):
        paint(engine, f"fox {i}", width=16, height=16, steps=1)
    assert len(engine.prompts.known(f"fox {i}" for i in range(10))) == 8
    assert phases_of(engine, prompt="fox 9")[0] == "denoise"
    assert phases_of(engine, prompt="fox 0")[0] == "text encoder"


def test_no_request_depends_on_earlier_ones(
    toy_engine: zquant.Engine, engine: zquant.Engine
) -> None:
    wanted = paint(engine, guidance_scale=2.0)
    paint(toy_engine, "something else", width=64, height=16, steps=3, guidance_scale=5.0)
    result = paint(toy_engine, guidance_scale=2.0)
    result.prompt_embeds[0].numpy()[:] = 0  # a caller may do what it wants with its result
    again = paint(toy_engine, guidance_scale=2.0)
    assert torch.equal(again.latents, wanted.latents)
    assert again.images[0].tobytes() == wanted.images[0].tobytes()


def test_the_schedule_is_modulated_once_and_each_prompt_refined_once(
    toy_engine: zquant.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch, "modulate", "prepare", "velocity")
    paint(toy_engine, steps=3, count=2, guidance_scale=2.0)
    assert calls == {"modulate": 1, "prepare": 2, "velocity": 3 * 2 * 2}


def test_truncation_ends_guidance(
    toy_engine: zquant.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch, "velocity")
    paint(toy_engine, steps=8, guidance_scale=2.0, cfg_truncation=0.2)
    # tau of eight Turbo steps is 0, 0.05, 0.1, 0.17, 0.25, ...: four are guided
    assert calls["velocity"] == 8 + 4


def test_normalization_as_a_flag_is_one(toy_engine: zquant.Engine) -> None:
    guided = {"guidance_scale": 4.0}
    flag = paint(toy_engine, **guided, cfg_normalization=True)
    one = paint(toy_engine, **guided, cfg_normalization=1.0)
    off = paint(toy_engine, **guided, cfg_normalization=False)
    assert torch.equal(flag.latents, one.latents)
    assert flag.recipes == one.recipes
    assert flag.recipes[0]["cfg_normalization"] == 1.0
    assert torch.equal(off.latents, paint(toy_engine, **guided).latents)
    assert not torch.equal(off.latents, one.latents)


def test_a_network_is_gone_before_the_next_phase(
    engine: zquant.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: dict[str, weakref.ref[Any]] = {}
    for component in ("text_encoder", "dit", "vae"):
        real: Callable[..., Any] = getattr(engine.checkpoint, component)

        def watched(*args: Any, name: str = component, real: Any = real) -> Any:
            assert not [other for other, ref in alive.items() if ref() is not None]
            network = real(*args)
            alive[name] = weakref.ref(network)
            return network

        monkeypatch.setattr(engine.checkpoint, component, watched)

    def forgotten(component: str) -> None:
        assert alive[component]() is None, "its weights cannot leave the device while it lives"

    monkeypatch.setattr(engine.checkpoint, "forget", forgotten)
    gc.disable()  # a cycle would keep the network until the collector runs
    try:
        paint(engine, guidance_scale=1.0)
    finally:
        gc.enable()
    assert list(alive) == ["text_encoder", "dit", "vae"]


MACHINE = Machine(is_gpu=False, device_bytes=2**34, outside=0, ram_bytes=2**34, ram_held=0)
LATENTS = {
    "size": (
        torch.zeros(1, 16, 4, 4),
        r"torch.float32 \[1, 16, 4, 4\]; expected floats \[1, 16, 6",
    ),
    "count": (torch.zeros(2, 16, 6, 4), r"expected floats \[1, 16, 6, 4\] for 1 of 32x48"),
    "integers": (torch.zeros(1, 16, 6, 4, dtype=torch.long), "are torch.int64"),
    "not finite": (torch.full((1, 16, 6, 4), float("nan")), "hold 384 values that are not finite"),
}


@pytest.mark.parametrize(("latents", "message"), LATENTS.values(), ids=LATENTS)
def test_latents_that_do_not_fit(toy_engine: zquant.Engine, latents: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paint(toy_engine, initial_latents=latents)


def test_a_long_prompt_is_cut_and_told(toy_engine: zquant.Engine) -> None:
    result = paint(toy_engine, "snow " * 600, steps=1, guidance_scale=1.0, negative_prompt="x")
    assert result.prompt_embeds[0].shape[0] == 512
    assert result.prompt_embeds[1].shape[0] == 9  # nothing is padded
    (notice,) = result.notices
    assert "512 are used; cut off: ' snow snow" in notice
    assert paint(toy_engine, "snow " * 600, steps=1).notices == [notice]  # from memory too


BAD_WEIGHTS = {
    "layers.1.feed_forward.w2.weight": "step 1 of 2: block 'layers.1' gave values that are not fin",
    "noise_refiner.0.attention.to_v.weight": "step 1 of 2: block 'noise_refiner.0' gave values",
    "all_final_layer.2-1.linear.weight": "step 1 of 2: the final layer gave values",
    "context_refiner.0.feed_forward.w1.weight": "the context refiner gave values",
}


@dataclass(frozen=True, slots=True)
class DamagedPart(Part):
    """A part, stored as BF16, whose first weight is `value`."""

    value: float = 0.0

    def raw(self) -> Any:
        stored = super(DamagedPart, self).raw().copy()
        stored[:2].view(np.uint16)[:] = torch.tensor(self.value).bfloat16().view(torch.uint16)
        return stored

    def read_into(self, start: int, out: Any) -> None:
        out[:] = self.raw()[start : start + len(out)]


def damage(engine: zquant.Engine, component: str, name: str, value: float) -> None:
    """The first weight of a tensor is `value` from now on."""
    parts = engine.checkpoint.parts[component]
    assert parts[name].qtype.name == "BF16"
    parts[name] = DamagedPart(parts[name].info, parts[name].rows, parts[name].shape, value)


@pytest.mark.parametrize(("name", "message"), BAD_WEIGHTS.items(), ids=BAD_WEIGHTS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_a_velocity_that_is_not_finite_names_block_and_step(
    engine: zquant.Engine, name: str, message: str, value: float
) -> None:
    damage(engine, "dit", name, value)
    with pytest.raises(ZQuantError, match=f"{message}.*damaged weight: download or convert"):
        paint(engine)


def test_embeddings_and_pictures_that_are_not_finite(toy_folder: Path) -> None:
    engine = zquant.Engine.open(toy_folder, device="cpu", compute_dtype="float32")
    damage(engine, "vae", "decoder.conv_in.weight", float("nan"))
    with pytest.raises(ZQuantError, match="the VAE gave values that are not finite"):
        paint(engine)
    damage(engine, "text_encoder", "model.layers.1.mlp.down_proj.weight", float("nan"))
    with pytest.raises(ZQuantError, match="the text encoder gave values that are not finite"):
        paint(engine, "a prompt that was not there before")
    engine.close()


OVERFLOWS = {  # a weight past float16's range, and what is said of it
    ("dit", "layers.1.attention.to_out.0.weight"): [
        "block layers.1 attention, step 1, redone in float32",
        "block layers.1 attention, step 2, redone in float32",
    ],
    ("dit", "noise_refiner.0.feed_forward.w2.weight"): [
        "block noise_refiner.0 ffn, step 1, redone in float32",
        "block noise_refiner.0 ffn, step 2, redone in float32",
    ],
    ("dit", "context_refiner.0.attention.to_out.0.weight"): ["context refiner, redone in float32"],
    ("text_encoder", "model.layers.1.mlp.down_proj.weight"): ["text encoder, redone in float32"],
}


@pytest.mark.parametrize(("where", "said"), OVERFLOWS.items(), ids=lambda x: str(x)[:60])
def test_what_overflows_is_redone_in_float32(
    toy_folder: Path, where: tuple[str, str], said: list[str]
) -> None:
    pictures = []
    for dtype in ("float16", "float32"):
        engine = zquant.Engine.open(toy_folder, device="cpu", compute_dtype=dtype)
        damage(engine, *where, 1e6)
        pictures.append(paint(engine))
        engine.close()
    healed, exact = pictures
    assert healed.notices == said
    assert healed.recipes[0]["redone"] == said
    assert exact.notices == []
    assert "redone" not in exact.recipes[0]
    error = (healed.latents - exact.latents).norm() / exact.latents.norm()
    assert error < 0.01  # as two dtypes differ; without the remedy it is NaN


def test_two_blocks_that_overflow_are_both_redone(toy_folder: Path) -> None:
    engine = zquant.Engine.open(toy_folder, device="cpu", compute_dtype="float16")
    damage(engine, "dit", "layers.0.attention.to_out.0.weight", 1e6)
    damage(engine, "dit", "layers.1.feed_forward.w2.weight", 1e6)
    result = paint(engine, steps=1)
    assert result.notices == [
        "block layers.0 attention, step 1, redone in float32",
        "block layers.1 ffn, step 1, redone in float32",
    ]
    engine.close()


def test_a_block_that_is_damaged_is_an_error_in_every_dtype(toy_folder: Path) -> None:
    engine = zquant.Engine.open(toy_folder, device="cpu", compute_dtype="float16")
    damage(engine, "dit", "layers.0.attention.to_out.0.weight", float("inf"))
    message = r"block 'layers.0'.*computed in float32\)\. In float32 this means a damaged weight"
    with pytest.raises(ZQuantError, match=message):
        paint(engine)
    engine.close()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes_paint_nearly_the_same(
    toy_folder: Path, toy_engine: zquant.Engine, dtype: str
) -> None:
    engine = zquant.Engine.open(toy_folder, device="cpu", compute_dtype=dtype)
    ours, expected = paint(engine), paint(toy_engine)
    engine.close()
    error = (ours.latents - expected.latents).norm() / expected.latents.norm()
    # eight bits of bfloat16 through five blocks and two steps; measured 0.5 %
    assert 0 < error < 0.03
    assert ours.recipes[0]["compute_dtype"] == dtype


def test_a_token_without_an_embedding(
    engine: zquant.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    small = dataclasses.replace(engine.checkpoint.text_encoder_config, vocab_size=1000)
    monkeypatch.setattr(engine.checkpoint, "text_encoder_config", small)
    with pytest.raises(CheckpointError, match=r"token 15\d+ of the prompt has no embedding; there"):
        paint(engine)


def test_single_files_tell_what_is_assumed(toy_folder: Path) -> None:
    parts = {"dit": "transformer", "text_encoder": "text_encoder", "vae": "vae"}
    files = {part: toy_folder / folder for part, folder in parts.items()}
    machine = {"device": "cpu", "compute_dtype": "float32"}
    engine = zquant.Engine.open(**files, **machine)
    assert any("turbo is assumed" in notice for notice in paint(engine).notices)
    engine.close()
    engine = zquant.Engine.open(**files, **machine, variant="turbo")
    assert paint(engine).notices == []
    engine.close()


def test_an_engine_is_closed_by_its_context_and_says_so(toy_folder: Path) -> None:
    with zquant.Engine.open(toy_folder, device="cpu", compute_dtype="float32") as engine:
        assert len(paint(engine, steps=1).images) == 1
    for use in (paint, lambda engine: engine.plan(request())):
        with pytest.raises(ValueError, match=r"the engine is closed; open another with Engine\.op"):
            use(engine)
    engine.close()


def test_a_plan_and_its_smallest_ceiling_measure_the_machine_once(
    toy_engine: zquant.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    monkeypatch.setattr(forecast, "machine_of", lambda *_: measured.append(1) or MACHINE)
    smallest = toy_engine.smallest(toy_engine.plan(request()))
    assert smallest is not None
    assert smallest < MACHINE.device_bytes
    assert len(measured) == 1


def test_an_unknown_device_is_found_before_the_files(tmp_path: Path, toy_folder: Path) -> None:
    with pytest.raises(DeviceError, match="device 'tpu' is unknown"):
        zquant.Engine.open(toy_folder, device="tpu")
