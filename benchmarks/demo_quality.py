"""What storing the demo model in fewer bits costs: right pictures, latents, pixels, bytes.

    python benchmarks/demo_quality.py CHECKPOINT WORK --qtypes BF16 Q8_0 Q4_K_M --out FILE

Every policy paints the same held-out prompts from the same noise; BF16, which is the checkpoint
itself, is what the others are compared with, prompt by prompt:

    latent error   |z - z_bf16| / |z_bf16| of the final latents, L2
    PSNR           of the 8-bit pictures; at most 58.9 dB, where rounding to 8 bits alone would be

Whether a picture shows its prompt is judged by `tools/judge_demo.py`. Nothing is timed. The last
line is one JSON document.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine, new_file, write_document
from PIL import Image
from torch import Tensor

from zquant import Engine, RunResult
from zquant.quant.policy import POLICIES
from zquant.units import format_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from judge_demo import Case, held_out_cases, measure

SCHEMA = "zquant-demo-quality-1"
REFERENCE = "BF16"
QTYPES = ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")
ROUNDING = 1 / 12  # mean square of rounding to whole levels


@dataclass(frozen=True, slots=True, kw_only=True)
class Painted:
    """What one policy painted: final latents float32 `[1, C, H, W]` and the picture."""

    latents: Tensor
    image: Image.Image


def main() -> int:
    """Measure every policy, print the table, end with the document."""
    args = _arguments()
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "machine": {**describe_machine(), "compute_dtype": args.compute_dtype},
        "prompts": args.prompts,
        "seed": args.seed,
        "steps": args.steps,
        "reference": REFERENCE,
        "qtypes": [],
    }
    cases = held_out_cases(args.prompts, args.seed)
    reference: list[Painted] = []
    # first what the others are compared with, even where nobody asked for its row
    for qtype in (REFERENCE, *(q for q in args.qtypes if q != REFERENCE)):
        folder = convert(args.checkpoint, args.work / qtype, qtype)
        painted, judged = _paint(folder, cases, args)
        reference = reference or painted
        errors = {} if qtype == REFERENCE else compare(painted, reference)
        report["qtypes"].append(
            {"qtype": qtype, "folder_bytes": _folder_bytes(folder), **errors, **judged}
        )
    report["qtypes"] = [row for row in report["qtypes"] if row["qtype"] in args.qtypes]
    print(_table(report["qtypes"]))
    if args.out:
        write_document(args.out, report)
    print(json.dumps(report, ensure_ascii=False))
    return 0


def compare(painted: Sequence[Painted], reference: Sequence[Painted]) -> dict[str, float]:
    """Latent error and PSNR, each over pairs of the same prompt and noise."""
    pairs = list(zip(painted, reference, strict=True))
    errors = [relative_l2(a.latents, b.latents) for a, b in pairs]
    return {
        "latent_error_median": statistics.median(errors),
        "latent_error_mean": statistics.fmean(errors),
        "psnr_db_mean": statistics.fmean(psnr_db(a.image, b.image) for a, b in pairs),
    }


def relative_l2(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def psnr_db(a: Image.Image, b: Image.Image) -> float:
    """Of two 8-bit pictures of one size; identical ones differ by what rounding may hide."""
    mean_square = float(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))
    return 10 * math.log10(255**2 / max(mean_square, ROUNDING))


def convert(checkpoint: Path, folder: Path, qtype: str) -> Path:
    """The converted folder; its plan goes nowhere, its errors to stderr."""
    print(f"{qtype}: converting", file=sys.stderr)
    command = [sys.executable, "-m", "zquant", "convert", str(checkpoint), str(folder)]
    done = subprocess.run([*command, "--qtype", qtype, "--json"], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"zquant convert --qtype {qtype} ended with {done.returncode}")
    return folder


def _paint(
    folder: Path, cases: Sequence[Case], args: argparse.Namespace
) -> tuple[list[Painted], dict[str, Any]]:
    """Every prompt once: what was painted, and the verdicts about it."""
    painted: list[Painted] = []

    def keep(result: RunResult, _: object) -> None:
        assert result.latents is not None
        painted.append(Painted(latents=result.latents[-1].clone(), image=result.images[0]))

    print(f"{folder.name}: painting", file=sys.stderr)
    engine = Engine.open(folder, device="cpu", compute_dtype=args.compute_dtype)
    with closing(engine):
        judged = measure(engine, cases, steps=args.steps, each=keep)
    return painted, {name: judged[name] for name in ("accuracy", "failures")}


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| policy | folder | right | color | kind | relation | background "
        "| latent error, median | mean | PSNR |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shares = row["accuracy"]["all"]
        names = ("right", "color", "kind", "relation", "background")
        cells = ["-" if shares[n] is None else f"{shares[n]:.1%}" for n in names]
        cells += [
            f"{row[n]:.2%}" if n in row else "-"
            for n in ("latent_error_median", "latent_error_mean")
        ]
        cells.append(f"{row['psnr_db_mean']:.1f} dB" if "psnr_db_mean" in row else "-")
        lines.append(
            f"| {row['qtype']} | {format_bytes(row['folder_bytes'])} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="the demo's official-layout folder")
    parser.add_argument("work", type=Path, help="folder for converted models, one per policy")
    parser.add_argument("--qtypes", nargs="+", default=list(QTYPES), choices=POLICIES)
    parser.add_argument("--prompts", type=int, default=200, help="held-out scenes to paint")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of scenes")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--compute-dtype", default="float32")
    parser.add_argument("--out", type=new_file, help="write the document here as well")
    args = parser.parse_args()
    if args.prompts < 1:
        parser.error(f"--prompts is {args.prompts}; it must be at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
