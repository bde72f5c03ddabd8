"""Judge whether a picture shows a scene of the demo model's world, without any network.

    python tools/judge_demo.py --model MODEL [--prompts 200] [--seed 0] [--grid FILE] [--json]

A picture is described first (`demo_sight`) and compared with the scene afterwards; what is unclear
is never right. The command paints scenes that training never saw and prints how many are right.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

from demo_scenes import SIZE, Scene, caption, random_scene
from demo_sight import SightedShape, describe, relation
from PIL import Image

from zquant import Engine, RunRequest, RunResult
from zquant.errors import ZQuantError
from zquant.image import check_target

__all__ = ["Case", "Verdict", "grid", "held_out_cases", "judge", "measure"]

PROPERTIES = ("color", "kind", "relation", "background", "right")
GRID_PICTURES = 64
SHOWN_FAILURES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What of the scene the picture shows; `found` says in words what was seen instead.

    With a wrong number of shapes `color`, `kind` and `relation` are all wrong.
    """

    color: bool
    kind: bool
    relation: bool
    background: bool
    found: str

    @property
    def right(self) -> bool:
        """Whether the picture shows the scene."""
        return self.color and self.kind and self.relation and self.background


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A scene to paint, in words, from the noise of `seed`."""

    scene: Scene
    caption: str
    seed: int


def judge(image: Image.Image, scene: Scene) -> Verdict:
    """Compare a picture with a scene.

    Args:
        image: square, 128 to 256 pixels a side.
        scene: what it should show.

    Raises:
        ValueError: the picture is not square, or too small.
    """
    sight = describe(image)
    background = sight.background == scene.background
    best = (False, False, False)
    if len(sight.shapes) == len(scene.shapes):
        # which shape was meant is not known: the reading with the fewest errors is taken
        best = max(
            (_matches(shapes, scene) for shapes in permutations(sight.shapes)),
            key=lambda found: (sum(found), found),
        )
    color, kind, place = best
    found = str(sight)
    return Verdict(color=color, kind=kind, relation=place, background=background, found=found)


def _matches(shapes: Sequence[SightedShape], scene: Scene) -> tuple[bool, bool, bool]:
    """Colours, kinds and relation, each shape compared with the scene's in the same place."""
    pairs = list(zip(shapes, scene.shapes, strict=True))
    color = all(found.color == wanted.color for found, wanted in pairs)
    kind = all(found.kind == wanted.kind for found, wanted in pairs)
    return color, kind, scene.relation is None or relation(*shapes) == scene.relation


def held_out_cases(n: int, seed: int) -> list[Case]:
    """`n` scenes that training never sees, in words; picture i is painted from noise i."""
    rng, cases = random.Random(seed), []
    for i in range(n):
        scene = random_scene(rng, held_out=True)
        cases.append(Case(scene=scene, caption=caption(scene, rng), seed=i))
    return cases


def measure(
    engine: Engine,
    cases: Sequence[Case],
    *,
    steps: int = 8,
    each: Callable[[RunResult, Verdict], None] = lambda *_: None,
) -> dict[str, Any]:
    """Paint and judge; how many are right so far is said on stderr.

    Args:
        engine: a model of the demo's world.
        cases: what to paint, at 128 x 128.
        steps: denoising steps.
        each: called after every picture, in the order of `cases`; the result has latents.

    Returns:
        `accuracy`: per group of cases their number and the share that is right, in all and in each
        property (null where no case has it; only two shapes have a relation). `failures`: every
        wrong picture with what was found instead.

    Raises:
        ZQuantError: the model cannot paint.
    """
    verdicts: list[Verdict] = []
    for case in cases:
        request = RunRequest(
            prompt=case.caption,
            width=SIZE,
            height=SIZE,
            steps=steps,
            seed=case.seed,
            keep_latents=True,
        )
        result = engine.generate(request)
        verdicts.append(judge(result.images[0], case.scene))
        each(result, verdicts[-1])
        if len(verdicts) % 20 == 0 or len(verdicts) == len(cases):
            n_right = sum(v.right for v in verdicts)
            print(f"{len(verdicts)} of {len(cases)} pictures, {n_right} right", file=sys.stderr)
    return {"prompts": len(cases), "steps": steps, **_summary(cases, verdicts)}


