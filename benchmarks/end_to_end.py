"""The main job at full size: convert a checkpoint, paint with it, and say how far from the floor.

    python benchmarks/end_to_end.py SOURCE WORK --qtypes Q8_0 Q4_K_M --sizes 256 512 --out FILE

Every command runs in its own process; its time is wall time, its memory what `benchmarks/watch.py`
sees of it and its worker processes. A step is the median of those after the first, which also
reads the weights. The floor of a step is its multiplications at the rate this machine reaches on
one of the model's own matrices, plus the expansion of every weight at the rate of the decoder
alone; attention and elementwise work are not in the floor.

With `--sdcpp` and `--sdcpp-source`, a DiT in one file, the converter of stable-diffusion.cpp is
measured too; it converts that file, zquant all three networks, so compare MB/s. The last line is
one JSON document.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from machine import command_line, describe_machine, new_file, write_document
from sdcpp import sdcpp_version
from watch import Watch

import zquant.memory.device
from zquant.quant.codec import dequantize
from zquant.quant.qtypes import QTYPES
from zquant.units import format_bytes, format_seconds

DIM, HIDDEN, LAYERS, REFINERS = 3840, 10240, 30, 2
BLOCK_WEIGHTS = 4 * DIM**2 + 3 * DIM * HIDDEN
CAPTION_TOKENS = 32
PROMPT = "a red fox in the snow, golden light, photograph"
SCHEMA = "zquant-end-to-end-2"
SDCPP_TYPES = {"Q8_0": "q8_0", "Q6_K": "q6_K", "Q4_K_S": "q4_K", "Q4_K_M": "q4_K", "Q4_0": "q4_0"}


def main() -> int:
    """Run everything, print as it comes, end with the document."""
    args = _arguments()
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "machine": machine(args.compute_dtype),
        "command": command_line("benchmarks/end_to_end.py", sys.argv[1:]),
        "sdcpp": sdcpp_version(args.sdcpp),
    }
    print(json.dumps(report["machine"], indent=1))
    report["convert"], report["peers_convert"] = [], []
    for qtype in args.qtypes:
        folder = args.work / qtype
        if not (args.keep and (folder / "model.json").is_file()):
            report["convert"].append(_convert(args.source, folder, qtype))
            _say(report["convert"][-1])
        report["peers_convert"].append(_convert_by_sdcpp(args, qtype))
        _say(report["peers_convert"][-1])
    report["run"] = []
    for qtype in args.qtypes:
        for size in args.sizes:
            report["run"].append(_run(args, args.work / qtype, qtype, size, report["machine"]))
            _say(report["run"][-1])
    document = json.dumps(report)
    if args.out:
        write_document(args.out, report)
    print(document)
    return 0


def machine(compute_dtype: str) -> dict[str, Any]:
    """What this runs on, and the rates that bound it."""
    found = zquant.memory.device.probe("cpu", compute_dtype)
    dtype = found.compute_dtype
    return {
        **describe_machine(),
        "compute_dtype": str(dtype).removeprefix("torch."),
        "matmul_gflop_s": {m: _matmul_rate(m, dtype) for m in (288, 1056)},
        "decode_gweights_s": {q: _decode_rate(q, dtype) for q in ("Q8_0", "Q4_K", "Q6_K")},
    }


def floor_seconds(size: int, qtype: str, rates: dict[str, Any]) -> dict[str, float]:
    """Least time of a step of a `size` x `size` picture on this machine."""
    image = (size // 16) ** 2
    flop = 2 * BLOCK_WEIGHTS * (LAYERS * (image + CAPTION_TOKENS) + REFINERS * image)
    rate = rates["matmul_gflop_s"][288 if size <= 256 else 1056]
    decode = rates["decode_gweights_s"]["Q8_0" if qtype == "Q8_0" else "Q4_K"]
    weights = BLOCK_WEIGHTS * (LAYERS + REFINERS)
    return {
        "multiply_s": flop / rate / 1e9,
        "expand_s": weights / decode / 1e9,
        "tflop": flop / 1e12,
    }


def _matmul_rate(tokens: int, dtype: torch.dtype) -> float:
    x, weight = torch.randn(tokens, DIM).to(dtype), torch.randn(HIDDEN, DIM).to(dtype)
    seconds = _best(lambda: x @ weight.t())
    return round(2 * tokens * DIM * HIDDEN / seconds / 1e9, 1)


def _decode_rate(qtype: str, dtype: torch.dtype) -> float:
    n_rows = 512
    packed = torch.zeros(n_rows, QTYPES[qtype].row_bytes(DIM), dtype=torch.uint8)
    out = torch.empty(n_rows, DIM, dtype=dtype)
    seconds = _best(lambda: dequantize(packed, QTYPES[qtype], dtype, out=out))
    return round(n_rows * DIM / seconds / 1e9, 3)


def _best(work: Any) -> float:
    """Seconds of the fastest run within five seconds: a floor must not be raised by noise."""
    times, end = [], time.perf_counter() + 5
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _zquant(*words: str) -> tuple[dict[str, Any], str]:
    """`_measured` of a zquant command."""
    figures, printed = _measured([sys.executable, "-m", "zquant", *words, "--json"])
    return {"command": f"zquant {words[0]}", **figures}, printed


def _measured(command: list[str]) -> tuple[dict[str, Any], str]:
    """Run a command; its wall time and peak memory, and what it printed."""
    start = time.perf_counter()
    with Watch(None) as watch, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        watch.start(run.pid)
        printed, _ = run.communicate()
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {run.returncode}")
    figures = {
        "wall_s": round(time.perf_counter() - start, 2),
        "peak_rss_bytes": watch.ram_bytes,
        "peak_private_bytes": watch.private_bytes,
    }
    return figures, printed


def _convert(source: Path, folder: Path, qtype: str) -> dict[str, Any]:
    figures, printed = _zquant("convert", str(source), str(folder), "--qtype", qtype)
    files = json.loads(printed)["files"]
    rate = _rate([*source.rglob("*.safetensors")], figures)
    return {"engine": "zquant", "qtype": qtype, **figures, **rate, "files": files}


def _convert_by_sdcpp(args: argparse.Namespace, qtype: str) -> dict[str, Any]:
    """stable-diffusion.cpp's conversion of one file, or why there is none."""
    row = {"engine": "sdcpp", "qtype": qtype}
    if args.sdcpp is None or args.sdcpp_source is None:
        return {**row, "skipped": "no --sdcpp PATH and --sdcpp-source FILE"}
    if (kind := SDCPP_TYPES.get(qtype)) is None:
        return {**row, "skipped": f"it has no {qtype}"}
    out = args.work / f"sdcpp-{kind}.gguf"
    flags = {"--mode": "convert", "--model": args.sdcpp_source, "--output": out, "--type": kind}
    words = [str(word) for flag in flags.items() for word in flag]
    figures, _ = _measured([str(args.sdcpp), *words])
    return {**row, **figures, **_rate([args.sdcpp_source], figures), "bytes": out.stat().st_size}


