"""The model that zquant ships: pictures that a program judges, and faults that it must notice.

The other tests prove that the arithmetic is the reference's, with weights that mean nothing; here a
sampler, a layer or a quantizer that is wrong in any way paints a wrong picture.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from demo_scenes import Scene, Shape
from judge_demo import judge
from PIL import Image
from torch import Tensor

from zquant import Engine, RunRequest, RunResult, sampling
from zquant.cli.main import main
from zquant.layers.linear import QuantLinear
from zquant.models.dit_block import Attention


def scene(*words: str) -> Scene:
    """'red circle white', or 'red circle left blue ring black'."""
    color, kind, *rest = words
    shapes, relation = [Shape(color=color, kind=kind)], None
    if len(rest) > 1:
        relation, other, other_kind, *rest = rest
        shapes.append(Shape(color=other, kind=other_kind))
    return Scene(shapes=tuple(shapes), relation=relation, background=rest[0])


PROMPTS = {
    "a red circle on a white background": scene("red", "circle", "white"),
    "a green triangle on a black background": scene("green", "triangle", "black"),
    "a blue square": scene("blue", "square", "white"),
    "a red circle left of a blue square": scene("red", "circle", "left", "blue", "square", "white"),
    "a yellow ring above a purple square on a gray background": scene(
        "yellow", "ring", "above", "purple", "square", "gray"
    ),
    "an orange square to the right of a cyan circle on a black background": scene(
        "orange", "square", "right", "cyan", "circle", "black"
    ),
    "a pink triangle below a green circle on a brown background": scene(
        "pink", "triangle", "below", "green", "circle", "brown"
    ),
    "蓝色方块在红色圆形的右边": scene("blue", "square", "right", "red", "circle", "white"),
    "黄色三角形在紫色圆环的上面，黑色背景": scene(
        "yellow", "triangle", "above", "purple", "ring", "black"
    ),
    "绿色圆环，灰色背景": scene("green", "ring", "gray"),
}


def accepted(engine: Engine, **options: object) -> int:
    """How many of the ten prompts the judge finds painted."""
    return sum(
        judge(engine.generate(RunRequest(prompt=p, seed=0, **options)).images[0], s).right  # type: ignore[arg-type]
        for p, s in PROMPTS.items()
    )


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine.open("demo", device="cpu", compute_dtype="float32")
    yield engine
    engine.close()


def painted(engine: Engine, prompt: str, **options: object) -> RunResult:
    request = RunRequest(prompt=prompt, seed=3, keep_latents=True, **options)  # type: ignore[arg-type]
    return engine.generate(request)


def relative_l2(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def test_ten_prompts_are_painted_as_asked(engine: Engine) -> None:
    assert accepted(engine) >= 8


def test_the_command_paints_the_first_picture_of_a_newcomer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "first.png"
    words = ["a red circle left of a blue square", "--model", "demo", "--seed", "0"]
    assert main(["run", *words, "--out", str(out), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["timings"]["total"] > 0
    with Image.open(out) as image:
        assert image.size == (128, 128)
        assert judge(image.convert("RGB"), PROMPTS[words[0]]).right


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 0.1), ("float16", 0.01)])
def test_compute_dtypes_agree(engine: Engine, dtype: str, limit: float) -> None:
    prompt = "a red circle left of a blue square"
    other = Engine.open("demo", device="cpu", compute_dtype=dtype)
    found, wanted = painted(other, prompt), painted(engine, prompt)
    other.close()
    assert found.latents is not None
    assert wanted.latents is not None
    assert 0 < relative_l2(found.latents[-1], wanted.latents[-1]) < limit
    assert judge(found.images[0], PROMPTS[prompt]).right


def test_one_step_paints_the_mean_of_what_eight_steps_choose_from(engine: Engine) -> None:
    prompt = "a red circle left of a blue square"
    one, eight = (painted(engine, prompt, steps=n, count=6).latents for n in (1, 8))
    assert one is not None
    assert eight is not None
    mean = eight[-1].mean(0)
    for early, late in zip(one[-1], eight[-1], strict=True):
        assert early.std() < late.std()  # a mean has less contrast
        assert relative_l2(early, mean) < 0.85 * relative_l2(late, mean)  # six make a rough mean


def test_another_seed_moves_the_shapes_and_keeps_the_scene(engine: Engine) -> None:
    prompt = "a green triangle on a black background"
    images = engine.generate(RunRequest(prompt=prompt, seed=5, count=2)).images
    assert images[0].tobytes() != images[1].tobytes()
    assert all(judge(image, PROMPTS[prompt]).right for image in images)


def reversed_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    denoise = sampling.denoise

    def wrong(
        velocity: Callable[[Tensor, int], Tensor], *rest: object, **options: object
    ) -> Tensor:
        return denoise(lambda x, step: -velocity(x, step), *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(sampling, "denoise", wrong)


def swapped_qkv(monkeypatch: pytest.MonkeyPatch) -> None:
    project = Attention.project

    def wrong(self: Attention, *rest: object) -> Tensor:
        self.to_q, self.to_v = self.to_v, self.to_q
        try:
            return project(self, *rest)  # type: ignore[arg-type]
        finally:
            self.to_q, self.to_v = self.to_v, self.to_q

    monkeypatch.setattr(Attention, "project", wrong)


def shifted_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output lands one place off, as an unpacking that is wrong by one row would have it."""
    forward = QuantLinear.forward

    def wrong(self: QuantLinear, x: Tensor, out: Tensor | None = None) -> Tensor:
        y = forward(self, x).roll(1, -1)
        return y if out is None else out.copy_(y)

    monkeypatch.setattr(QuantLinear, "forward", wrong)


def swapped_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    from zquant.models.vae import VAE

    decode = VAE.decode
    monkeypatch.setattr(VAE, "decode", lambda self, z: decode(self, z).flip(1))


@pytest.mark.parametrize("fault", [reversed_sampler, swapped_qkv, shifted_rows, swapped_channels])
def test_the_judge_notices_a_broken_engine(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    engine = Engine.open("demo", device="cpu", compute_dtype="float32")
    try:
        assert accepted(engine) <= 3
    finally:
        engine.close()


def test_four_bits_still_paint_as_asked(tmp_path: Path) -> None:
    words = ["convert", "demo", str(tmp_path / "q4"), "--qtype", "Q4_K_M", "--allow-requantize"]
    assert main(words) == 0
    engine = Engine.open(tmp_path / "q4", device="cpu", compute_dtype="float32")
    try:
        assert accepted(engine) >= 7
    finally:
        engine.close()


def test_peak_values_stay_finite_in_float16() -> None:
    engine = Engine.open("demo", device="cpu", compute_dtype="float16")
    result = engine.generate(RunRequest(prompt="a red circle", seed=0, keep_latents=True))
    engine.close()
    assert result.latents is not None
    assert torch.isfinite(result.latents).all()
