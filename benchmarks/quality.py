"""What storing a checkpoint in fewer bits, and multiplying in int8, costs: embeddings to pictures.

    python benchmarks/quality.py CHECKPOINT WORK --qtypes Q8_0 Q4_K_M --computes exact int8

Every policy and compute mode paints the same prompts from the same noise. All are compared, prompt
by prompt, with the checkpoint's own weights, multiplied exactly in float32:

    prompt_embeds, latents   |a - b| / |b|, L2, median over the prompts; latents after every step
    PSNR                     of the 8-bit pictures; at most 58.9 dB, where rounding alone would be
    SSIM                     of the 8-bit pictures, mean over windows and channels; 1 is equal

    SSIM = (2 m_a m_b + C1) (2 s_ab + C2) / ((m_a^2 + m_b^2 + C1) (s_a^2 + s_b^2 + C2))

with means, variances and covariance weighted by a Gaussian window of 11 x 11 pixels, deviation 1.5,
wherever it lies within the picture; C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2. Pictures of the demo
model are judged by `tools/judge_demo.py` as well. Int8 is of the DiT's blocks, so the embeddings of
a policy are the same in every mode. Kernels are their torch references where no GPU is; nothing is
timed. The last line is one JSON document.

Source: SSIM as in Wang, Bovik, Sheikh and Simoncelli, 2004.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from demo_quality import convert, psnr_db, relative_l2
from machine import describe_machine, new_file, told, write_document
from PIL import Image
from torch import Tensor

from zquant import Engine, RunRequest, RunResult
from zquant.quant.policy import POLICIES
from zquant.units import format_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from demo_scenes import Scene
from judge_demo import held_out_cases, judge

SCHEMA = "zquant-quality-1"
QTYPES = ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")
COMPUTES = {  # name -> how the DiT's blocks multiply
    "exact": {"compute": "exact"},
    "int8": {"compute": "int8"},
    "int8+attention": {"compute": "int8", "attention": "int8"},
}
DEMO = Path(__file__).parents[1] / "tests" / "demo" / "z-image-demo"
JUDGED_PX = (128, 256)  # what the judge can see
WINDOW, DEVIATION = 11, 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
HEADER = ["weights", "compute", "folder", "right", "embeds", "first latents", "middle", "final"]
HEADER += ["PSNR", "SSIM"]
PROMPTS = (
    "a red fox in the snow, golden light, photograph",
    "一座雪山倒映在平静的湖面上，清晨，薄雾",
    "a street market at night in the rain, neon signs, people with umbrellas",
    'a shop window with the words "OPEN LATE" in yellow letters',
    "portrait of an old fisherman, every wrinkle sharp, black and white",
    "水墨画：竹林里的一只熊猫",
    "a bowl of ramen seen from above, steam, chopsticks on the left",
    "an isometric drawing of a small library with round windows",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A prompt, painted from the noise of `seed`; `scene` is what it should show, if known."""

    prompt: str
    seed: int
    scene: Scene | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Painted:
    """Float32 `[T, width]` embeddings, `[steps, C, H, W]` latents, the picture."""

    embeds: Tensor
    latents: Tensor
    image: Image.Image
    right: bool | None


def ssim(a: Image.Image, b: Image.Image) -> float:
    """Structural similarity of two 8-bit pictures of one size, 1 for equal ones.

    Raises:
        ValueError: the sizes differ, or a side is shorter than the window.
    """
    if a.size != b.size or min(a.size) < WINDOW:
        raise ValueError(f"pictures of {a.size} and {b.size}; needs one size, {WINDOW} or more")
    x, y = (torch.from_numpy(np.array(i.convert("RGB"), np.float64)).movedim(-1, 0) for i in (a, b))
    mean_x, mean_y = _windowed(x), _windowed(y)
    var_x, var_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (var_x + var_y + C2)
    return float((light * structure).mean())


def _windowed(x: Tensor) -> Tensor:
    """Weighted mean of each whole window of float64 `[C, H, W]`: the window is a product of two."""
    at = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-(at**2) / (2 * DEVIATION**2))
    weights = weights / weights.sum()
    rows = F.conv2d(x[:, None], weights.view(1, 1, 1, WINDOW))
    return F.conv2d(rows, weights.view(1, 1, WINDOW, 1))[:, 0]


def is_demo(checkpoint: Path) -> bool:
    """Whether a checkpoint is a training of the demo model: its transformer has that size."""
    configs = (folder / "transformer" / "config.json" for folder in (checkpoint, DEMO))
    return len({path.read_text("utf-8") if path.is_file() else None for path in configs}) == 1


def cases_of(n: int, seed: int, *, demo: bool) -> list[Case]:
    """`n` prompts: of scenes that the demo's training never saw, or the first of `PROMPTS`."""
    if demo:
        held_out = held_out_cases(n, seed)
        return [Case(prompt=c.caption, seed=c.seed, scene=c.scene) for c in held_out]
    return [Case(prompt=prompt, seed=seed + i) for i, prompt in enumerate(PROMPTS[:n])]


