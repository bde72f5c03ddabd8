"""What `convert --target-size` gives for its bytes, beside policies, and where its table is from.

    python benchmarks/target_size.py compare CHECKPOINT WORK --out FILE
    python benchmarks/target_size.py compare wide WORK --out FILE
    python benchmarks/target_size.py sensitivity CHECKPOINT WORK --out FILE

`compare` stores the DiT by every policy, and for the size of that file, each with importance and
without; prompts and noise are the same everywhere:

    latent error   |z - z0| / |z0| of the final latents, z0 by the checkpoint's own weights

Importance is from other prompts than those. `expected` is what the solver's model of damage said:
the size's error as a share of the policy's. `sensitivity` stores one matrix at a time as Q4_0 and
gives

    s = mean over prompts of (latent error)^2 / loss of the matrix

to be compared with the table of `zquant.convert.target_size`, whose unit is the first layer's
attention.out.

CHECKPOINT is the demo's official folder, or the word `wide`: a model with random weights and four
layers of width 768, whose rows are whole qblocks of 256, as the demo's are not; eight channels
behind every norm are ten times as large. Its pictures are noise. The text encoder is BF16 in all
runs. Nothing is timed. The last line is one JSON document.
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from demo_quality import relative_l2
from machine import describe_machine, new_file, write_document
from safetensors.torch import load_file, save_file
from torch import Tensor

from zquant import Engine, RunRequest
from zquant.calibrate import Calibration, calibrate, exact_device
from zquant.convert.execute import convert
from zquant.convert.measure import measure_losses
from zquant.convert.plan import ConversionPlan, ConvertRequest, OutputTensor, plan_conversion
from zquant.convert.target_size import plan_to_size, sensitivity
from zquant.formats.imatrix import write_imatrix
from zquant.formats.model_folder import find_model
from zquant.quant.policy import POLICIES
from zquant.quant.qtypes import QTYPES

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from demo_scenes import caption, random_scene
from judge_demo import held_out_cases
from make_checkpoint import Spec, make_checkpoint

SCHEMA = "zquant-target-size-1"
SIZE = 128  # pixels, what the demo was made for
POLICIES_SHOWN = ("Q4_0", "Q4_K_S", "Q4_K_M")
PROBE = "Q4_0"  # rows of any of the models are whole qblocks of it
OUTLIERS, OUTLIER_SCALE = 8, 10

Row = dict[str, Any]


def compare(args: argparse.Namespace) -> list[Row]:
    """A row per policy and importance, and one for the same size each."""
    requests = [_paintable(c.caption, c.seed, args) for c in held_out_cases(args.prompts, 0)]
    base = ConvertRequest(
        source=str(args.checkpoint),
        out=args.work / "converted",
        text_encoder_qtype="BF16",
        device="cpu",
    )
    exact = _paint(plan_conversion(replace(base, qtype="BF16")), requests)
    rows: list[Row] = []
    for imatrix in ((), (_importance(args),)):
        for policy in args.policies:
            prescribed = plan_conversion(replace(base, qtype=policy, imatrix=imatrix))
            sized = plan_to_size(replace(base, imatrix=imatrix), _dit_bytes(prescribed))
            for how, plan in ((policy, prescribed), ("target size", sized.plan)):
                row: Row = {"like": policy, "how": how, "imatrix": bool(imatrix)}
                row |= {"dit_bytes": _dit_bytes(plan), **_errors(_paint(plan, requests), exact)}
                if plan is sized.plan:
                    row["expected"] = sized.beside.get(policy)
                    row["qtypes"] = _counts(plan)
                rows.append(row)
                print(row, file=sys.stderr)
    return rows


def one_by_one(args: argparse.Namespace) -> list[Row]:
    """A row per matrix of the DiT: its loss as Q4_0, what that does to the latents, the table."""
    requests = [_paintable(c.caption, c.seed, args) for c in held_out_cases(args.prompts, 1)]
    base = ConvertRequest(
        source=str(args.checkpoint),
        out=args.work / "converted",
        qtype="BF16",
        device="cpu",
    )
    tensors = _dit(plan_conversion(replace(base, qtype="Q4_K_M")))
    free = [t for t in tensors if not t.qtype.is_float]
    wide = {t.name: t.qtype if t.qtype.is_float else QTYPES["BF16"] for t in tensors}
    losses = measure_losses(free, [[QTYPES[PROBE]]] * len(free))
    exact = _paint(plan_conversion(base), requests)
    n_layers = len({t.name.split(".")[1] for t in free if t.name.startswith("layers.")})
    rows: list[Row] = []
    for tensor in free:
        allocation = {"dit": wide | {tensor.name: QTYPES[PROBE]}}
        painted = _paint(plan_conversion(replace(base, allocation=allocation)), requests)
        errors = [relative_l2(a, b) for a, b in zip(painted, exact, strict=True)]
        loss = losses[tensor.name][PROBE]
        found = statistics.fmean(e * e for e in errors) / loss
        row = {"name": tensor.name, "loss": loss, "sensitivity": found}
        rows.append(row | {"table": sensitivity(tensor.name, n_layers)})
        print(row, file=sys.stderr)
    return rows


def wide_checkpoint(folder: Path) -> Path:
    """The model with random weights, in the official layout."""
    make_checkpoint(folder, Spec(preset="tiny", layers=4))
    rng = np.random.default_rng(0)
    for shard in sorted((folder / "transformer").glob("*.safetensors")):
        tensors = load_file(shard)
        for name, value in tensors.items():
            if name.endswith(("attention_norm1.weight", "ffn_norm1.weight")):
                value[rng.choice(len(value), OUTLIERS, replace=False)] *= OUTLIER_SCALE
        save_file(tensors, shard, {"format": "pt"})
    return folder


def _paintable(prompt: str, seed: int, args: argparse.Namespace) -> RunRequest:
    return RunRequest(
        prompt=prompt, width=SIZE, height=SIZE, steps=args.steps, seed=seed, keep_latents=True
    )


def _importance(args: argparse.Namespace) -> Path:
    """Importance of inputs, from scenes of the training's kind."""
    rng = random.Random(2)
    captions = [caption(random_scene(rng, held_out=False), rng) for _ in range(args.prompts)]
    calibration = Calibration(
        files=find_model(args.checkpoint),
        requests=[_paintable(text, 1000 + i, args) for i, text in enumerate(captions)],
        dataset="scenes of the demo",
        device=exact_device("cpu"),
    )
    path: Path = args.work / "importance.gguf"
    write_imatrix(path, calibrate(calibration))
    return path


