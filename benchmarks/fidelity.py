"""What multiplying in int8 costs in fidelity, against exact products of the same stored weights.

    python benchmarks/fidelity.py blocks --out FILE
    python benchmarks/fidelity.py demo CHECKPOINT WORK --out FILE

`blocks` runs one transformer block of the true width with random weights, stored as each qtype, on
residual streams of three kinds; int8 with and without the Hadamard rotation:

    gaussian   N(0, 1)
    heavy      Student's t with 4 degrees of freedom
    outliers   N(0, 1) with 8 channels 40 times as large

and gives |y - y_exact| / |y_exact - x|, the error of what the block adds to the stream, also with
only the linears behind one input (qkv, out, w13, w2) in int8. `demo`
paints held-out prompts with the demo model and gives the error of the final latents, their PSNR and
that of the pictures, and how many show what was asked. Kernels are their torch references where no
GPU is; no time is measured. The last line is one JSON document.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_quality import convert, psnr_db, relative_l2
from machine import describe_machine, new_file, write_document
from torch import Tensor

from zquant import Engine, RunResult
from zquant.layers.compute import Compute
from zquant.layers.linear import QuantLinear
from zquant.memory.device import probe
from zquant.models.checkpoint import Checkpoint, model_files
from zquant.models.config import DiTConfig
from zquant.models.dit_block import Block
from zquant.quant.codec import quantize
from zquant.quant.qtypes import QTYPES

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from judge_demo import Case, held_out_cases, measure

SCHEMA = "zquant-fidelity-1"
MODES = {  # name -> how blocks compute, beside the dtype
    "exact": {},
    "int8": {"int8": True},
    "int8, not rotated": {"int8": True, "rotate": False},
    "int8 + int8 attention": {"int8": True, "int8_attention": True},
}
STREAMS = ("gaussian", "heavy", "outliers")
TRUE_SIZE = DiTConfig(
    dim=3840,
    n_layers=30,
    n_refiner_layers=2,
    n_heads=30,
    in_channels=16,
    patch_size=2,
    cap_feat_dim=2560,
    axes_dims=(32, 48, 48),
    rope_theta=256.0,
    t_scale=1000.0,
    norm_eps=1e-5,
)


def blocks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Error of a block's output per qtype, stream and mode."""
    rows = []
    for qtype in args.qtypes:
        block = random_block(TRUE_SIZE, qtype, args.seed)
        for kind in STREAMS:
            x = stream(kind, args.tokens, TRUE_SIZE.dim, args.seed)
            exact = run_block(block, x, Compute(dtype=torch.float32))
            for mode, fields in MODES.items():
                if mode == "exact":
                    continue
                y = run_block(block, x, Compute(dtype=torch.float32, **fields))
                rows.append(_block_row(qtype, kind, mode, y, exact, x))
            for key in block.groups:
                y = run_block(block, x, Compute(dtype=torch.float32, int8=True), only=key)
                rows.append(_block_row(qtype, kind, f"int8 only at {key}", y, exact, x))
    return rows


def _block_row(
    qtype: str, kind: str, mode: str, y: Tensor, exact: Tensor, x: Tensor
) -> dict[str, Any]:
    error = float((y - exact).norm() / (exact - x).norm())
    print(f"{qtype:5} {kind:10} {mode:22} {error:.2%}", file=sys.stderr)
    return {"qtype": qtype, "stream": kind, "mode": mode, "error": error}


def random_block(config: DiTConfig, qtype: str, seed: int) -> Block:
    """A block with weights of N(0, 1 / K), stored as `qtype`."""
    rng = np.random.default_rng(seed)
    block = Block(config, modulated=True)
    for linear in (m for m in block.modules() if isinstance(m, QuantLinear)):
        shape = (linear.out_features, linear.in_features)
        weights = rng.standard_normal(shape, np.float32) / np.float32(math.sqrt(shape[1]))
        linear.load(torch.from_numpy(quantize(weights, QTYPES[qtype])), QTYPES[qtype])
    for name, value in block.named_parameters():
        if "norm" in name:
            value.fill_(1)
    return block


def stream(kind: str, tokens: int, dim: int, seed: int) -> Tensor:
    """float32 `[1, tokens, dim]`."""
    rng = np.random.default_rng(seed + 1)
    shape = (1, tokens, dim)
    x = rng.standard_t(4, shape) if kind == "heavy" else rng.standard_normal(shape)
    if kind == "outliers":
        x[..., rng.choice(dim, 8, replace=False)] *= 40
    return torch.from_numpy(x.astype(np.float32))


