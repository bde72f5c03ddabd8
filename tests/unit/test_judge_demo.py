"""The judge of the demo model: sure of what the world draws, and of every picture that is wrong."""

import io
import random
from dataclasses import replace
from types import SimpleNamespace

import demo_sight
import judge_demo
import numpy as np
import pytest
from demo_scenes import BACKGROUNDS, COLORS, KINDS, SIZE, Scene, Shape, draw, random_scene
from judge_demo import Verdict, judge
from PIL import Image, ImageDraw, ImageFilter

WHITE, RED = BACKGROUNDS["white"], COLORS["red"]


def scenes(n: int, seed: int) -> list[tuple[Scene, random.Random]]:
    """Scenes of training and held-out ones, each with the numbers its picture is drawn from."""
    rng = random.Random(seed)
    return [(random_scene(rng, held_out=i % 2 == 0), random.Random(rng.random())) for i in range(n)]


def two_shapes(n: int, seed: int) -> list[tuple[Scene, random.Random]]:
    return [s for s in scenes(2 * n, seed) if len(s[0].shapes) == 2][:n]


def pair(relation: str = "left", *, kind: str = "circle", other_kind: str = "square") -> Scene:
    shapes = (Shape(color="red", kind=kind), Shape(color="blue", kind=other_kind))
    return Scene(shapes=shapes, relation=relation, background="white")


def alone(kind: str = "circle", *, background: str = "white") -> Scene:
    shape = Shape(color="red", kind=kind)
    return Scene(shapes=(shape,), relation=None, background=background)


def from_array(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=60)
    return Image.open(file).convert("RGB")


def noisy(image: Image.Image, sigma: float) -> Image.Image:
    return from_array(image + np.random.default_rng(0).normal(0, sigma, (*image.size, 3)))


def shifted(image: Image.Image, *levels: int) -> Image.Image:
    return from_array(np.asarray(image) + np.array(levels))


def polygon(*points: tuple[float, float], color: tuple[int, int, int] = RED) -> Image.Image:
    """A polygon in units of 32 pixels around the middle, on white."""
    image = Image.new("RGB", (4 * SIZE, 4 * SIZE), WHITE)
    corners = [(4 * (64 + 32 * x), 4 * (64 + 32 * y)) for x, y in points]
    ImageDraw.Draw(image).polygon(corners, fill=color)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def wobbling(image: Image.Image) -> Image.Image:
    """Every edge two pixels to and fro."""
    scale = image.width / SIZE
    rows, columns = np.mgrid[: image.height, : image.width] / scale
    down, right = 2 * np.sin(columns / 3), 2 * np.sin(rows / 3)
    at = [np.rint(a * scale).astype(int) for a in (rows + down, columns + right)]
    y, x = (np.clip(a, 0, image.width - 1) for a in at)
    return from_array(np.asarray(image)[y, x])


DISTURBANCES = {
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(1.0)),
    "noise": lambda image: noisy(image, 8),
    "jpeg": jpeg,
    "darker": lambda image: from_array(np.asarray(image) * 0.95),
    "colder": lambda image: shifted(image, -13, 0, 13),
    "off by 25": lambda image: shifted(image, 25, -25, 25),
    "wobble": wobbling,
    "all": lambda image: jpeg(noisy(image.filter(ImageFilter.GaussianBlur(1.0)), 8)),
}


@pytest.mark.parametrize(("size", "n"), [(128, 200), (192, 40), (256, 40)])
def test_every_drawn_scene_is_right(size, n):
    for scene, rng in scenes(n, seed=size):
        verdict = judge(draw(scene, rng, size), scene)
        assert verdict.right, (scene, verdict)


def test_a_scene_may_be_told_from_either_shape():
    for scene, rng in two_shapes(15, seed=7):
        assert judge(draw(scene, rng), scene.turned()).right


@pytest.mark.parametrize("disturb", DISTURBANCES.values(), ids=DISTURBANCES)
def test_disturbed_pictures_are_still_right(disturb):
    for i, (scene, rng) in enumerate(scenes(30, seed=1)):
        verdict = judge(disturb(draw(scene, rng, (128, 256)[i % 2])), scene)
        assert verdict.right, (scene, verdict)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("color", COLORS)
def test_every_color_and_kind_is_told_on_every_background(color, kind):
    for background in BACKGROUNDS:
        shapes = (Shape(color=color, kind=kind),)
        scene = Scene(shapes=shapes, relation=None, background=background)
        found = str(demo_sight.describe(draw(scene, random.Random(0))))
        article = "an" if color == "orange" else "a"
        assert found == f"{article} {color} {kind} on a {background} background"


def test_found_reads_like_a_caption():
    image = draw(pair("right", other_kind="ring"), random.Random(0))
    verdict = judge(image, pair("right", other_kind="ring"))
    assert verdict.found == "a blue ring left of a red circle on a white background"
    assert judge(draw(pair("below"), random.Random(0)), pair()).found == (
        "a blue square above a red circle on a white background"
    )


def failed(image: Image.Image, scene: Scene) -> set[str]:
    verdict = judge(image, scene)
    return {n for n in ("color", "kind", "relation", "background") if not getattr(verdict, n)}


