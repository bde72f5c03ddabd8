"""A run of zquant within a budget, watched from outside, as a row of figures.

`subject_of` gives a model and what bounds it here, `measured` paints one picture with it.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from watch import Gpu, Watch

from zquant.engine import Engine
from zquant.memory.needs import Machine
from zquant.memory.plan import spread
from zquant.memory.sizes import model_sizes
from zquant.request import RunRequest

__all__ = ["Subject", "measured", "subject_of"]

PROMPT = "a red fox in the snow, golden light, photograph"
COMMAND = (sys.executable, "-m", "zquant", "run")
BALLAST_SPARE = 64 * 2**20  # free until the plan is made: contexts differ a little


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model, and what bounds it here.

    Attributes:
        path: as given.
        dtype: of exact products; the same for all runs, as "auto" measures anew each time.
        compute: "exact" or "int8"; likewise.
        blocks: bytes of every block of the DiT.
        passes: over the blocks, per step.
        encoder_bpw: bits per weight of the text encoder's layers.
        flop_s: operations per second of large products, here.
        compute_s: least of a step's products; 0 is unknown.
        link_bytes_s: of pinned copies of one block; 0 where nothing is copied.
        withheld: bytes of free VRAM that a plan does not use.
    """

    path: str
    dtype: str
    compute: str
    blocks: tuple[int, ...]
    passes: int
    encoder_bpw: float
    flop_s: float
    compute_s: float
    link_bytes_s: float
    withheld: int

    def step_bytes(self, n_streamed: int) -> int:
        """Streamed per step when so many blocks are."""
        streamed = spread(len(self.blocks), n_streamed)
        return self.passes * sum(self.blocks[i] for i in streamed)

    def copy_s(self, n_streamed: int) -> float:
        """Least that their copies take; 0 where nothing is copied."""
        return self.step_bytes(n_streamed) / self.link_bytes_s if self.link_bytes_s else 0.0

    def document(self) -> dict[str, Any]:
        """The ceilings, as JSON values."""
        n = len(self.blocks)
        return {
            "n_blocks": n,
            "all_blocks_bytes": self.step_bytes(n),
            "flop_s": self.flop_s,
            "compute_s": self.compute_s,
            "link_bytes_s": self.link_bytes_s,
            "copy_all_s": self.copy_s(n),
            "compute_dtype": self.dtype,
            "compute": self.compute,
            "text_encoder_bpw": round(self.encoder_bpw, 2),
        }


def subject_of(path: str, args: argparse.Namespace, gpu: Gpu | None) -> Subject:
    """A model and its ceilings."""
    with closing(
        Engine.open(
            path, device=args.device, compute_dtype=args.compute_dtype, compute=args.compute
        )
    ) as engine:
        request = RunRequest(
            prompt=PROMPT, width=args.width, height=args.height, steps=args.steps, seed=1
        )
        plan, sizes = engine.plan(request), model_sizes(engine.checkpoint)
        machine, encoder = plan.machine, sizes.text_encoder
        return Subject(
            path=path,
            dtype=str(engine.device.compute_dtype).removeprefix("torch."),
            compute=engine.device.compute.mode,
            blocks=sizes.dit.blocks,
            passes=plan.picture.n_prompts,
            encoder_bpw=8 * sum(encoder.blocks) / sum(encoder.n_weights),
            flop_s=machine.flops,
            compute_s=plan.compute_seconds / args.steps,
            link_bytes_s=link_bytes_s(max(sizes.dit.blocks), gpu.device) if gpu else 0.0,
            withheld=withheld_bytes(machine, gpu) if gpu else 0,
        )


def withheld_bytes(machine: Machine, gpu: Gpu) -> int:
    """Of the VRAM that is free, what a plan made now for this process leaves alone."""
    free = gpu.free_bytes() + torch.cuda.memory_reserved(gpu.device)
    return free - (machine.device_bytes - machine.outside) + BALLAST_SPARE