def _summary(cases: Sequence[Case], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Accuracy per group, and the failures."""
    pairs = list(zip(cases, verdicts, strict=True))
    groups = {
        "all": pairs,
        "one shape": [p for p in pairs if len(p[0].scene.shapes) == 1],
        "two shapes": [p for p in pairs if len(p[0].scene.shapes) == 2],
        "English": [p for p in pairs if p[0].caption.isascii()],
        "Chinese": [p for p in pairs if not p[0].caption.isascii()],
    }
    return {
        "accuracy": {name: _accuracy(group) for name, group in groups.items()},
        "failures": [
            {"prompt": case.caption, "seed": case.seed, **asdict(verdict)}
            for case, verdict in pairs
            if not verdict.right
        ],
    }


def _accuracy(pairs: Sequence[tuple[Case, Verdict]]) -> dict[str, Any]:
    """Number of cases, and the share with each property right."""
    shares: dict[str, Any] = {"prompts": len(pairs)}
    for name in PROPERTIES:
        asked = [v for case, v in pairs if name != "relation" or case.scene.relation]
        shares[name] = sum(getattr(v, name) for v in asked) / len(asked) if asked else None
    return shares


def grid(pictures: Sequence[tuple[Image.Image, bool]], columns: int = 8) -> Image.Image:
    """A contact sheet of pictures of one size; those that are not right have a red frame."""
    cell, gap = pictures[0][0].width, 4
    rows = math.ceil(len(pictures) / columns)
    columns = min(columns, len(pictures))
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + gap) + gap), "white")
    for i, (image, right) in enumerate(pictures):
        x, y = gap + i % columns * (cell + gap), gap + i // columns * (cell + gap)
        if not right:
            sheet.paste((255, 0, 0), (x - 2, y - 2, x + cell + 2, y + cell + 2))
        sheet.paste(image, (x, y))
    return sheet


def main() -> int:
    """Paint, judge and print."""
    args = _arguments()
    pictures: list[tuple[Image.Image, bool]] = []

    def keep(result: RunResult, verdict: Verdict) -> None:
        if len(pictures) < GRID_PICTURES:
            pictures.append((result.images[0], verdict.right))

    cases = held_out_cases(args.prompts, args.seed)
    try:
        if args.grid:
            check_target(args.grid)
        with closing(Engine.open(args.model, compute_dtype=args.compute_dtype)) as engine:
            report = measure(engine, cases, steps=args.steps, each=keep)
    except (ZQuantError, OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    for failure in report["failures"][:SHOWN_FAILURES]:
        print(f"{failure['prompt']} -> {failure['found']}", file=sys.stderr)
    if args.grid:
        grid(pictures).save(args.grid)
    print(json.dumps(report, ensure_ascii=False) if args.json else _table(report["accuracy"]))
    return 0


def _table(accuracy: dict[str, dict[str, Any]]) -> str:
    """A line per group."""
    lines = [f"{'':10} {'prompts':>10}" + "".join(f"{name:>12}" for name in PROPERTIES)]
    for group, shares in accuracy.items():
        cells = ("-" if shares[n] is None else f"{shares[n]:.1%}" for n in PROPERTIES)
        lines.append(f"{group:10} {shares['prompts']:10}" + "".join(f"{c:>12}" for c in cells))
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a model folder")
    parser.add_argument("--prompts", type=int, default=200, help="scenes to paint")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of scenes")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--compute-dtype", default="float32")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="PNG of the first 64 pictures")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    if args.prompts < 1:
        parser.error(f"--prompts is {args.prompts}; it must be at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