def test_swapped_colors_are_wrong():
    for scene, rng in two_shapes(15, seed=2):
        first, second = scene.shapes
        swapped = (replace(first, color=second.color), replace(second, color=first.color))
        # with two shapes of one kind it is the same as a swapped relation
        expected = {"relation"} if first.kind == second.kind else {"color"}
        assert failed(draw(replace(scene, shapes=swapped), rng), scene) == expected


def test_a_swapped_relation_is_wrong():
    for scene, rng in two_shapes(15, seed=3):
        swapped = replace(scene.turned(), shapes=scene.shapes)
        assert failed(draw(swapped, rng), scene) == {"relation"}


def test_beside_is_not_above():
    assert failed(draw(pair("above"), random.Random(0)), pair("left")) == {"relation"}


@pytest.mark.parametrize("wanted", KINDS)
@pytest.mark.parametrize("painted", KINDS)
def test_another_kind_is_wrong(painted, wanted):
    expected = set() if painted == wanted else {"kind"}
    for seed in range(3):
        rng = random.Random(seed)
        assert failed(draw(alone(painted), rng), alone(wanted)) == expected
        assert failed(draw(pair(kind=painted), rng), pair(kind=wanted)) == expected


@pytest.mark.parametrize("background", ["gray", "black", "brown"])
def test_another_background_is_wrong(background):
    image = draw(alone(background=background), random.Random(0))
    assert failed(image, alone()) == {"background"}


def test_a_missing_shape_is_wrong():
    for scene, rng in two_shapes(10, seed=4):
        single = replace(scene, shapes=scene.shapes[:1], relation=None)
        assert failed(draw(single, rng), scene) == {"color", "kind", "relation"}


def test_an_extra_shape_is_wrong():
    for scene, rng in two_shapes(10, seed=5):
        single = replace(scene, shapes=scene.shapes[:1], relation=None)
        assert failed(draw(scene, rng), single) == {"color", "kind", "relation"}


@pytest.mark.parametrize("color", ["red", "yellow"])
def test_an_extra_spot_of_ten_pixels_is_wrong(color):
    image = draw(pair(), random.Random(0))
    ImageDraw.Draw(image).rectangle((5, 5, 14, 14), fill=COLORS[color])
    assert not judge(image, pair()).right


def test_swapped_channels_are_wrong():
    for scene, rng in scenes(30, seed=6):
        swapped = from_array(np.asarray(draw(scene, rng))[:, :, ::-1])
        # green and purple hardly change: there a brown background must tell
        if scene.background == "brown" or {s.color for s in scene.shapes} - {"green", "purple"}:
            assert not judge(swapped, scene).right, scene


@pytest.mark.parametrize("level", [20, 128, 245])
def test_a_blank_picture_is_wrong(level):
    image = Image.new("RGB", (SIZE, SIZE), (level,) * 3)
    for scene in (alone(), pair(), alone(background="black"), alone(background="gray")):
        verdict = judge(image, scene)
        assert {verdict.color, verdict.kind, verdict.relation} == {False}
        assert verdict.found.startswith("nothing on a ")


def test_noise_shows_nothing():
    levels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3))
    grey = levels[:, :, :1].repeat(3, axis=2)
    for image in (from_array(levels), from_array(grey)):
        assert failed(image, alone(background="gray")) == {
            "color", "kind", "relation", "background",
        }  # fmt: skip


def test_ghosts_are_told_from_faint_ones():
    image = draw(pair(), random.Random(0))
    faint, strong = image.copy(), image.copy()
    for canvas, color in ((faint, (225, 225, 245)), (strong, (205, 205, 205))):
        ImageDraw.Draw(canvas).ellipse((50, 4, 78, 30), fill=color)
    assert judge(faint, pair()).right
    assert failed(strong, pair()) == {"background"}


TURNED_SQUARE = [(0, -1), (1, 0), (0, 1), (-1, 0)]
STAR = [
    ((1 - i % 2 / 2) * np.sin(np.pi * i / 5), -(1 - i % 2 / 2) * np.cos(np.pi * i / 5))
    for i in range(10)
]
STRANGE = {
    "turned square": polygon(*TURNED_SQUARE),
    "star": polygon(*STAR),
    "triangle on its head": polygon((0, 1), (1.04, -0.8), (-1.04, -0.8)),
    "flat box": polygon((-1, -0.6), (1, -0.6), (1, 0.6), (-1, 0.6)),
    "half a circle": polygon(
        *[(np.cos(a), np.sin(a)) for a in np.linspace(0, np.pi, 50)],
    ),
    "between circle and square": polygon(
        *[
            (np.sign(c) * abs(c) ** 0.6, np.sign(s) * abs(s) ** 0.6)
            for a in np.linspace(0, 2 * np.pi, 200)
            for c, s in [(np.cos(a), np.sin(a))]
        ]
    ),
}


@pytest.mark.parametrize("image", STRANGE.values(), ids=STRANGE)
def test_a_shape_of_no_kind_is_unclear(image):
    sight = demo_sight.describe(image)
    assert str(sight) == "an unclear red shape on a white background"
    assert not any(judge(image, alone(kind)).right for kind in KINDS)


