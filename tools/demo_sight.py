"""Say what a picture of the demo model's world shows: classical image analysis, no network.

    background   median of the border -> nearest colour of `BACKGROUNDS`
    shapes       nearest colour of every pixel -> connected pixels of one colour -> their cores,
                 which a thin outline of mixed colours has not -> grown to the half-way contour
    kind         the ideal shape of the same centroid and area whose edge lies nearest:
                     off = area of (shape xor ideal) / perimeter / radius
                 a ring is a circle with a round hole in the middle
    relation     the direction between two centres

What is not clear is called "unclear". Size and exact place are not told: no caption names them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from demo_scenes import BACKGROUNDS, COLORS, SIZE, Rgb
from PIL import Image, ImageFilter

__all__ = ["CLUTTERED", "UNCLEAR", "Sight", "SightedShape", "describe", "relation"]

UNCLEAR = "unclear"
CLUTTERED = "cluttered"

# pixels at 128 x 128, colours in 0..255
BORDER = 3
MAX_COLOR_DISTANCE = 50  # colours lie 86 apart or more; 25 off in every channel is 43
MIN_CORE = 12  # pixels of a spot, a rim of 2 taken off; smaller spots are no shapes
RIM = 2  # mixed colours at an edge are no wider than twice this
GHOST = 48  # a pixel this far from the background is no longer a faint ghost
GHOST_MARGIN = 3  # around a shape, where its soft edge ends
MAX_CLUTTER = 0.01  # of all pixels
MIN_RADIUS = 10  # of a shape whose kind can be told
MAX_OFF = 0.07  # an edge that wobbles by 2 pixels is 0.06 off at the smallest radius
MAX_OFF_RATIO = 0.75  # between the nearest kind and the next; half a circle, half a square has 1
MAX_HOLE_OFF = 0.15  # in radii of the hole
SOLID = 0.05  # largest hole of a solid shape, as a part of its filled area; a ring has 0.30
RING_HOLE = (0.12, 0.6)
MAX_HOLE_SHIFT = 0.2  # of the radius
MIN_APART = 24  # two centres with a direction between them
MAX_SLANT = 0.5  # the smaller of the two coordinates of a direction over the larger

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ideal:
    """A kind of radius 1 as `demo_scenes` draws it; `y` is the centroid's, seen from the centre."""

    area: float
    perimeter: float
    y: float
    inside: Callable[[Floats, Floats], Mask]


