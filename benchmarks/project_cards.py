"""Seconds per step on small cards, PROJECTED: no such card was run.

    python benchmarks/project_cards.py MODEL... [--width 1024] [--height 1024] [--out FILE]

For every card and budget the real planner places the blocks of MODEL, and the real stream plays
eight steps on simulated lanes (`tools/stream_simulator.py`) with the card's rates: products at 65 %
of the data sheet, which peers measured for large ones, and copies at what pinned memory reaches on
its link. So the figures say what streaming costs against having every block resident, and which
budget suffices; the seconds themselves are as good as the rates.

Rates: NVIDIA's data sheets; the share and the links as measured by others. The last line is one
JSON document.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, new_file, write_document

from zquant.errors import PlanError
from zquant.layers.compute import Compute
from zquant.memory.activations import Picture
from zquant.memory.demand import needs_of
from zquant.memory.device import Device
from zquant.memory.needs import Limits, Machine, Needs
from zquant.memory.paths import Path as KernelPath
from zquant.memory.paths import Paths
from zquant.memory.plan import MemoryPlan, make_plan
from zquant.memory.sizes import model_sizes
from zquant.models.checkpoint import Checkpoint, model_files
from zquant.units import parse_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from stream_simulator import Use, step_seconds

SCHEMA = "zquant-projection-1"
GIB = 2**30
EFFICIENCY = 0.65
BUDGETS = ("1.5GiB", "2GiB", "3GiB", "4GiB", "6GiB", "8GiB")
STEPS = 8
N_PROMPT = 128
OUTSIDE = 450 * 2**20  # a CUDA context of a small card, and what libraries take


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A graphics card and the machine around it.

    `tflops` are of float16 products with float32 sums; int8 ones are four times as fast where
    `int8`. `link_gb_s` is of pinned copies.
    """

    name: str
    vram_gib: float
    tflops: float
    int8: bool
    link_gb_s: float


CARDS = (
    Card(name="RTX 3060", vram_gib=12, tflops=25.5, int8=True, link_gb_s=25),
    Card(name="RTX 3060, Gen3 board", vram_gib=12, tflops=25.5, int8=True, link_gb_s=12),
    Card(name="RTX 3050", vram_gib=8, tflops=18.2, int8=True, link_gb_s=12.5),
    Card(name="RTX 4060", vram_gib=8, tflops=30.2, int8=True, link_gb_s=12.5),
    Card(name="RTX 4060, Gen3 board", vram_gib=8, tflops=30.2, int8=True, link_gb_s=6.5),
    Card(name="RTX 2060", vram_gib=6, tflops=25.8, int8=True, link_gb_s=12),
    # no tensor cores: with float32 sums float16 has the rate of float32
    Card(name="GTX 1650", vram_gib=4, tflops=3.0, int8=False, link_gb_s=12),
)


def device_of(card: Card) -> Device:
    """The card as the planner knows devices; nothing runs on it."""
    dtype = torch.float16 if card.name.startswith(("RTX 2", "GTX")) else torch.bfloat16
    return Device(
        torch_device=torch.device("cuda"),
        reason="projected",
        paths=Paths(
            compute=Compute(dtype=dtype, int8=card.int8),
            reason="projected",
            forbidden="",
            families=(KernelPath("dequantize", "Triton"),),
        ),
    )


def machine_of(card: Card, ram_gib: float, disk_gb_s: float) -> Machine:
    """A machine with that card and so much RAM free."""
    return Machine(
        is_gpu=True,
        device_bytes=int(card.vram_gib * GIB),
        outside=OUTSIDE,
        ram_bytes=int(ram_gib * GIB),
        ram_held=2 * GIB,
        pinned_bytes=int(ram_gib * GIB),
        flops=card.tflops * 1e12 * EFFICIENCY,
        link_bytes_s=card.link_gb_s * 1e9,
        disk_bytes_s=disk_gb_s * 1e9,
    )


def simulated(plan: MemoryPlan, needs: Needs, machine: Machine) -> list[float]:
    """Seconds of every step; blocks take time by their share of the weights."""
    dit = needs.dit
    seconds = dit.flops / machine.flops / len(dit.blocks)
    uses = [
        Use(n_bytes=n_bytes if i in plan.dit.streamed else None, seconds=seconds)
        for i, n_bytes in enumerate(dit.blocks)
    ]
    if plan.dit.shape is None:
        return [seconds * len(uses)] * STEPS
    return step_seconds(
        uses,
        plan.dit.shape,
        link_bytes_s=machine.link_bytes_s,
        disk_bytes_s=machine.disk_bytes_s,
        steps=STEPS,
    )


def rows(checkpoint: Checkpoint, model: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per card and budget; what does not fit has its reason."""
    sizes = model_sizes(checkpoint)
    picture = Picture(width=args.width, height=args.height, n_prompt=N_PROMPT, steps=STEPS)
    for card in CARDS:
        needs = needs_of(checkpoint, sizes, device_of(card), picture)
        machine = machine_of(card, args.ram, args.disk)
        resident_s = needs.dit.flops / machine.flops
        for text in BUDGETS:
            budget = parse_bytes(text)
            if budget > machine.device_bytes:
                continue
            row = {"model": model, "card": card.name, "budget": text, "resident_s": resident_s}
            try:
                plan = make_plan(needs, machine, Limits(budget_bytes=budget))
            except PlanError as error:
                yield {**row, "refused": str(error)}
                continue
            steps = simulated(plan, needs, machine)
            yield {
                **row,
                "step_s": sorted(steps[1:])[len(steps) // 2 - 1],
                "first_step_s": steps[0],
                "streamed": len(plan.dit.streamed),
                "planned_vram_bytes": plan.device_bytes,
                "planned_ram_bytes": plan.host_bytes,
                "vae_rows": plan.vae.rows,
            }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and the document."""
    args = _arguments(argv)
    found = []
    print(f"PROJECTED from rates, not measured: {args.width}x{args.height}, {N_PROMPT} tokens")
    print(f"{'card':22} {'budget':>7} {'streamed':>8} {'step':>8} {'resident':>9} {'cost':>7} VRAM")
    for model in args.models:
        files = model_files(model, {}, None)
        with closing(Checkpoint(files)) as checkpoint:
            print(f"-- {files.dit.name}")
            for row in rows(checkpoint, files.dit.name, args):
                found.append(row)
                _show(row)
    document = {
        "schema": SCHEMA,
        "projected": True,
        "width": args.width,
        "height": args.height,
        "efficiency": EFFICIENCY,
        "ram_gib": args.ram,
        "disk_gb_s": args.disk,
        "cards": [asdict(card) for card in CARDS],
        "machine": describe_machine(),
        "rows": found,
    }
    if args.out:
        write_document(args.out, document)
    print(json.dumps(document))
    return 0


def _show(row: dict[str, Any]) -> None:
    head = f"{row['card']:22} {row['budget']:>7}"
    if "refused" in row:
        print(f"{head} {row['refused']}")
        return
    cost = row["step_s"] / row["resident_s"] - 1
    print(
        f"{head} {row['streamed']:8} {row['step_s']:6.2f} s {row['resident_s']:7.2f} s "
        f"{cost:7.1%} {row['planned_vram_bytes'] / GIB:.2f} GiB"
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="converted folders")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--ram", type=float, default=12.0, help="GiB that are free")
    parser.add_argument("--disk", type=float, default=2.0, help="GB/s of the file")
    parser.add_argument("--out", type=new_file, metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