@pytest.mark.parametrize("kind", ["square", "triangle"])
def test_a_hole_is_for_rings_only(kind):
    image = draw(alone(kind), random.Random(0))
    ImageDraw.Draw(image).ellipse((54, 58, 74, 78), fill=WHITE)
    assert failed(image, alone(kind)) == {"kind"}
    assert failed(image, alone("ring")) == {"kind"}


def test_an_open_ring_is_unclear():
    image = draw(alone("ring"), random.Random(0))
    ImageDraw.Draw(image).rectangle((60, 20, 68, 64), fill=WHITE)
    assert failed(image, alone("ring")) == {"kind"}


def test_a_filled_ring_has_a_shape_too_many():
    image = draw(alone("ring"), random.Random(0))
    ImageDraw.Draw(image).ellipse((54, 54, 74, 74), fill=COLORS["green"])
    assert len(demo_sight.describe(image).shapes) == 2


def test_touching_shapes_of_two_colors_are_told_apart():
    image = Image.new("RGB", (SIZE, SIZE), WHITE)
    pen = ImageDraw.Draw(image)
    pen.rectangle((22, 44, 63, 85), fill=RED)
    pen.rectangle((64, 44, 105, 85), fill=COLORS["blue"])
    assert judge(image, pair(kind="square")).right
    assert judge(image.filter(ImageFilter.GaussianBlur(1.0)), pair(kind="square")).right


def test_a_color_between_two_is_unclear():
    between = tuple((a + b) // 2 for a, b in zip(RED, COLORS["green"], strict=True))
    image = polygon((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9), color=between)
    found = str(demo_sight.describe(image))
    assert found == "a square of unclear color on a white background"
    assert failed(image, alone("square")) == {"color"}


def test_a_background_of_another_world_is_unclear():
    image = Image.new("RGB", (SIZE, SIZE), (40, 90, 60))
    assert str(demo_sight.describe(image)) == "nothing on an unclear background"


@pytest.mark.parametrize("size", [(64, 64), (128, 192)])
def test_a_picture_of_another_size_is_refused(size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels"):
        judge(Image.new("RGB", size), alone())


class Painter:
    """An engine that knows every caption; the pictures of even seeds are painted wrong."""

    def __init__(self, cases: list[judge_demo.Case], *, wrong: bool) -> None:
        self.scenes = {(case.caption, case.seed): case.scene for case in cases}
        self.wrong = wrong

    def generate(self, request):
        assert (request.width, request.height, request.steps) == (SIZE, SIZE, 3)
        assert request.keep_latents
        scene = self.scenes[request.prompt, request.seed]
        if self.wrong and request.seed % 2 == 0:
            other = "black" if scene.background != "black" else "white"
            scene = replace(scene, background=other)
        return SimpleNamespace(images=[draw(scene, random.Random(request.seed))])


def test_held_out_cases_follow_from_the_seed():
    cases = judge_demo.held_out_cases(20, seed=3)
    assert cases == judge_demo.held_out_cases(20, seed=3)
    assert cases[:5] == judge_demo.held_out_cases(5, seed=3)
    assert cases != judge_demo.held_out_cases(20, seed=4)
    assert [case.seed for case in cases] == list(range(20))
    assert all(case.scene.held_out for case in cases)


def test_a_perfect_painter_has_every_share_at_one(capsys):
    cases = judge_demo.held_out_cases(20, seed=0)
    report = judge_demo.measure(Painter(cases, wrong=False), cases, steps=3)
    assert report["failures"] == []
    assert {g["right"] for g in report["accuracy"].values()} == {1.0}
    assert report["accuracy"]["one shape"]["relation"] is None
    assert "20 of 20 pictures, 20 right" in capsys.readouterr().err


def test_failures_are_counted_where_they_belong():
    cases = judge_demo.held_out_cases(20, seed=0)
    verdicts: list[Verdict] = []
    painter = Painter(cases, wrong=True)
    report = judge_demo.measure(painter, cases, steps=3, each=lambda _, v: verdicts.append(v))
    shares = report["accuracy"]
    assert (shares["all"]["right"], shares["all"]["background"], shares["all"]["kind"]) == (
        0.5, 0.5, 1.0,
    )  # fmt: skip
    assert [v.right for v in verdicts] == [case.seed % 2 == 1 for case in cases]
    assert [f["seed"] for f in report["failures"]] == list(range(0, 20, 2))
    for parts in (("one shape", "two shapes"), ("English", "Chinese")):
        assert sum(shares[part]["prompts"] for part in parts) == 20


def test_the_contact_sheet_frames_what_is_wrong():
    image = Image.new("RGB", (16, 16), "blue")
    sheet = judge_demo.grid([(image, True), (image, False), (image, True)], columns=2)
    assert sheet.size == (44, 44)
    assert sheet.getpixel((23, 10)) == (255, 0, 0)
    assert sheet.getpixel((3, 10)) == (255, 255, 255)
    assert sheet.getpixel((10, 30)) == (0, 0, 255)
