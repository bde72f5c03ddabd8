"""One engine, one picture: the process that paints it, and how that process is run and read.

    python benchmarks/peer_workers.py JOB.json

The job names the engine, its files and the settings. Latents go to `.npy` files, the picture to a
PNG, and the last line printed is one JSON document. diffusers' steps are timed from the entry of
the transformer to the new latents, zquant's by its own clock from the end of one to the next.

nunchaku follows its documentation and is untested.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import command_line
from sdcpp import sdcpp_command, sdcpp_document
from torch import Tensor
from watch import Gpu, Watch

from zquant import Engine, RunRequest
from zquant.formats.latents import load_latents, save_latents
from zquant.sampling import sigmas

__all__ = ["Job", "measured"]

SIGMAS_DIFFER = 1e-5
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "gguf", "nunchaku")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One picture by one engine; guidance is off, so that a step is one pass of the DiT.

    Attributes:
        engine: a name of `peers.ENGINES`.
        checkpoint: official folder.
        model: the engine's weights: a folder for zquant and sdcpp, a DiT file for others.
        size: pixels of both sides.
        sigmas: `steps + 1` noise levels that are expected of the engine.
        seed: that `noise` was drawn with, for engines that take none.
        dtype: zquant's `compute_dtype`, or that of the weights of others.
        compute: zquant's.
        noise: `.npy`, float32 `[1, C, H, W]`.
        embeds: `.npy`, float32 `[T, width]`; "": the engine encodes the prompt.
        latents: `.npy` to write, final.
        picture: PNG to write; "": the latents are not decoded, for engines of diffusers alone.
        keep_embeds: `.npy` to write; "": not wanted.
    """

    engine: str
    checkpoint: str
    model: str
    prompt: str
    size: int
    steps: int
    sigmas: list[float]
    seed: int
    device: str
    dtype: str
    compute: str
    noise: str
    embeds: str
    latents: str
    picture: str
    keep_embeds: str = ""


def paint(job: Job) -> dict[str, Any]:
    """Paint, write the results, and say how it went."""
    document = _zquant(job) if job.engine == "zquant" else _diffusers(job)
    return document | {"versions": {name: version(name) for name in PACKAGES if find_spec(name)}}


def _zquant(job: Job) -> dict[str, Any]:
    start = time.perf_counter()
    engine = Engine.open(job.model, device=job.device, compute_dtype=job.dtype, compute=job.compute)
    with closing(engine):
        if job.embeds:
            engine.prompts.learn([job.prompt], [torch.from_numpy(np.load(job.embeds))])
        request = RunRequest(
            prompt=job.prompt,
            width=job.size,
            height=job.size,
            steps=job.steps,
            seed=job.seed,
            guidance_scale=0.0,
            initial_latents=load_latents(Path(job.noise)),
            keep_latents=True,
        )
        result = engine.generate(request)
        shift = engine.checkpoint.files.variant.shift
        device = engine.device
    assert result.latents is not None
    save_latents(Path(job.latents), result.latents[-1])
    result.images[0].save(job.picture)
    if job.keep_embeds:
        np.save(job.keep_embeds, result.prompt_embeds[0].float().numpy())
    return {
        "steps_s": result.timings["steps"],
        "text_encoder_s": 0.0 if job.embeds else result.timings["text_encoder"],
        "vae_s": result.timings["vae"],
        "work_s": time.perf_counter() - start,
        "sigmas": sigmas(job.steps, shift).tolist(),
        "dtype": str(device.compute_dtype).removeprefix("torch."),
        "compute": device.compute.mode,
    }


def _transformer(job: Job, dtype: torch.dtype) -> Any:
    """The DiT of `job.model`; None is the checkpoint's."""
    if job.engine == "nunchaku":
        kind = import_module("nunchaku").NunchakuZImageTransformer2DModel
        return kind.from_pretrained(job.model, torch_dtype=dtype)
    if job.engine != "diffusers-gguf":
        return None
    from diffusers import GGUFQuantizationConfig, ZImageTransformer2DModel

    return ZImageTransformer2DModel.from_single_file(
        job.model,
        quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
        config=str(Path(job.checkpoint, "transformer")),
        torch_dtype=dtype,
    )


