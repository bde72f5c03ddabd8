"""Engines side by side: the same machine, weights, noise, embeddings and sigmas, one picture each.

    python benchmarks/peers.py CHECKPOINT MODELS... --sizes 256 512 --steps 4 --out FILE

    zquant             every converted model
    diffusers          the checkpoint, all weights resident
    diffusers-offload  its networks brought to the GPU one after the other
    diffusers-group    its layers streamed to the GPU
    diffusers-gguf     the DiT of every converted model, by diffusers' own reader
    sdcpp              stable-diffusion.cpp with the files of every converted model
    nunchaku           diffusers with a DiT file of nunchaku's; untested

Every engine has a process of its own, and a row that says why where it cannot run or has failed.
Latents are compared with those of zquant in float32 on the checkpoint itself: it fits where
diffusers in float32 does not, and the oracle tests find the two equal to 1e-5 on small models and
on one layer of the true width. Its embeddings are given to all that take some; with `--encode`
every engine makes its own. stable-diffusion.cpp takes neither noise nor embeddings: it draws the
noise of the seed with torch's generator, runs its text encoder, quantized as the files are, and
gives no latents, so that its picture alone is compared.

The floor of a step is its float products at the best rate that torch reached here, before or
between the engines; int8 may go below it. Steps are those after the first, which in some engines
reads the weights. RAM is the largest resident set of the process by the kernel's own count, mapped
files included; "own" is the most of it that was no page of a file. The last line is one JSON
document; `--out` has it after every row.
"""

import argparse
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from demo_quality import psnr_db, relative_l2
from machine import command_line, describe_machine, new_file, told, write_document
from peer_floor import ceiling, lowered
from peer_workers import Job, measured
from PIL import Image
from sdcpp import sdcpp_version
from watch import Gpu

from zquant.errors import ZQuantError
from zquant.formats.latents import load_latents, save_latents
from zquant.memory.machine import ram_available
from zquant.models.checkpoint import Checkpoint, model_files
from zquant.models.config import DiTConfig
from zquant.sampling import initial_noise, sigmas
from zquant.units import format_bytes, format_seconds