IDEALS = {
    "circle": Ideal(
        area=math.pi, perimeter=2 * math.pi, y=0.0, inside=lambda x, y: x**2 + y**2 <= 1
    ),
    "square": Ideal(
        area=(2 * 0.88) ** 2,
        perimeter=8 * 0.88,
        y=0.0,
        inside=lambda x, y: np.maximum(np.abs(x), np.abs(y)) <= 0.88,
    ),
    "triangle": Ideal(
        area=1.8 * 1.04,
        perimeter=2 * (1.04 + math.hypot(1.8, 1.04)),
        y=0.2,
        inside=lambda x, y: (y <= 0.8) & (np.abs(x) <= 1.04 / 1.8 * (y + 1)),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SightedShape:
    """A shape in a picture; the centre is in pixels at 128 x 128."""

    color: str
    kind: str
    x: float
    y: float

    def __str__(self) -> str:
        """A few words with their article."""
        if self.kind == UNCLEAR:
            return f"an unclear {'' if self.color == UNCLEAR else self.color + ' '}shape"
        if self.color == UNCLEAR:
            return f"a {self.kind} of unclear color"
        return f"{'an' if self.color[0] in 'aeiou' else 'a'} {self.color} {self.kind}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What a picture shows; of two shapes the first is the left or the upper one."""

    shapes: tuple[SightedShape, ...]
    background: str

    def __str__(self) -> str:
        """A sentence like a caption."""
        where = relation(*self.shapes) if len(self.shapes) == 2 else UNCLEAR
        join = {UNCLEAR: " and ", "left": " left of "}.get(where, f" {where} ")
        what = join.join(map(str, self.shapes)) or "nothing"
        if len(self.shapes) > 3:
            what = f"{len(self.shapes)} shapes"
        article = "an" if self.background == UNCLEAR else "a"
        return f"{what} on {article} {self.background} background"


def describe(image: Image.Image) -> Sight:
    """Say what a picture shows, without knowing what it should show.

    Args:
        image: square, 128 to 256 pixels a side; converted to RGB.

    Raises:
        ValueError: the picture is not square, or too small.
    """
    pixels = _pixels(image)
    border = np.ones(pixels.shape[:2], bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    behind: Floats = np.median(pixels[border], axis=0)
    cores = _cores(pixels, behind)
    fronts = [np.median(pixels[core], axis=0) for core in cores]
    masks = _grown(pixels, behind, cores, fronts)
    shapes = [
        SightedShape(color=_nearest(front, COLORS), kind=kind, x=x, y=y)
        for front, (kind, x, y) in zip(fronts, map(_kind, masks), strict=True)
    ]
    if len(shapes) == 2 and relation(*shapes) in ("right", "below"):
        shapes.reverse()
    clutter = np.linalg.norm(pixels - behind, axis=-1) > GHOST
    for mask in masks:
        clutter &= ~_widened(mask, GHOST_MARGIN)
    background = CLUTTERED if clutter.mean() > MAX_CLUTTER else _nearest(behind, BACKGROUNDS)
    return Sight(shapes=tuple(shapes), background=background)


def relation(first: SightedShape, second: SightedShape) -> str:
    """Where the first shape lies, seen from the second: a word of `RELATIONS`, or "unclear"."""
    dx, dy = first.x - second.x, first.y - second.y
    small, large = sorted((abs(dx), abs(dy)))
    if large < MIN_APART or small > MAX_SLANT * large:
        return UNCLEAR
    if large == abs(dx):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def _pixels(image: Image.Image) -> Floats:
    """`[128, 128, 3]`, lone noisy pixels taken out."""
    if image.width != image.height or image.width < SIZE:
        raise ValueError(
            f"the picture has {image.width}x{image.height} pixels; the judge needs a square one of "
            f"at least {SIZE}x{SIZE}"
        )
    small = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(small.filter(ImageFilter.MedianFilter(3)), np.float64)


def _nearest(color: Floats, palette: dict[str, Rgb]) -> str:
    """The name of the nearest colour, if it is near."""
    distances = {name: float(np.linalg.norm(color - rgb)) for name, rgb in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= MAX_COLOR_DISTANCE else UNCLEAR


def _cores(pixels: Floats, behind: Floats) -> list[Mask]:
    """Per shape the pixels that surely belong to it: connected, of one colour, off the edge."""
    seen = [c for c in COLORS.values() if np.linalg.norm(behind - c) > MAX_COLOR_DISTANCE]
    palette = np.array([behind, *seen])
    nearest = ((palette**2).sum(-1) - 2 * pixels @ palette.T).argmin(-1)  # |p - c|^2 less |p|^2
    cores = []
    for i in range(1, len(palette)):
        rest = nearest == i
        if rest.sum() < MIN_CORE:
            continue
        inner = ~_widened(~rest, RIM)
        while (rest & inner).any():  # a component without a core is an outline or a speck
            start = np.zeros(rest.shape, np.uint16)
            start.flat[np.argmax(rest & inner)] = 1
            component = _spread(start, rest) == 1
            rest &= ~component
            if (component & inner).sum() >= MIN_CORE:
                cores.append(component & inner)
    return cores


def _grown(
    pixels: Floats, behind: Floats, cores: list[Mask], fronts: Sequence[Floats]
) -> list[Mask]:
    """The cores with all that hangs together with them and is more shape than background."""
    more = [
        (pixels - behind) @ (front - behind) > 0.5 * float(((front - behind) ** 2).sum())
        for front in fronts
    ]
    labels = np.zeros(pixels.shape[:2], np.uint16)
    for i, core in enumerate(cores, start=1):
        labels[core] = i
    labels = _spread(labels, np.any(more, axis=0) if more else labels > 0)
    return [
        core | (own & (labels == i))
        for i, (core, own) in enumerate(zip(cores, more, strict=True), 1)
    ]


def _spread(labels: Labels, room: Mask) -> Labels:
    """Labels carried on to their unlabelled neighbours in `room` until none is left."""
    wide = np.pad(labels, 1)
    inside = wide[1:-1, 1:-1]
    room = room & (inside == 0)
    while True:
        near = np.maximum(
            np.maximum(wide[:-2, 1:-1], wide[2:, 1:-1]), np.maximum(wide[1:-1, :-2], wide[1:-1, 2:])
        )
        fresh = room & (near > 0)
        if not fresh.any():
            return inside
        np.copyto(inside, near, where=fresh)
        room &= ~fresh


def _widened(mask: Mask, rim: int) -> Mask:
    """The mask and all within `rim` pixels of it, up to the picture's edge."""
    grey = Image.fromarray(mask.astype(np.uint8))
    return np.asarray(grey.filter(ImageFilter.MaxFilter(2 * rim + 1))) > 0


def _kind(mask: Mask) -> tuple[str, float, float]:
    """Kind and centre of a shape."""
    filled = _filled(mask)
    hole = filled & ~mask
    offs = {kind: _off(filled, ideal) for kind, ideal in IDEALS.items()}
    (kind, off), (_, next_off) = sorted(offs.items(), key=lambda item: item[1])[:2]
    y, x, radius = _fit(filled, IDEALS[kind])
    share = hole.sum() / filled.sum()
    if radius < MIN_RADIUS or off > MAX_OFF or off > MAX_OFF_RATIO * next_off:
        kind = UNCLEAR
    elif share > SOLID:
        round_hole = RING_HOLE[0] <= share <= RING_HOLE[1] and _hole_fits(hole, x, y, radius)
        kind = "ring" if kind == "circle" and round_hole else UNCLEAR
    return kind, x, y


def _filled(mask: Mask) -> Mask:
    """The mask and its holes."""
    at = np.argwhere(mask)
    (top, left), (bottom, right) = at.min(0), at.max(0)
    outside = ~mask
    outside[top + 1 : bottom, left + 1 : right] = False
    return _spread(outside.astype(np.uint16), ~mask) == 0


def _hole_fits(hole: Mask, x: float, y: float, radius: float) -> bool:
    """Whether the hole is round and in the middle."""
    hole_y, hole_x, _ = _fit(hole, IDEALS["circle"])
    shift = math.hypot(hole_x - x, hole_y - y)
    return shift <= MAX_HOLE_SHIFT * radius and _off(hole, IDEALS["circle"]) <= MAX_HOLE_OFF


def _fit(mask: Mask, ideal: Ideal) -> tuple[float, float, float]:
    """Centre (y, x) and radius of the ideal shape with the mask's centroid and area."""
    at = np.argwhere(mask)
    y, x = at.mean(0)
    radius = math.sqrt(len(at) / ideal.area)
    return float(y) - ideal.y * radius, float(x), radius


def _off(mask: Mask, ideal: Ideal) -> float:
    """Mean distance between the mask's edge and that of the fitted ideal, in radii."""
    y, x, radius = _fit(mask, ideal)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    fitted = ideal.inside((columns - x) / radius, (rows - y) / radius)
    return float((mask ^ fitted).sum()) / (ideal.perimeter * radius) / radius
