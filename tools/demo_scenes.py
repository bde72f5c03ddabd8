"""The world of the demo model: scenes of one or two shapes, their captions and their pictures.

    scene -> caption   a small English and Chinese grammar
    scene -> picture   Pillow, any square size; the units below are pixels at 128 x 128

A caption decides everything but a few pixels of place and size. A fixed tenth of all scenes is
held out: the same two shapes in the same relation never occur in training, in no words and on no
background.
"""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

__all__ = ["BACKGROUNDS", "COLORS", "DEFAULT_BACKGROUND", "KINDS", "RELATIONS", "SIZE"]
__all__ += ["Scene", "Shape", "all_texts", "caption", "draw", "random_scene", "words"]

SIZE = 128
SUPERSAMPLE = 4

Rgb = tuple[int, int, int]

COLORS: dict[str, Rgb] = {
    "red": (215, 40, 40),
    "orange": (255, 145, 20),
    "yellow": (250, 225, 50),
    "green": (40, 160, 70),
    "cyan": (60, 205, 225),
    "blue": (45, 80, 220),
    "purple": (130, 50, 180),
    "pink": (255, 140, 195),
}
BACKGROUNDS: dict[str, Rgb] = {
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "black": (20, 20, 20),
    "brown": (105, 65, 40),
}
DEFAULT_BACKGROUND = "white"
KINDS = ("circle", "square", "triangle", "ring")
RELATIONS = ("left", "right", "above", "below")  # of the first shape, seen from the second

_CHINESE = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色",
    "cyan": "青色", "blue": "蓝色", "purple": "紫色", "pink": "粉色",
    "white": "白色", "gray": "灰色", "black": "黑色", "brown": "棕色",
    "circle": "圆形", "square": "方块", "triangle": "三角形", "ring": "圆环",
    "left": "左边", "right": "右边", "above": "上面", "below": "下面",
}  # fmt: skip
_ENGLISH = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_DIRECTION = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One coloured shape."""

    color: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One or two shapes; `relation` is where the first lies, seen from the second."""

    shapes: tuple[Shape, ...]
    relation: str | None
    background: str

    def turned(self) -> "Scene":
        """The same scene told from the other shape."""
        if self.relation is None:
            return self
        shapes = self.shapes[::-1]
        return Scene(shapes=shapes, relation=_OPPOSITE[self.relation], background=self.background)

    @property
    def held_out(self) -> bool:
        """Whether training never sees it; told from either shape the answer is the same."""
        scene = self.turned() if self.relation in ("right", "below") else self
        words = [word for shape in scene.shapes for word in (shape.color, shape.kind)]
        words.append(scene.relation or scene.background)
        return zlib.crc32(" ".join(words).encode()) % 10 == 0


def random_scene(rng: random.Random, *, held_out: bool = False) -> Scene:
    """A scene of training, or one that is held out; three in four have two shapes."""
    while True:
        n = 1 if rng.random() < 0.25 else 2
        colors = rng.sample(list(COLORS), n)
        scene = Scene(
            shapes=tuple(Shape(color=color, kind=rng.choice(KINDS)) for color in colors),
            relation=rng.choice(RELATIONS) if n == 2 else None,
            background=rng.choice(list(BACKGROUNDS)),
        )
        if scene.held_out == held_out:
            return scene


def caption(scene: Scene, rng: random.Random) -> str:
    """One of the ways to say the scene, in English or Chinese."""
    return rng.choice(list(_captions(scene)))


def all_texts() -> Iterator[str]:
    """Every word of the grammar in every place where it can stand."""
    for i, color in enumerate(COLORS):
        for j, kind in enumerate(KINDS):
            other = Shape(color=list(COLORS)[i - 1], kind=KINDS[j - 1])
            shapes = (Shape(color=color, kind=kind), other)
            for background in BACKGROUNDS:
                yield from _captions(Scene(shapes=shapes[:1], relation=None, background=background))
                for relation in RELATIONS:
                    scene = Scene(shapes=shapes, relation=relation, background=background)
                    yield from _captions(scene)


def words() -> list[str]:
    """Every word of the grammar, English in lower case and Chinese."""
    english = {word for text in all_texts() if text.isascii() for word in text.split()}
    return sorted(english | set(_CHINESE.values()) | {"在", "的", "背景"})


def _captions(scene: Scene) -> Iterator[str]:
    """English and Chinese captions, about equally many."""
    background = scene.background
    english = [f" on a {background} background"]
    chinese = [_CHINESE[background] + "背景"]
    if background == DEFAULT_BACKGROUND:  # may go without saying
        english.append("")
        chinese.append("")
    first, *others = scene.shapes
    for words in _ENGLISH[scene.relation] if scene.relation else ("",):
        text = _english(first)
        if others:
            text = f"{text} {words} {_english(others[0])}"
        for end in english:
            yield text + end
    for end in chinese:
        text = _chinese(first)
        if others:
            assert scene.relation is not None
            text = f"{text}在{_chinese(others[0])}的{_CHINESE[scene.relation]}"
        yield f"{text}，{end}" if end else text


def _english(shape: Shape) -> str:
    article = "an" if shape.color[0] in "aeiou" else "a"
    return f"{article} {shape.color} {shape.kind}"


def _chinese(shape: Shape) -> str:
    return _CHINESE[shape.color] + _CHINESE[shape.kind]


def draw(scene: Scene, rng: random.Random, size: int = SIZE) -> Image.Image:
    """The scene as an RGB picture; `rng` decides a few pixels of place and size."""
    unit = SUPERSAMPLE * size / SIZE
    canvas = Image.new("RGB", (SUPERSAMPLE * size,) * 2, BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(canvas)
    alone = scene.relation is None
    for shape, side in zip(scene.shapes, (1, -1), strict=False):
        dx, dy = (0, 0) if alone else _DIRECTION[scene.relation or ""]
        x, y = (64 + 31 * side * d + rng.uniform(-3, 3) for d in (dx, dy))
        radius = rng.uniform(29, 32) if alone else rng.uniform(21, 23)
        _draw_shape(pen, shape, BACKGROUNDS[scene.background], unit, x, y, radius)
    return canvas.resize((size, size), Image.Resampling.BOX)


def _draw_shape(
    pen: ImageDraw.ImageDraw,
    shape: Shape,
    behind: Rgb,
    unit: float,
    x: float,
    y: float,
    radius: float,
) -> None:
    def circle(r: float, fill: Rgb) -> None:
        pen.ellipse([(x - r) * unit, (y - r) * unit, (x + r) * unit, (y + r) * unit], fill=fill)

    color = COLORS[shape.color]
    if shape.kind in ("circle", "ring"):
        circle(radius, color)
        if shape.kind == "ring":
            circle(0.55 * radius, behind)
    elif shape.kind == "square":
        half = 0.88 * radius
        corners = [(x - half) * unit, (y - half) * unit, (x + half) * unit, (y + half) * unit]
        pen.rectangle(corners, fill=color)
    else:
        top, base, half = y - radius, y + 0.8 * radius, 1.04 * radius
        pen.polygon([(x * unit, top * unit), ((x + half) * unit, base * unit),
                     ((x - half) * unit, base * unit)], fill=color)  # fmt: skip