SCHEMA = "zquant-peers-1"
PROMPT = "a red fox in the snow, golden light, photograph"
SEED = 0
PROCESS_BYTES = 2**30  # Python, torch and the libraries; on a GPU the context and workspaces
ENGINES = {  # name -> whether it runs every converted model, or the checkpoint once
    "zquant": True,
    "diffusers": False,
    "diffusers-offload": False,
    "diffusers-group": False,
    "diffusers-gguf": True,
    "sdcpp": True,
    "nunchaku": False,
}
DTYPES = ("bfloat16", "float16", "float32")
ON_GPU_ONLY = ("diffusers-offload", "diffusers-group", "nunchaku")
PIPELINES = ("diffusers", "diffusers-offload", "diffusers-group", "diffusers-gguf", "nunchaku")
PACKAGES = {"diffusers": ("diffusers",), "nunchaku": ("diffusers", "nunchaku")}
HEADER = ["engine", "size", "step", "range", "floors", "total", "RAM", "own", "VRAM"]
HEADER += ["latents", "PSNR"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Rough bytes that an engine takes; `vram` is 0 on a CPU."""

    ram: int
    vram: int = 0

    def why_not(self, ram: int, vram: int) -> str:
        """Why it does not fit into so much; empty when it does."""
        for name, needed, free in (("RAM", self.ram, ram), ("VRAM", self.vram, vram)):
            if needed > free:
                needs, has = format_bytes(needed), format_bytes(free)
                return f"needs about {needs} of {name}; {has} are available"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all rows share: the flags, the checkpoint as its headers describe it, where files go."""

    args: argparse.Namespace
    n_weights: dict[str, int]  # by component
    dit: DiTConfig
    shift: float
    gpu: Gpu | None
    work: Path

    @classmethod
    def of(cls, args: argparse.Namespace, work: Path) -> "Bench":
        """Read the headers."""
        with closing(Checkpoint(model_files(args.checkpoint, {}, None))) as opened:
            return cls(
                args=args,
                n_weights={
                    name: sum(math.prod(part.shape) for part in parts.values())
                    for name, parts in opened.parts.items()
                },
                dit=opened.dit_config,
                shift=opened.files.variant.shift,
                gpu=None if args.device == "cpu" else Gpu(torch.device(args.device)),
                work=work,
            )


def need(bench: Bench, engine: str, model: Path, size: int) -> Need:
    """What an engine takes for a picture; zquant's own plan decides for zquant.

    Weights in `--dtype`, or the files where they are used as they are; beside them the decoder of
    the autoencoder, which holds three float32 images of 256 channels at the size of the picture.
    """
    width = getattr(torch, bench.args.dtype).itemsize
    each = {name: width * n for name, n in bench.n_weights.items()}
    if engine == "sdcpp":
        files = model_files(model, {}, None)
        each = {name: _stored_bytes(getattr(files, name)) for name in each}
    elif engine == "diffusers-gguf":
        one_expanded = width * bench.dit.dim * bench.dit.hidden_dim
        each["dit"] = _stored_bytes(model_files(model, {}, None).dit) + one_expanded
    elif engine == "nunchaku":
        each["dit"] = _stored_bytes(bench.args.nunchaku)
    if not bench.args.encode and engine != "sdcpp":
        each["text_encoder"] = 0
    total, largest = sum(each.values()), max(each.values())
    picture = 4 * 3 * 256 * size**2
    if bench.args.device == "cpu":
        return Need(ram=PROCESS_BYTES + total + picture)
    if engine == "diffusers-group":  # pinned copies beside what was read
        return Need(ram=PROCESS_BYTES + 2 * total, vram=PROCESS_BYTES + picture)
    if engine == "diffusers-offload":
        return Need(ram=PROCESS_BYTES + total, vram=PROCESS_BYTES + largest + picture)
    return Need(ram=PROCESS_BYTES + largest, vram=PROCESS_BYTES + total + picture)


def _stored_bytes(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def why_not(bench: Bench, engine: str, model: Path, size: int) -> str:
    """Why an engine cannot run here; empty when it can."""
    args = bench.args
    if engine == "zquant":
        return ""
    if engine in ON_GPU_ONLY and args.device == "cpu":
        return "needs a CUDA device"
    packages = PACKAGES.get(engine.split("-")[0], ())
    if missing := [name for name in packages if not find_spec(name)]:
        return f"{missing[0]} is not installed"
    if engine == "sdcpp" and (args.sdcpp is None or shutil.which(args.sdcpp) is None):
        return "no --sdcpp PATH" if args.sdcpp is None else f"{args.sdcpp} is not a program"
    if engine == "nunchaku" and (args.nunchaku is None or not args.nunchaku.is_file()):
        return "no --nunchaku FILE" if args.nunchaku is None else f"{args.nunchaku} is not a file"
    if ENGINES[engine] and (dit := model_files(model, {}, None).dit).suffix != ".gguf":
        return f"{dit.name} is not a GGUF file"
    vram = bench.gpu.free_bytes() if bench.gpu else 0
    return need(bench, engine, model, size).why_not(ram_available(), vram)


def reference_job(bench: Bench, size: int) -> Job:
    """The job of the reference, its noise written; file names tell the settings, for --keep."""
    args = bench.args
    settings = f"{args.checkpoint.resolve()} {size} {args.steps} {args.prompt}"
    key = hashlib.sha256(settings.encode()).hexdigest()[:12]
    noise = bench.work / f"{key}-noise.npy"
    save_latents(noise, initial_noise((1, bench.dit.in_channels, size // 8, size // 8), SEED))
    return Job(
        engine="zquant",
        checkpoint=str(args.checkpoint),
        model=str(args.checkpoint),
        prompt=args.prompt,
        size=size,
        steps=args.steps,
        sigmas=sigmas(args.steps, bench.shift).tolist(),
        seed=SEED,
        device=args.device,
        dtype="float32",
        compute="exact",
        noise=str(noise),
        embeds="",
        latents=str(bench.work / f"{key}-reference.npy"),
        picture=str(bench.work / f"{key}-reference.png"),
        keep_embeds=str(bench.work / f"{key}-embeds.npy"),
    )


def job_of(bench: Bench, reference: Job, engine: str, model: Path) -> Job:
    """The job of an engine, beside that of the reference."""
    args, name = bench.args, f"{engine}-{model.name}-{reference.size}"
    given = {"diffusers-gguf": model_files(model, {}, None).dit, "nunchaku": args.nunchaku}
    return replace(
        reference,
        engine=engine,
        model=str(given.get(engine, model)),
        dtype=args.compute_dtype if engine == "zquant" else args.dtype,
        compute=args.compute,
        embeds="" if args.encode else reference.keep_embeds,
        keep_embeds="",
        latents=str(bench.work / f"{name}.npy"),
        picture=""
        if args.latents_only and engine in PIPELINES
        else str(bench.work / f"{name}.png"),
    )


def carry_out(bench: Bench, job: Job) -> dict[str, Any]:
    """Run a job; it fails where its latents are not finite."""
    args = bench.args
    row = measured(job, sdcpp=args.sdcpp, gpu=bench.gpu, limit_s=args.limit_s)
    if row["status"] != "ok" or job.engine == "sdcpp":  # which gives no latents
        return row
    if not load_latents(Path(job.latents)).isfinite().all():
        row |= {"status": "failed", "reason": "its latents are not finite"}
    return row


def compare(job: Job, reference: Job) -> dict[str, float]:
    """Distances from the reference: of latents where there are some, and of pictures."""
    found = {}
    if job.picture:
        with Image.open(job.picture) as ours, Image.open(reference.picture) as exact:
            found["psnr_db"] = psnr_db(ours.convert("RGB"), exact.convert("RGB"))
    if job.engine != "sdcpp":
        pair = (load_latents(Path(file)) for file in (job.latents, reference.latents))
        found["latents_error"] = relative_l2(*pair)
    return found


def rows_of(bench: Bench, size: int) -> Iterator[dict[str, Any]]:
    """The reference's row and those of all engines, for one size."""
    args = bench.args
    exact = reference_job(bench, size)
    first: dict[str, Any] = {"engine": "reference", "label": "reference", "size": size}
    kept = all(Path(f).is_file() for f in (exact.latents, exact.picture, exact.keep_embeds))
    if args.keep and kept:
        first |= {"status": "ok", "reason": "kept from an earlier run"}
    else:
        first |= carry_out(bench, exact)
    yield first
    for engine in args.engines:
        for model in args.models if ENGINES[engine] else [args.checkpoint]:
            label = f"{engine} {model.name}" if ENGINES[engine] else engine
            row: dict[str, Any] = {"engine": engine, "label": label, "size": size}
            reason = "the reference failed" if first["status"] != "ok" else ""
            if reason := reason or why_not(bench, engine, model, size):
                row |= {"status": "skipped", "reason": reason}
            else:
                job = job_of(bench, exact, engine, model)
                row |= carry_out(bench, job)
                row |= compare(job, exact) if row["status"] == "ok" else {}
            yield row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown; what did not run has its reason in the place of figures."""
    lines = [HEADER, ["---"] * len(HEADER)]
    for row in rows:
        cells = [row["label"], str(row["size"])]
        if "step_s" not in row or row["status"] != "ok":
            lines.append([*cells, f"{row['status']}: {row['reason']}", *[""] * (len(HEADER) - 3)])
            continue
        step, least, most = (format_seconds(row[f"step{n}_s"]) for n in ("", "_min", "_max"))
        cells += [step, f"{least} to {most}", f"{row['ratio']:.2f}"]
        cells.append(format_seconds(row["total_s"]))
        peaks = (row[f"peak_{name}_bytes"] for name in ("rss", "private", "vram"))
        cells += ["-" if peak is None else format_bytes(peak) for peak in peaks]
        cells.append(f"{row['latents_error']:.2%}" if "latents_error" in row else "-")
        cells.append(f"{row['psnr_db']:.1f} dB" if "psnr_db" in row else "-")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every engine, print the table, end with the document; 1 where zquant failed."""
    args = _arguments(argv)
    with TemporaryDirectory() as folder:
        bench = Bench.of(args, args.work or Path(folder))
        bench.work.mkdir(parents=True, exist_ok=True)
        report: dict[str, Any] = {
            "schema": SCHEMA,
            "machine": describe_machine() | {"threads": torch.get_num_threads()},
            "command": command_line("benchmarks/peers.py", argv or sys.argv[1:]),
            "settings": {key: told(value) for key, value in vars(args).items()},
            "reference": "zquant, float32, on the checkpoint",
            "versions": {"sdcpp": sdcpp_version(args.sdcpp)},
            "ceilings": [ceiling(bench.dit, size, args.device) for size in args.sizes],
            "rows": [],
        }
        print(*report["ceilings"], sep="\n", flush=True)
        for i, size in enumerate(args.sizes):
            for row in rows_of(bench, size):
                print(f"{row['label']} {size}: {row['status']} {row['reason']}", file=sys.stderr)
                report["versions"] |= row.pop("versions", {})
                report["rows"].append(row)
                report["ceilings"][i] = lowered(report["ceilings"][i], bench.dit, args.device)
                for each in report["rows"]:
                    if each["size"] == size and "step_s" in each:
                        each["ratio"] = each["step_s"] / report["ceilings"][i]["floor_s"]
                if args.out:
                    write_document(args.out, report)
    print(table(report["rows"]))
    print(json.dumps(report))
    ours = [row for row in report["rows"] if row["engine"] in ("zquant", "reference")]
    return int(any(row["status"] != "ok" for row in ours))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="official folder, BF16")
    parser.add_argument("models", type=Path, nargs="+", help="folders that zquant converted")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="pixels")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--encode", action="store_true", help="every engine encodes the prompt")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=DTYPES, help="of the others' weights"
    )
    parser.add_argument("--compute-dtype", default="auto", help="zquant's")
    parser.add_argument("--compute", default="auto", help="zquant's: auto, exact or int8")
    parser.add_argument("--sdcpp", type=Path, metavar="PATH", help="stable-diffusion.cpp's sd-cli")
    parser.add_argument(
        "--latents-only", action="store_true", help="diffusers does not decode its latents"
    )
    parser.add_argument("--nunchaku", type=Path, metavar="FILE", help="its DiT of this checkpoint")
    parser.add_argument("--limit-s", type=float, default=7200, help="of one process, in seconds")
    parser.add_argument("--work", type=Path, help="folder that keeps latents and pictures")
    parser.add_argument("--keep", action="store_true", help="use references that are in --work")
    parser.add_argument("--out", type=new_file, help="write the document here as well")
    args = parser.parse_args(argv)
    if wrong := [size for size in args.sizes if size < 16 or size % 16]:
        parser.error(f"--sizes {wrong[0]}: it must be a multiple of 16")
    if args.steps < 2:
        parser.error(f"--steps is {args.steps}; it must be at least 2, as the first is kept apart")
    args.sdcpp = args.sdcpp and args.sdcpp.resolve()  # not one of the same name on the PATH
    try:
        for model in (args.checkpoint, *args.models):
            model_files(model, {}, None)
    except ZQuantError as error:
        parser.error(str(error))
    return args


if __name__ == "__main__":
    sys.exit(main())