def _rate(sources: list[Path], figures: dict[str, Any]) -> dict[str, Any]:
    """What was read, and how fast."""
    n_bytes = sum(path.stat().st_size for path in sources)
    return {"source_bytes": n_bytes, "mb_s": round(n_bytes / figures["wall_s"] / 1e6, 1)}


def _run(
    args: argparse.Namespace, folder: Path, qtype: str, size: int, rates: dict[str, Any]
) -> dict[str, Any]:
    flags = {
        "--model": folder,
        "--width": size,
        "--height": size,
        "--steps": args.steps,
        "--seed": 0,
        "--out": args.work / f"{qtype}-{size}.png",
        "--device": "cpu",
        "--compute-dtype": args.compute_dtype,
    }
    listed = [str(word) for flag in flags.items() for word in flag]
    figures, printed = _zquant("run", PROMPT, *listed)
    timings = json.loads(printed)["timings"]
    steps = timings["steps"]
    floor = floor_seconds(size, qtype, rates)
    return {
        "qtype": qtype,
        "size": size,
        **figures,
        "step_s": round(statistics.median(steps[1:] or steps), 2),
        "steps_s": [round(step, 2) for step in steps],
        "text_encoder_s": round(timings["text_encoder"], 2),
        "vae_s": round(timings["vae"], 2),
        "floor": {name: round(value, 2) for name, value in floor.items()},
    }


def _say(row: dict[str, Any]) -> None:
    if "skipped" in row:
        print(f"convert {row['qtype']} by {row['engine']}: skipped, {row['skipped']}")
        return
    peak = format_bytes(row["peak_rss_bytes"])
    if "size" not in row:
        print(
            f"convert {row['qtype']} by {row['engine']}: {format_seconds(row['wall_s'])}, "
            f"{row['mb_s']:.0f} MB/s read, peak RSS {peak}"
        )
        return
    floor = row["floor"]["multiply_s"] + row["floor"]["expand_s"]
    print(
        f"run {row['qtype']} {row['size']}x{row['size']}: {format_seconds(row['wall_s'])} in all, "
        f"floor {floor:.1f} s/step, "
        f"measured {row['step_s']:.1f} s/step ({row['step_s'] / floor:.2f} times), peak RSS {peak}",
        flush=True,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="official checkpoint folder")
    parser.add_argument("work", type=Path, help="folder for converted models and pictures")
    parser.add_argument("--qtypes", nargs="+", default=["Q8_0", "Q4_K_M"])
    parser.add_argument("--sizes", nargs="*", type=int, default=[256, 512])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--compute-dtype", default="auto")
    parser.add_argument("--sdcpp", type=Path, metavar="PATH", help="stable-diffusion.cpp's sd-cli")
    parser.add_argument("--sdcpp-source", type=Path, metavar="FILE", help="a DiT in one file")
    parser.add_argument("--keep", action="store_true", help="use converted folders that exist")
    parser.add_argument("--out", type=new_file, help="write the document here as well")
    args = parser.parse_args()
    if args.sdcpp and shutil.which(args.sdcpp) is None:
        parser.error(f"--sdcpp {args.sdcpp}: is not a program")
    return args


if __name__ == "__main__":
    sys.exit(main())