def link_bytes_s(n_bytes: int, device: torch.device) -> float:
    """Pinned copies of `n_bytes` to the device, median of 10."""
    source = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    new: Any = torch.cuda.Event
    times = []
    for _ in range(12):
        start, stop = new(enable_timing=True), new(enable_timing=True)
        start.record()
        target.copy_(source, non_blocking=True)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return n_bytes / float(statistics.median(times[2:]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Painted:
    """A run of zquant that ended."""

    code: int
    printed: str
    said: list[str]
    wall_s: float
    watch: Watch
    trouble: str  # of the ballast


def paint(words: Sequence[str], gpu: Gpu | None, on_plan: Callable[[], None]) -> Painted:
    """Run zquant and watch it; `on_plan` is called when its plan is made."""
    said: list[str] = []
    trouble: list[str] = []

    def listen(stream: Any) -> None:
        for line in stream:
            said.append(line.rstrip())
            if line.startswith("plan:"):
                try:
                    on_plan()
                except RuntimeError as error:  # reading goes on, or the process would wait for us
                    trouble.append(f"the ballast found too little free VRAM: {error!s:.200}")

    start = time.perf_counter()
    with Watch(gpu) as watch, _started(words) as process:
        watch.start(process.pid)
        listener = threading.Thread(target=listen, args=(process.stderr,), daemon=True)
        listener.start()
        assert process.stdout is not None
        printed = process.stdout.read()
        code = process.wait()
        wall_s = time.perf_counter() - start
        listener.join()
    return Painted(
        code=code,
        printed=printed,
        said=said,
        wall_s=wall_s,
        watch=watch,
        trouble=" ".join(trouble),
    )


def _started(words: Sequence[str]) -> subprocess.Popen[str]:
    """Zquant, painting."""
    return subprocess.Popen(
        [*COMMAND, *words],
        env={**os.environ, "ZQUANT_CACHE": "off"},  # or the text encoder would not run
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def measured(
    subject: Subject, args: argparse.Namespace, gpu: Gpu | None, budget: int | None, *, steps: int
) -> dict[str, Any]:
    """A row of the report: one picture within `budget`."""
    grow = 0
    row: dict[str, Any] = {"budget_bytes": budget, "free_bytes": None, "failures": []}
    if gpu and args.ballast and budget is not None:
        gpu.occupy(gpu.free_bytes() - budget - subject.withheld)
        row["free_bytes"], grow = gpu.free_bytes() - subject.withheld, subject.withheld
    with TemporaryDirectory() as folder:
        latents = Path(folder, "latents.npy")
        flags = {
            "--model": subject.path,
            "--width": args.width,
            "--height": args.height,
            "--steps": steps,
            "--seed": 1,
            "--device": args.device,
            "--compute-dtype": subject.dtype,
            "--compute": subject.compute,
            "--budget": budget if gpu else None,
            "--max-ram": args.max_ram if gpu else budget,
            "--save-latents": latents,
            "--out": Path(folder, "picture.png"),
        }
        given = [(name, str(value)) for name, value in flags.items() if value is not None]
        words = [PROMPT, "--json", *(word for pair in given for word in pair)]
        try:
            done = paint(words, gpu, lambda: gpu.occupy(grow) if gpu else None)
        finally:
            if gpu:
                gpu.release()
        row["wall_s"] = round(done.wall_s, 2)
        row |= peaks(done.watch)
        if done.trouble:
            row["failures"].append(done.trouble)
        if done.code:
            row["failures"].append(f"exit code {done.code}: {' '.join(done.said[-1:])}")
            return row
        document = json.loads(done.printed.splitlines()[-1])
        row["latents_sha256"] = hashlib.sha256(np.load(latents).tobytes()).hexdigest()
    return row | figures(document, subject, row["failures"], copies=gpu is not None)


def peaks(watch: Watch) -> dict[str, Any]:
    """What was seen from outside."""
    return {
        "peak_ram_bytes": watch.ram_bytes or None,
        "peak_vram_bytes": watch.vram_bytes,
        "vram_witness": watch.witness,
        "device_growth_bytes": watch.device_bytes,
        "samples_hz": round(watch.rate_hz, 1),
    }


def figures(
    document: Mapping[str, Any], subject: Subject, failures: list[str], *, copies: bool
) -> dict[str, Any]:
    """What the process said of itself; what is wrong in it is added to `failures`."""
    memory, seconds = document["memory"], document["timings"]
    steps = seconds["steps"]
    stream = memory["streams"].get("dit", {})
    step_bytes = subject.step_bytes(memory["streamed_blocks"])
    moved = stream.get("bytes_copied" if copies else "bytes_read", 0)
    if moved < step_bytes * len(steps):
        failures.append(f"{moved} bytes were moved; the plan streams {step_bytes} a step")
    failures += [text for text in document["notices"] if text.startswith("memory ran out")]
    return {
        "step_s": statistics.median(steps[1:] or steps),
        "first_step_s": steps[0],
        "text_encoder_s": seconds["text_encoder"],
        "vae_s": seconds["vae"],
        "total_s": seconds["total"],
        "planned_budget_bytes": memory["budget_bytes"],
        "planned_vram_bytes": memory["predicted_vram_bytes"],
        "planned_ram_bytes": memory["predicted_host_bytes"],
        "planned_step_s": memory["predicted_step_s"],
        "own_vram_bytes": memory["measured_vram_bytes"],
        "vae_rows": memory["vae_rows"],
        "streamed_blocks": memory["streamed_blocks"],
        "step_bytes": step_bytes,
        "copy_s": subject.copy_s(memory["streamed_blocks"]),
        "streams": memory["streams"],
        "allocations_after_step_1": memory["allocations_after_step_1"],
    }
