"""The process that is measured, and the one that measures the ceiling: `python -m` this module.

It takes one job, JSON, as its argument and answers in JSON lines, one per event:

    survey    what is here, the rates, and the plan and ceiling of every size
    ready     the model is open, its vocabulary read, the picture planned
    progress  phase, done and total of what is being painted
    run       the figures of one picture
    error     what is wrong, for the user

Pictures differ in seed and prompt, so that no embedding is found again, but not in their number of
tokens. Nothing else is printed to stdout.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from zquant.bench.ceiling import products_of, rates_of, roofline
from zquant.engine import Engine
from zquant.errors import PlanError, ZQuantError
from zquant.image import save_png
from zquant.memory.device import peak_host_bytes
from zquant.memory.doctor import describe_machine
from zquant.memory.forecast import Forecast
from zquant.memory.needs import Limits
from zquant.memory.plan import MemoryPlan
from zquant.request import RunRequest

__all__ = ["PROMPT", "main", "work"]

PROMPT = "a red fox in the snow, golden light, photograph number {:02d}"
Send = Callable[..., None]


def main(words: Sequence[str]) -> int:
    """Do the job in the one word of `words`; the exit code says whether it was done."""
    out = sys.stdout

    def send(event: str, **values: Any) -> None:
        out.write(json.dumps({"event": event, **values}) + "\n")
        out.flush()

    try:
        with redirect_stdout(sys.stderr):
            work(json.loads(words[0]), send)
    except (ZQuantError, OSError) as error:
        send("error", message=str(error))
        return 1
    except torch.OutOfMemoryError as error:
        said = str(error).split("\n")[0]
        send("error", message=f"memory ran out ({said}). Close other programs that use the GPU.")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def work(job: Mapping[str, Any], send: Send) -> None:
    """Carry out a job: `survey` has its sizes in `sizes`, `paint` one in `width` and `height`."""
    limits = Limits(budget_bytes=job["budget_bytes"], ram_bytes=job["ram_bytes"])
    with closing(Engine.open(job["model"], limits=limits, **job["machine"])) as engine:
        if (job["steps"] or engine.checkpoint.files.variant.steps) < 2:
            raise ZQuantError("the model's own number of steps is 1; give --steps 2 or more.")
        if job["kind"] == "survey":
            send("survey", **_survey(engine, job))
        else:
            _paint(engine, job, send)


def _request(job: Mapping[str, Any], width: int, height: int, number: int = 0) -> RunRequest:
    return RunRequest(
        prompt=PROMPT.format(number), width=width, height=height, steps=job["steps"], seed=number
    )


def _survey(engine: Engine, job: Mapping[str, Any]) -> dict[str, Any]:
    checkpoint, device = engine.checkpoint, engine.device
    # before anything is measured: what that takes is in no picture's process
    forecast = Forecast(checkpoint, device)
    plans = [_plan(engine, _request(job, *size)) for size in job["sizes"]]
    rates = rates_of(device, checkpoint.parts["dit"].values())
    sizes: list[dict[str, Any]] = []
    for plan in plans:
        if isinstance(plan, str):
            sizes.append({"failure": plan})
            continue
        products = products_of(device, checkpoint.dit_config, plan.picture.n_tokens)
        ceiling = roofline(plan, forecast.sizes.dit, checkpoint.dit_config, rates, products)
        sizes.append({"n_tokens": plan.picture.n_tokens, "ceiling": ceiling})
    uuid = torch.cuda.get_device_properties(device.torch_device).uuid if device.is_cuda else ""
    return {
        "machine": describe_machine() | {"plan": asdict(forecast.machine)},
        "device": {
            "name": device.name,
            "uuid": f"GPU-{uuid}" if uuid else None,
            "compute_dtype": str(device.compute_dtype).removeprefix("torch."),
            "compute": device.compute.mode,
            "attention": "int8" if device.compute.int8_attention else "sdpa",
            "paths": {path.family: path.path for path in device.paths.families},
        },
        "model": _model(engine, job["model"]),
        "rates": asdict(rates),
        "sizes": sizes,
    }


def _plan(engine: Engine, request: RunRequest) -> MemoryPlan | str:
    """The plan, or why there is none."""
    try:
        return engine.plan(request)
    except PlanError as error:
        return str(error)


def _model(engine: Engine, name: str) -> dict[str, Any]:
    files, sha256 = engine.checkpoint.paths, engine.checkpoint.sha256
    variant = engine.checkpoint.files.variant
    return {
        "name": name,
        "variant": variant.name,
        "steps": variant.steps,
        "files": {p: {"name": f.name, "sha256": sha256.get(p)} for p, f in files.items()},
    }


def _paint(engine: Engine, job: Mapping[str, Any], send: Send) -> None:
    width, height = job["width"], job["height"]
    engine.plan(_request(job, width, height))
    send("ready")
    for number in range(1 + job["repeat"]):
        request = _request(job, width, height, number)
        send("run", **_run(engine, request, Path(job["folder"]), send))


def _run(engine: Engine, request: RunRequest, folder: Path, send: Send) -> dict[str, Any]:
    """Paint and save one picture; its seconds by phase, and what it took."""
    read, planned = _storage_bytes(), []

    def announce(_: str) -> None:
        planned.append(time.perf_counter())

    def progress(phase: str, done: int, total: int) -> None:
        send("progress", phase=phase, done=done, total=total)

    start = time.perf_counter()
    result = engine.generate(request, progress, announce)
    made = time.perf_counter()
    save_png(result.images[0], folder / "picture.png", result.recipes[0])
    end, read_now = time.perf_counter(), _storage_bytes()
    first, *others = result.timings["steps"]
    return {
        "plan_s": planned[0] - start,
        "text_encoder_s": result.timings["text_encoder"],
        "first_step_s": first,
        "steps_s": others,
        "vae_s": result.timings["vae"],
        "save_s": end - made,
        "total_s": end - start,
        "memory": result.memory,
        "peak_ram_bytes": _peak_ram_bytes(),
        "peak_allocator_bytes": result.peak_vram_bytes,
        "storage_read_bytes": None if read is None or read_now is None else read_now - read,
        "notices": result.notices,
    }


def _storage_bytes() -> int | None:
    """Fetched from disks for this process until now; None where the system does not count."""
    return _field(Path("/proc/self/io"), "read_bytes:")


def _peak_ram_bytes() -> int | None:
    """The largest resident set, mapped pages included.

    `ru_maxrss` counts the process that started this one as well, so it is the second choice.
    """
    kib = _field(Path("/proc/self/status"), "VmHWM:")
    return peak_host_bytes() if kib is None else kib * 1024


def _field(file: Path, name: str) -> int | None:
    """The number after `name` in one of the system's files."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