def run_block(block: Block, x: Tensor, compute: Compute, only: str | None = None) -> Tensor:
    """The block's output, without rotation of positions and with modulation 1.

    With `only` the tokens of all other inputs of linears stay floats.
    """
    block.use(compute, "layers.1")
    if only is not None:
        block.groups |= dict.fromkeys(block.groups.keys() - {only})
    angles = torch.zeros(x.shape[1], TRUE_SIZE.dim // TRUE_SIZE.n_heads // 2)
    one = torch.ones(TRUE_SIZE.dim)
    with torch.inference_mode():
        return block(x.clone(), (angles.cos(), angles.sin()), (one,) * 4, compute)


def demo(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Latents, pictures and verdicts per qtype and mode."""
    cases = held_out_cases(args.prompts, args.seed)
    rows = []
    for qtype in args.qtypes:
        folder = convert(args.checkpoint, args.work / qtype, qtype)
        exact: list[RunResult] = []
        for mode in ("exact", *(m for m in args.modes if m != "exact")):
            fields = MODES[mode]
            painted, judged = paint(folder, cases, Compute(dtype=torch.float32, **fields))
            exact = exact or painted
            row = {"qtype": qtype, "mode": mode, "right": judged["accuracy"]["all"]["right"]}
            rows.append(row | (compare(painted, exact) if mode != "exact" else {}))
            print(rows[-1], file=sys.stderr)
    return rows


def paint(
    folder: Path, cases: Sequence[Case], compute: Compute
) -> tuple[list[RunResult], dict[str, Any]]:
    """Every prompt once, and the verdicts."""
    painted: list[RunResult] = []
    device = probe("cpu", "float32")
    device = replace(device, paths=replace(device.paths, compute=compute))
    with closing(Engine(Checkpoint(model_files(folder, {}, None)), device)) as engine:
        judged = measure(engine, cases, steps=8, each=lambda result, _: painted.append(result))
    return painted, judged


def compare(painted: Sequence[RunResult], exact: Sequence[RunResult]) -> dict[str, float]:
    """Medians of latent errors; the lowest and the mean PSNR."""
    latents = [(a.latents[-1], b.latents[-1]) for a, b in zip(painted, exact, strict=True)]
    pictures = [(a.images[0], b.images[0]) for a, b in zip(painted, exact, strict=True)]
    psnrs = [latent_psnr_db(*pair) for pair in latents]
    return {
        "latent_error_median": statistics.median(relative_l2(*pair) for pair in latents),
        "latent_psnr_db_mean": statistics.fmean(psnrs),
        "latent_psnr_db_lowest": min(psnrs),
        "psnr_db_mean": statistics.fmean(psnr_db(*pair) for pair in pictures),
    }


def latent_psnr_db(a: Tensor, b: Tensor) -> float:
    """With the range of `b` as the peak."""
    mean_square = float((a.double() - b.double()).square().mean())
    return 20 * math.log10(float(b.max() - b.min())) - 10 * math.log10(max(mean_square, 1e-30))


def main() -> int:
    """Measure, print a Markdown table, end with the document."""
    args = _arguments()
    rows = args.run(args)
    report = {
        "schema": SCHEMA,
        "what": args.what,
        "machine": describe_machine(),
        "settings": {
            name: value
            for name, value in vars(args).items()
            if isinstance(value, int | list) and name != "run"
        },
        "rows": rows,
    }
    print(_table(rows))
    if args.out:
        write_document(args.out, report)
    print(json.dumps(report))
    return 0


def _table(rows: Sequence[dict[str, Any]]) -> str:
    names = list(max(rows, key=len))
    lines = [names, ["---"] * len(names)]
    lines += [[_shown(name, row.get(name)) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1f}" if "db" in name else f"{value:.2%}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--out", type=new_file, help="write the document here as well")
    kinds = parser.add_subparsers(dest="what", required=True)
    one = kinds.add_parser("blocks", parents=[common])
    one.add_argument("--qtypes", nargs="+", default=["Q8_0", "Q4_K"])
    one.add_argument("--tokens", type=int, default=128)
    one.set_defaults(run=blocks)
    two = kinds.add_parser("demo", parents=[common])
    two.add_argument("checkpoint", type=Path, help="the demo's official-layout folder")
    two.add_argument("work", type=Path, help="folder for converted models")
    two.add_argument("--qtypes", nargs="+", default=["Q8_0", "Q4_K_M"])
    two.add_argument("--prompts", type=int, default=200)
    two.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    two.set_defaults(run=demo)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
