"""Prompt -> picture. Owns the life of the three networks, one at a time on the device.

    with Engine.open("models/z-image-turbo-q4_k_m") as engine:
        result = engine.generate(RunRequest(prompt="a red fox in the snow", seed=7))

Opening reads headers only. A request is planned before anything is allocated; several requests run
phase by phase: all prompts are encoded, then all pictures denoised, then all decoded. Every picture
of a request has a seed of its own (`seed`, `seed + 1`, ...), so each can be painted again alone.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from zquant_kernels.runtime import forbidden

from zquant.formats.embed_cache import EmbedCache
from zquant.formats.model_folder import demo_notice
from zquant.memory.device import Device, probe
from zquant.memory.forecast import Forecast
from zquant.memory.needs import Limits
from zquant.memory.plan import MemoryPlan
from zquant.memory.plan_report import summary_line
from zquant.memory.shortage import memory_that_runs_out
from zquant.memory.sizes import model_sizes
from zquant.models.checkpoint import Checkpoint, model_files
from zquant.painting import (
    Journal,
    Painting,
    Progress,
    Studio,
    plan_of,
)
from zquant.phases import uncapped_after
from zquant.prompts import Prompts
from zquant.request import RunRequest, RunResult
from zquant.settings import Settings

__all__ = ["Engine", "Journal", "Progress"]

Announce = Callable[[str], None]
NO_LIMITS = Limits()


class Engine:
    """A model on a device; serves any number of requests, none of which changes another.

    Args:
        checkpoint: the model.
        device: where it runs.
        notices: what the user should know about the model; every result repeats them.
        limits: ceilings on memory.
        cache: embeddings of prompts on disk.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: Device,
        notices: Sequence[str] = (),
        *,
        limits: Limits = NO_LIMITS,
        cache: EmbedCache | None = None,
    ) -> None:
        self.checkpoint, self.device = checkpoint, device
        self.prompts = Prompts(checkpoint, device, cache)
        self._is_open = True
        self._studio = Studio(
            checkpoint=checkpoint,
            device=device,
            limits=limits,
            prompts=self.prompts,
            notices=list(notices),
        )

    @classmethod
    def open(
        cls,
        model: str | Path | None = None,
        *,
        dit: str | Path | None = None,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        variant: str | None = None,
        device: str = "auto",
        compute_dtype: str = "auto",
        compute: str = "auto",
        kernels: str = "auto",
        attention: str = "sdpa",
        limits: Limits = NO_LIMITS,
        cache: EmbedCache | None = None,
    ) -> "Engine":
        """Open a model folder, single files, or a folder with some files replaced.

        Args:
            model: a folder made by `zquant convert`, or an official one; the text "demo" is the
                small model inside zquant.
            dit: a DiT file.
            text_encoder: its file.
            vae: its file.
            variant: "turbo" or "base" where the files cannot tell; None believes the folder.
            device: "auto", "cpu", "cuda" or "cuda:1".
            compute_dtype: "auto", "bfloat16", "float16" or "float32".
            compute: "auto", "exact" or "int8"; reasons are in `zquant.memory.paths`.
            kernels: "auto", "triton" or "torch".
            attention: "sdpa" or "int8".
            limits: ceilings on memory; without them, what is free.
            cache: embeddings of prompts on disk.

        Raises:
            ZQuantError: a file or the device is not what it should be; a device of an unknown name
                is a DeviceError.
            ValueError: no model is named, or another choice is unknown.
        """
        given = {"dit": dit, "text_encoder": text_encoder, "vae": vae}
        files = model_files(model, {k: Path(v) for k, v in given.items() if v}, variant)
        notices = []
        if model is None and variant is None:
            assumed = files.variant
            notices.append(
                f"single files do not tell the variant; {assumed.name} is assumed ({assumed.steps} "
                f"steps, shift {assumed.shift:g}). Name it with --variant, or give --model"
            )
        if notice := demo_notice(model):
            notices.append(notice)
        # the device first: it is wrong more often than the files, and found out sooner
        chosen = probe(device, compute_dtype, compute=compute, kernels=kernels, attention=attention)
        if limits.budget_bytes is not None and not chosen.is_cuda:
            notices.append(
                "--budget is a ceiling on VRAM and changes nothing on a CPU; see --max-ram"
            )
        checkpoint = Checkpoint(files)
        notices += checkpoint.notices
        return cls(checkpoint, chosen, notices, limits=limits, cache=cache)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; the engine cannot be used any more."""
        self._is_open = False
        self.checkpoint.close()

    def _check_open(self) -> None:
        if not self._is_open:
            raise ValueError("the engine is closed; open another with Engine.open")

    @memory_that_runs_out()
    def plan(self, request: RunRequest) -> MemoryPlan:
        """All memory of a request; nothing is done.

        Raises:
            PlanError: it does not fit; the message says what would.
            ValueError: the engine is closed.
        """
        self._check_open()
        return plan_of(self._studio, [Settings.of(request, self.checkpoint)])

    def smallest(self, plan: MemoryPlan) -> int | None:
        """The smallest ceiling on the device, in bytes, within which the planned picture fits.

        The ceiling is of VRAM on a GPU, of RAM on a CPU; None if there is none. `plan` has what
        was measured of the machine, so that nothing is measured again.
        """
        forecast = Forecast(self.checkpoint, self.device, plan.machine)
        return forecast.smallest(plan.picture, self._studio.limits)

    @property
    def dit_bpw(self) -> float:
        """Bits per weight of the DiT."""
        return model_sizes(self.checkpoint).dit_bpw

    def generate(
        self,
        request: RunRequest,
        progress: Progress = lambda *_: None,
        announce: Announce = lambda _: None,
    ) -> RunResult:
        """Paint.

        Args:
            request: what to paint.
            progress: called with a phase ("text encoder", "denoise", "vae"), done and total.
            announce: called with lines for the user: the plan, and what became of it.

        Raises:
            PlanError: the request does not fit into the memory it may use.
            ZQuantError: numbers stopped being finite, or a file is damaged.
            ValueError: `initial_latents` do not fit the request, or the engine is closed.
        """
        (result,) = self.generate_all([request], progress, announce)
        return result

    @torch.inference_mode()
    def generate_all(
        self,
        requests: Sequence[RunRequest],
        progress: Progress = lambda *_: None,
        announce: Announce = lambda _: None,
        journal: Journal | None = None,
    ) -> Iterator[RunResult]:
        """Paint many requests, phase by phase; results come one by one from the last phase.

        Args:
            requests: what to paint.
            progress: as for `generate`, over all requests.
            announce: as for `generate`.
            journal: of pictures that are not finished.

        Raises:
            As `generate`.
        """
        self._check_open()
        device = self.device
        if device.is_cuda:
            torch.cuda.reset_peak_memory_stats(device.torch_device)
        with forbidden(device.paths.forbidden), memory_that_runs_out(), uncapped_after(device):
            settings = [Settings.of(request, self.checkpoint) for request in requests]
            run = Painting(self._studio, settings, progress)
            announce(summary_line(run.plan, self.checkpoint.n_blocks))
            run.encode()
            run.denoise(journal)
            yield from run.decode()

    def recipes(self, request: RunRequest) -> list[dict[str, Any]]:
        """The recipe of every picture of a request whose seed is given."""
        settings = Settings.of(request, self.checkpoint)
        return [settings.recipe(i, self.checkpoint, self.device) for i in range(request.count)]