def _paint(plan: ConversionPlan, requests: Sequence[RunRequest]) -> list[Tensor]:
    """Final latents of every request by what the plan makes."""
    folder = convert(plan).folder
    with closing(Engine.open(folder, device="cpu", compute_dtype="float32")) as engine:
        results = list(engine.generate_all(requests))
    latents = [result.latents for result in results]
    return [each[-1].clone() for each in latents if each is not None]


def _errors(painted: Sequence[Tensor], exact: Sequence[Tensor]) -> Row:
    errors = [relative_l2(a, b) for a, b in zip(painted, exact, strict=True)]
    return {
        "latent_error_median": statistics.median(errors),
        "latent_error_mean": statistics.fmean(errors),
        "latent_error_rms": statistics.fmean(e * e for e in errors) ** 0.5,
    }


def _dit(plan: ConversionPlan) -> Sequence[OutputTensor]:
    return next(output.tensors for output in plan.outputs if output.component == "dit")


def _dit_bytes(plan: ConversionPlan) -> int:
    return next(output.total_size for output in plan.outputs if output.component == "dit")


def _counts(plan: ConversionPlan) -> Mapping[str, int]:
    """Number of weights of the DiT's matrices per qtype."""
    counts: dict[str, int] = {}
    for tensor in _dit(plan):
        if len(tensor.shape) > 1:
            counts[tensor.qtype.name] = counts.get(tensor.qtype.name, 0) + tensor.n_weights
    return counts


def _compared_table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| bytes of | imatrix | DiT bytes | latent error: median | mean | RMS | expected share |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        errors = [f"{row[f'latent_error_{n}']:.3%}" for n in ("median", "mean", "rms")]
        name = row["how"] if row["how"] == row["like"] else f"{row['like']}: {row['how']}"
        share = f"{row['expected']:.2f}" if row.get("expected") else ""
        cells = [name, "yes" if row["imatrix"] else "no", str(row["dit_bytes"]), *errors, share]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _sensitivity_table(rows: Sequence[Row]) -> str:
    """Markdown; found in the table's unit."""
    unit = statistics.geometric_mean(row["sensitivity"] / row["table"] for row in rows)
    lines = [
        f"| {row['name']} | {row['sensitivity'] / unit:.2f} | {row['table']:.2f} |" for row in rows
    ]
    return "\n".join(["| matrix | found | table |", "|---|---|---|", *lines])


RUNS: dict[str, tuple[Callable[..., list[Row]], Callable[[Sequence[Row]], str]]] = {
    "compare": (compare, _compared_table),
    "sensitivity": (one_by_one, _sensitivity_table),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, end with the document."""
    args = _arguments(argv)
    model = args.checkpoint.name
    args.work.mkdir(parents=True, exist_ok=True)
    if model == "wide":
        args.checkpoint = wide_checkpoint(args.work / "wide")
    measure, table = RUNS[args.what]
    rows = measure(args)
    report = {
        "schema": SCHEMA,
        "what": args.what,
        "machine": describe_machine(),
        "settings": {"model": model, "prompts": args.prompts, "steps": args.steps},
        "rows": rows,
    }
    print(table(rows))
    if args.out:
        write_document(args.out, report)
    print(json.dumps(report))
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=RUNS)
    parser.add_argument("checkpoint", type=Path, help="the demo's official folder, or: wide")
    parser.add_argument("work", type=Path, help="folder for what is converted")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES_SHOWN), choices=POLICIES)
    parser.add_argument("--prompts", type=int, default=16, help="held-out scenes to paint")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=new_file, help="write the document here as well")
    args = parser.parse_args(argv)
    if args.prompts < 1:
        parser.error(f"--prompts is {args.prompts}; it must be at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