def paint(
    folder: Path, cases: Sequence[Case], compute: str, args: argparse.Namespace
) -> list[Painted]:
    """Every prompt once, phase by phase."""
    requests = [
        RunRequest(
            prompt=case.prompt,
            width=args.size,
            height=args.size,
            steps=args.steps,
            seed=case.seed,
            guidance_scale=0.0,
            keep_latents=True,
        )
        for case in cases
    ]
    print(f"{folder}: {len(cases)} pictures, {compute}", file=sys.stderr)
    how = {"device": args.device, "compute_dtype": "float32", **COMPUTES[compute]}
    with closing(Engine.open(folder, **how)) as engine:
        results = engine.generate_all(requests)
        return [_painted(c, r, judged=args.judged) for c, r in zip(cases, results, strict=True)]


def _painted(case: Case, result: RunResult, *, judged: bool) -> Painted:
    assert result.latents is not None
    image = result.images[0]
    return Painted(
        embeds=result.prompt_embeds[0].cpu(),
        latents=result.latents[:, 0].cpu(),
        image=image,
        right=judge(image, case.scene).right if judged and case.scene else None,
    )


def compare(painted: Sequence[Painted], exact: Sequence[Painted]) -> dict[str, Any]:
    """Medians of errors; the mean and the lowest likeness of pictures."""
    pairs = list(zip(painted, exact, strict=True))
    steps = range(len(exact[0].latents))
    each = [[relative_l2(a.latents[i], b.latents[i]) for a, b in pairs] for i in steps]
    psnrs = [psnr_db(a.image, b.image) for a, b in pairs]
    ssims = [ssim(a.image, b.image) for a, b in pairs]
    return {
        "prompt_embeds_error": statistics.median(relative_l2(a.embeds, b.embeds) for a, b in pairs),
        "latents_error": [statistics.median(errors) for errors in each],
        "latents_error_worst": max(each[-1]),
        "psnr_db_mean": statistics.fmean(psnrs),
        "psnr_db_lowest": min(psnrs),
        "ssim_mean": statistics.fmean(ssims),
        "ssim_lowest": min(ssims),
    }


def share_right(painted: Sequence[Painted]) -> float | None:
    """Share of pictures that show their scene; None where nothing was judged."""
    verdicts = [each.right for each in painted if each.right is not None]
    return sum(verdicts) / len(verdicts) if verdicts else None


def rows_of(args: argparse.Namespace, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The reference's row, then one per policy and compute mode."""
    exact = paint(args.checkpoint, cases, "exact", args)
    rows: list[dict[str, Any]] = [
        {"qtype": "checkpoint", "compute": "exact", "right": share_right(exact)}
    ]
    for qtype in args.qtypes:
        folder = convert(args.checkpoint, args.work / qtype, qtype)
        n_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for compute in args.computes:
            painted = paint(folder, cases, compute, args)
            row = {"qtype": qtype, "compute": compute, "folder_bytes": n_bytes}
            rows.append(row | {"right": share_right(painted)} | compare(painted, exact))
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown; latents after the first, the middle and the last step."""
    lines = [HEADER, ["---"] * len(HEADER)]
    for row in rows:
        right = "-" if row["right"] is None else f"{row['right']:.1%}"
        if "latents_error" not in row:
            lines.append([row["qtype"], row["compute"], "-", right, *["-"] * 6])
            continue
        errors = row["latents_error"]
        shown = (row["prompt_embeds_error"], errors[0], errors[len(errors) // 2], errors[-1])
        cells = [row["qtype"], row["compute"], format_bytes(row["folder_bytes"]), right]
        cells += [f"{error:.2%}" for error in shown]
        lines.append([*cells, f"{row['psnr_db_mean']:.1f} dB", f"{row['ssim_mean']:.4f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, end with the document."""
    args = _arguments(argv)
    demo = is_demo(args.checkpoint)
    args.size = args.size or (JUDGED_PX[0] if demo else 256)
    args.judged = demo and JUDGED_PX[0] <= args.size <= JUDGED_PX[1]
    rows = rows_of(args, cases_of(args.prompts, args.seed, demo=demo))
    report = {
        "schema": SCHEMA,
        "machine": describe_machine(),
        "settings": {key: told(value) for key, value in vars(args).items()},
        "reference": "the checkpoint's weights, multiplied exactly in float32",
        "rows": rows,
    }
    print(table(rows))
    if args.out:
        write_document(args.out, report)
    print(json.dumps(report))
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="official folder, BF16 or float32")
    parser.add_argument("work", type=Path, help="folder for converted models, one per policy")
    parser.add_argument("--qtypes", nargs="+", default=list(QTYPES), choices=POLICIES)
    parser.add_argument("--computes", nargs="+", default=["exact", "int8"], choices=COMPUTES)
    parser.add_argument("--prompts", type=int, default=4, help="of the demo: held-out scenes")
    parser.add_argument("--size", type=int, help="pixels; default: 128 for the demo, else 256")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the scenes, and of the noise")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--out", type=new_file, help="write the document here as well")
    args = parser.parse_args(argv)
    most = sys.maxsize if is_demo(args.checkpoint) else len(PROMPTS)
    if not 1 <= args.prompts <= most:
        parser.error(f"--prompts is {args.prompts}; it must be from 1 to {most}")
    if args.size is not None and (args.size < 16 or args.size % 16):
        parser.error(f"--size is {args.size}; it must be a multiple of 16")
    if not (args.checkpoint / "transformer" / "config.json").is_file():
        parser.error(f"{args.checkpoint} is not an official checkpoint folder")
    return args


if __name__ == "__main__":
    sys.exit(main())
