"""Stages of a GPU session about whole models: made, converted, painted within budgets and by peers.

    WORK/checkpoint   official layout, BF16, 20.5 GB of random weights
    WORK/Q8_0         converted on the GPU, 11 GB
    WORK/Q4_K_M       likewise, 6 GB
    WORK/streaming    what that benchmark has measured so far, likewise WORK/peers and its pictures

The work folder outlives the session: a stage does what is missing there. A benchmark that was
stopped begins anew, with the references it has; its rows so far are in the session's document. A
rehearsal has the tiny preset and a work folder of its own.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gpu_run import Failed, Run, Skipped, say, tail
from gpu_stages import version

__all__ = [
    "ballast",
    "checkpoint",
    "convert_q4_k_m",
    "convert_q8_0",
    "peers_512",
    "peers_1024",
    "streaming_q4_k_m",
    "streaming_q4_k_m_int8",
    "streaming_q8_0",
]

QTYPES = ("Q8_0", "Q4_K_M")
PRESETS = {False: "full", True: "tiny"}  # by whether it is a rehearsal
DISK_BYTES = {False: 40_000_000_000, True: 500_000_000}  # the checkpoint and both models
BUDGETS = ("none", "2GiB", "3GiB", "4GiB", "6GiB", "8GiB")
INT8_BUDGETS = ("none", "4GiB")
BALLAST_BUDGETS = ("2GiB", "4GiB")
PICTURE = ("--width", "1024", "--height", "1024", "--steps", "8")
REHEARSED = (
    *("--width", "64", "--height", "64", "--steps", "2", "--budgets", "none", "1GiB"),
    *("--compute-dtype", "float32"),
)
PEERS_REHEARSED = ("--steps", "2", "--dtype", "float32", "--compute-dtype", "float32")
PEER_LIMIT_S = "150"  # of one process, so that one that hangs leaves time to the others
PEER_PACKAGES = ("diffusers", "transformers", "accelerate", "gguf")
WEIGHTS = (".gguf", ".safetensors")
SHOWN_LINES = 40


def checkpoint(run: Run) -> dict[str, Any]:
    """A checkpoint of the published size in the work folder, with random weights."""
    folder, part = run.work / "checkpoint", run.work / "checkpoint.part"
    if folder.is_dir():
        return {"made_before": True, "bytes": _n_bytes(folder)}
    shutil.rmtree(part, ignore_errors=True)  # of a run that was stopped
    run.work.mkdir(parents=True, exist_ok=True)
    made = sum(_n_bytes(run.work / qtype) for qtype in QTYPES)
    free, needed = shutil.disk_usage(run.work).free, DISK_BYTES[run.rehearse] - made
    if free < needed:
        raise Failed(
            f"{run.work}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; choose "
            "another folder with --work"
        )
    seconds = _make(run, part, PRESETS[run.rehearse])
    part.rename(folder)
    return {"bytes": _n_bytes(folder), **_speed(_n_bytes(folder), seconds)}


def convert_q8_0(run: Run) -> dict[str, Any]:
    """The checkpoint becomes Q8_0, by the GPU; the tiny one by GPU and CPU, to the same bytes."""
    return _convert(run, "Q8_0")


def convert_q4_k_m(run: Run) -> dict[str, Any]:
    """Likewise Q4_K_M, whose K types search for their scales."""
    return _convert(run, "Q4_K_M")


def streaming_q8_0(run: Run) -> Any:
    """The memory plan kept, and its price, for the Q8_0 model within every budget."""
    return _streaming(run, "Q8_0")


def streaming_q4_k_m(run: Run) -> Any:
    """Likewise for the Q4_K_M model."""
    return _streaming(run, "Q4_K_M")


def streaming_q4_k_m_int8(run: Run) -> Any:
    """Likewise with int8 products, which "auto" chooses on few GPUs only."""
    return _streaming(run, "Q4_K_M", "--compute", "int8", budgets=INT8_BUDGETS)


def ballast(run: Run) -> Any:
    """Both models with the rest of the VRAM taken, so that only the budget is there."""
    if run.rehearse:
        raise Skipped("a rehearsal: there is no VRAM to fill")
    words = (*(_model(run, qtype) for qtype in QTYPES), "--ballast", *PICTURE)
    return _benchmark(run, "streaming", *words, "--budgets", *BALLAST_BUDGETS)


def peers_1024(run: Run) -> Any:
    """The same picture of 1024 pixels by zquant and by every peer that is installed."""
    return _peers(run, 1024)


def peers_512(run: Run) -> Any:
    """Likewise of 512 pixels."""
    return _peers(run, 512)


def _make(run: Run, folder: Path, preset: str) -> float:
    """Write a checkpoint; seconds."""
    say(f"  making the {preset} checkpoint")
    start = time.monotonic()
    words = (str(folder), "--preset", preset, "--dtype", "bfloat16")
    run.loud = preset == "full"
    if trouble := run.python("tools/make_checkpoint.py", *words, **_few_threads(run)).trouble:
        raise Failed(f"make_checkpoint: {trouble}")
    return time.monotonic() - start


def _convert(run: Run, qtype: str) -> dict[str, Any]:
    """Convert what is not converted."""
    result: dict[str, Any] = {"same_bytes": _same_bytes(run, qtype)}
    folder = run.work / qtype
    if _is_made(run, qtype):
        result["made_before"] = True
    else:
        source = _checkpoint(run)
        read = _n_bytes(source)
        manifest, seconds, place = _converted(run, source, folder, qtype, run.device)
        n_weights = sum(file["weights"] for file in manifest["files"].values())
        result |= {"place": place, "source_bytes": read, "weights": n_weights}
        result |= _speed(read, seconds)
        result["gweights_s"] = round(n_weights / seconds / 1e9, 3)
    result["files"] = json.loads((folder / "model.json").read_text("utf-8"))["files"]
    return result


def _same_bytes(run: Run, qtype: str) -> dict[str, str]:
    """SHA-256 of the tiny model's files, which are the same by GPU and CPU.

    Raises:
        Failed: they are not.
    """
    with TemporaryDirectory(dir=run.work if run.work.is_dir() else None) as name:
        tiny = Path(name, "checkpoint")
        _make(run, tiny, "tiny")
        found = []
        for i, device in enumerate((run.device, "cpu")):
            folder = Path(name, str(i))
            _converted(run, tiny, folder, qtype, device)
            files = sorted(p for p in folder.iterdir() if p.suffix in WEIGHTS)
            found.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files})
    ours, theirs = found
    if not ours or ours != theirs:
        names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        raise Failed(f"tiny {qtype}: {', '.join(names)} differ by {run.device} and cpu", found)
    return ours


def _converted(
    run: Run, source: Path, folder: Path, qtype: str, device: str
) -> tuple[dict[str, Any], float, str]:
    """The manifest, seconds, and where it says that it quantized."""
    say(f"  converting {source.name} to {qtype} on {device}")
    start = time.monotonic()
    words = (str(source), str(folder), "--qtype", qtype, "--device", device, "--json", "--resume")
    done = run.python("-m", "zquant", "convert", *words, **_few_threads(run))
    if done.trouble:
        raise Failed(f"zquant convert to {qtype} on {device}: {done.trouble}")
    manifest: dict[str, Any] = done.document()
    return manifest, time.monotonic() - start, " ".join(tail(done.stderr, 1))


def _streaming(run: Run, qtype: str, *flags: str, budgets: Sequence[str] = BUDGETS) -> Any:
    words = REHEARSED if run.rehearse else (*PICTURE, "--budgets", *budgets)
    return _benchmark(run, "streaming", _model(run, qtype), *words, *flags)


def _peers(run: Run, size: int) -> Any:
    """Everybody's pictures of one size; a reference that an earlier call painted is used again.

    Raises:
        Failed: also where nobody but zquant painted, so that a later call tries again.
    """
    words = [str(_checkpoint(run)), *(_model(run, qtype) for qtype in QTYPES)]
    words += ["--work", str(run.work / "peers"), "--keep", "--limit-s", PEER_LIMIT_S]
    words += ["--sizes", str(size // 16 if run.rehearse else size)]
    words += PEERS_REHEARSED if run.rehearse else ("--steps", "8")
    if program := shutil.which("sd-cli"):
        words += ["--sdcpp", program]
    document = _benchmark(run, "peers", *words)
    theirs = [row for row in document["rows"] if row["engine"] not in ("reference", "zquant")]
    if not any(row["status"] == "ok" for row in theirs):
        reason = "; ".join(["no peer painted", *dict.fromkeys(row["reason"] for row in theirs)])
        if missing := [name for name in PEER_PACKAGES if version(name) is None]:
            reason += f". PYTHONPATH must name the wheels of {', '.join(missing)}"
        raise Failed(reason, document)
    return document


def _benchmark(run: Run, name: str, *words: str) -> Any:
    """The document of a benchmark, which it writes after every row.

    Raises:
        Failed: it found something wrong, or ended before it was through; with the rows so far.
    """
    run.loud = not run.rehearse
    out = run.work / name / "document.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)  # of an earlier stage
    words = (*words, "--device", run.device, "--out", str(out))
    done = run.python(f"benchmarks/{name}.py", *words, **_few_threads(run))
    try:
        document = done.document()
    except Failed as failed:
        raise Failed(str(failed), _so_far(out) or tail(done.stderr, SHOWN_LINES)) from failed
    if done.trouble:
        raise Failed("; ".join(_failures(document)) or done.trouble, document)
    return document


def _so_far(out: Path) -> Any:
    """The document of a benchmark that did not end; None where it had no row."""
    try:
        return json.loads(out.read_text("utf-8"))
    except (OSError, ValueError):  # also half of one
        return None


def _failures(document: dict[str, Any]) -> list[str]:
    """What a benchmark found wrong: a list of its own, or rows that failed."""
    rows = [row for row in document.get("rows", []) if row.get("status") == "failed"]
    found: list[str] = document.get("failures", [])
    return [*found, *(f"{row['label']} {row['size']}: {row['reason']}" for row in rows)]


def _checkpoint(run: Run) -> Path:
    """Its folder.

    Raises:
        Failed: it is not there.
    """
    folder = run.work / "checkpoint"
    if not folder.is_dir():
        raise Failed(f"{folder} is missing; run: checkpoint --again")
    return folder


def _model(run: Run, qtype: str) -> str:
    """Its folder.

    Raises:
        Failed: it is not there.
    """
    if not _is_made(run, qtype):
        stages = f"checkpoint convert-{qtype.lower()} --again"
        raise Failed(f"{run.work / qtype} is not a model yet; run: {stages}")
    return str(run.work / qtype)


def _is_made(run: Run, qtype: str) -> bool:
    return (run.work / qtype / "model.json").is_file()


def _n_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _speed(n_bytes: int, seconds: float) -> dict[str, float]:
    return {"seconds": round(seconds, 1), "gb_s": round(n_bytes / seconds / 1e9, 3)}


def _few_threads(run: Run) -> dict[str, str]:
    """Small operations are slower with many."""
    return {"OMP_NUM_THREADS": "1"} if run.rehearse else {}