def _diffusers(job: Job) -> dict[str, Any]:
    """The pipeline of diffusers, without the text encoder where embeddings are given."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    start, dtype = time.perf_counter(), getattr(torch, job.dtype)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # deprecations inside the libraries
        given = {"text_encoder": None, "tokenizer": None} if job.embeds else {}
        if transformer := _transformer(job, dtype):
            given["transformer"] = transformer
        pipeline = diffusers.ZImagePipeline.from_pretrained(
            job.checkpoint, torch_dtype=dtype, local_files_only=True, **given
        )
        pipeline.set_progress_bar_config(disable=True)
        if job.engine == "diffusers-offload":
            pipeline.enable_model_cpu_offload(device=job.device)
        elif job.engine == "diffusers-group":
            pipeline.enable_group_offload(
                onload_device=torch.device(job.device), offload_type="leaf_level", use_stream=True
            )
        else:
            pipeline.to(job.device)
        document = _run_pipeline(job, dtype, pipeline)
    return document | {"work_s": time.perf_counter() - start, "dtype": job.dtype}


def _run_pipeline(job: Job, dtype: torch.dtype, pipeline: Any) -> dict[str, Any]:
    """Paint once; times of what happened, the schedule that was used."""
    starts: list[float] = []
    ends: list[float] = []
    final: list[Tensor] = []

    def begin(*_: object) -> None:
        starts.append(_now(job.device))

    def end(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        ends.append(_now(job.device))
        final[:] = [values["latents"]]
        return values

    given: dict[str, Any] = {"prompt": job.prompt}
    if job.embeds:
        embeds = torch.from_numpy(np.load(job.embeds)).to(job.device, dtype)
        given = {"prompt": None, "prompt_embeds": [embeds]}
    pipeline.transformer.register_forward_pre_hook(begin)
    called = _now(job.device)
    (painted,) = pipeline(
        **given,
        output_type="pil" if job.picture else "latent",
        height=job.size,
        width=job.size,
        num_inference_steps=job.steps,
        guidance_scale=0.0,
        latents=load_latents(Path(job.noise)).to(job.device),
        callback_on_step_end=end,
    ).images
    done = _now(job.device)
    save_latents(Path(job.latents), final[0])
    if job.picture:
        painted.save(job.picture)
    return {
        "steps_s": [b - a for a, b in zip(starts, ends, strict=True)],
        "text_encoder_s": 0.0 if job.embeds else starts[0] - called,
        "vae_s": done - ends[-1] if job.picture else None,
        "sigmas": pipeline.scheduler.sigmas.tolist(),
    }


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A process that ended: `heard` is when each piece of its output came, and the piece."""

    code: int
    heard: Sequence[tuple[float, str]]
    wall_s: float
    watch: Watch

    @property
    def text(self) -> str:
        """All it printed."""
        return "".join(piece for _, piece in self.heard)


def run_process(command: Sequence[str], gpu: Gpu | None, limit_s: float) -> Ended:
    """Run, listen and watch; what takes longer than `limit_s` is killed."""
    env = {**os.environ, "ZQUANT_CACHE": "off", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    heard: list[tuple[float, str]] = []
    start = time.perf_counter()
    with (
        Watch(gpu) as watch,
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process,
    ):
        watch.start(process.pid)
        killer = threading.Timer(limit_s, process.kill)
        killer.daemon = True
        killer.start()
        assert process.stdout is not None
        while piece := os.read(process.stdout.fileno(), 2**16):
            heard.append((time.perf_counter(), piece.decode("utf-8", "replace")))
        code = process.wait()
        killer.cancel()
    return Ended(code=code, heard=heard, wall_s=time.perf_counter() - start, watch=watch)


def measured(job: Job, *, sdcpp: Path | None, gpu: Gpu | None, limit_s: float) -> dict[str, Any]:
    """Figures of a job, or why there are none: `status` is "ok", or "failed" with a `reason`.

    `step_s` is the median without the first. Beside the latents is the file of the job.
    """
    if job.engine == "sdcpp":
        command = sdcpp_command(str(sdcpp), job)
    else:
        written = Path(job.latents).with_suffix(".json")
        written.write_text(json.dumps(asdict(job)), "utf-8")
        command = [sys.executable, __file__, str(written)]
    for old in filter(None, (job.latents, job.picture)):
        Path(old).unlink(missing_ok=True)
    row: dict[str, Any] = {}
    if job.engine == "sdcpp":
        row["command"] = command_line(command[0].rpartition("/")[2], command[1:])
    try:
        ended = run_process(command, gpu, limit_s)
        row |= {
            "total_s": ended.wall_s,
            "peak_rss_bytes": ended.watch.ram_bytes or None,
            "peak_private_bytes": ended.watch.private_bytes or None,
            "peak_vram_bytes": ended.watch.vram_bytes,
            "vram_witness": ended.watch.witness,
        }
        return row | figures(document_of(ended, job, limit_s), job)
    except (OSError, ValueError) as error:
        return row | {"status": "failed", "reason": f"{error!s:.400}"}


def document_of(ended: Ended, job: Job, limit_s: float) -> dict[str, Any]:
    """What the process said of itself.

    Raises:
        ValueError: it failed, or said nothing that can be read.
    """
    lines = [line.strip() for line in ended.text.splitlines() if line.strip()] or [""]
    if ended.code == -signal.SIGKILL:
        why = "killed by the system, as for want of memory"
        raise ValueError(f"stopped after {limit_s:g} s" if ended.wall_s >= limit_s else why)
    if ended.code:
        raise ValueError(f"exit code {ended.code}: {lines[-1]}")
    if job.engine == "sdcpp":
        return sdcpp_document(ended.heard, job)
    documents = [line for line in lines if line.startswith('{"steps_s"')]
    if not documents:
        raise ValueError(f"printed no document: {lines[-1]}")
    found: dict[str, Any] = json.loads(documents[-1])
    return found


def figures(document: dict[str, Any], job: Job) -> dict[str, Any]:
    """Times of the steps.

    Raises:
        ValueError: it did not do what was asked.
    """
    steps, used = document["steps_s"], document["sigmas"]
    if len(steps) != job.steps:
        raise ValueError(f"made {len(steps)} steps; asked for {job.steps}")
    if len(used) != len(job.sigmas) or not np.allclose(used, job.sigmas, 0, SIGMAS_DIFFER):
        raise ValueError(f"sampled with sigmas {used}; expected {job.sigmas}")
    later = steps[1:] or steps
    return {
        "status": "ok",
        "reason": "",
        **document,
        "step_s": statistics.median(later),
        "step_min_s": min(later),
        "step_max_s": max(later),
        "first_step_s": steps[0],
    }


def main() -> int:
    """Carry out the job."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text("utf-8")))
    print(json.dumps(paint(job)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
