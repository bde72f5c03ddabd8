"""Some requests on their way through the phases, with one plan for all of them.

What is finished is kept here, outside the phases: when memory is taken by other programs meanwhile,
the rest is planned again with what is left and goes on from there.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from zquant.errors import PlanError
from zquant.image import to_image
from zquant.memory.device import Device, peak_host_bytes
from zquant.memory.forecast import Forecast
from zquant.memory.machine import keep_heap_small
from zquant.memory.needs import Limits
from zquant.memory.plan import MemoryPlan
from zquant.memory.shortage import lost_vram
from zquant.models.checkpoint import Checkpoint
from zquant.phases import Job, Phases, Picture
from zquant.prompts import Prompts
from zquant.request import RunResult
from zquant.settings import Settings
from zquant.units import format_bytes

__all__ = ["Journal", "Painting", "Progress", "Studio", "plan_of"]

Progress = Callable[[str, int, int], None]  # phase, done, total
T = TypeVar("T")
SMALLER = 0.9  # of the budget within which memory ran out


@dataclass(frozen=True, slots=True, kw_only=True)
class Studio:
    """What all requests to one engine share.

    Attributes:
        checkpoint: the model.
        device: where it runs.
        limits: ceilings on memory.
        prompts: what is known of earlier ones.
        notices: what the user should know about the model.
    """

    checkpoint: Checkpoint
    device: Device
    limits: Limits
    prompts: Prompts
    notices: list[str]


class Journal(Protocol):
    """Keeps pictures that are not finished, by their recipe, so that work is not repeated."""

    def load(self, recipe: Mapping[str, Any]) -> tuple[int, Tensor] | None:
        """Steps done and float32 `[C, H, W]` latents; None if there are none."""

    def save(self, recipe: Mapping[str, Any], steps_done: int, latents: Tensor) -> None:
        """Keep float32 `[C, H, W]` latents after so many steps."""


def plan_of(
    studio: Studio, requests: Sequence[Settings], limits: Limits | None = None
) -> MemoryPlan:
    """One plan for all requests: each need is that of the most demanding one.

    Raises:
        PlanError: it does not fit; the message says what would.
    """
    ids = studio.prompts.ids(p for settings in requests for p in settings.prompts)
    known = studio.prompts.known(ids)
    lengths = [len(cut.ids) for prompt, cut in ids.items() if prompt not in known]
    longest = max(len(cut.ids) for cut in ids.values())
    pictures = [settings.picture(longest) for settings in requests]
    n_pictures = sum(settings.request.count for settings in requests)
    forecast = Forecast(studio.checkpoint, studio.device)
    return forecast.plan(pictures, limits or studio.limits, lengths, n_pictures)


class Painting:
    """Some requests on their way through the phases."""

    def __init__(self, studio: Studio, requests: Sequence[Settings], progress: Progress) -> None:
        self.studio, self.requests, self.progress = studio, requests, progress
        checkpoint = studio.checkpoint
        noise = [settings.noise(checkpoint) for settings in requests]
        self.notices: list[str] = []
        if studio.limits.ram_bytes is not None:
            keep_heap_small()
        self.plan = plan_of(studio, requests)
        self.phases = Phases(checkpoint, studio.device, self.plan)
        asked = studio.limits.budget_bytes
        if studio.device.is_cuda and asked is not None and asked > self.plan.budget_bytes:
            self.notices.append(
                f"the budget is {format_bytes(asked)}, but only "
                f"{format_bytes(self.plan.budget_bytes)} of VRAM are free; planned with those"
            )
        self.start = time.perf_counter()
        self.timings: dict[str, float] = {}
        self.jobs = [
            Job(
                pictures=[Picture(latents=each) for each in start[:, None]],
                schedule=settings.schedule,
                embeds=[],
                guidance=settings.guidance,
            )
            for settings, start in zip(requests, noise, strict=True)
        ]
        self.kept: list[dict[int, list[Tensor]]] = [{} for _ in requests]  # by picture
        self.steps: list[list[float]] = [[] for _ in requests]

    def encode(self) -> None:
        """Embeddings of all prompts, each made once."""
        prompts, started = self.studio.prompts, time.perf_counter()
        wanted = prompts.ids(p for settings in self.requests for p in settings.prompts)
        embeds = prompts.known(wanted)
        missing = [prompt for prompt in wanted if prompt not in embeds]
        if missing:
            self.progress("text encoder", 0, len(missing))
            ids = [wanted[prompt].ids for prompt in missing]
            made = self._without_oom(lambda phases: phases.encode(ids))
            prompts.learn(missing, made)
            embeds |= dict(zip(missing, made, strict=True))
            self.progress("text encoder", len(missing), len(missing))
        for job, settings in zip(self.jobs, self.requests, strict=True):
            job.embeds.extend(embeds[prompt] for prompt in settings.prompts)
        self.cuts = {prompt: cut.notice for prompt, cut in wanted.items()}
        if trouble := prompts.trouble():
            self.notices.append(trouble)
        self.timings["text_encoder"] = time.perf_counter() - started

    def denoise(self, journal: Journal | None) -> None:
        """All steps of all pictures, beginning where the journal left them."""
        started = clock = time.perf_counter()
        studio = self.studio
        recipes = [
            [s.recipe(i, studio.checkpoint, studio.device) for i in range(s.request.count)]
            for s in self.requests
        ]
        if journal is not None:
            self._resume(journal, recipes)
        total = sum(s.steps * s.request.count for s in self.requests)
        done = sum(picture.steps_done for job in self.jobs for picture in job.pictures)
        self.progress("denoise", done, total)

        def after_step(i: int, at: int) -> None:
            nonlocal clock, done
            picture, settings = self.jobs[i].pictures[at], self.requests[i]
            now = time.perf_counter()
            self.steps[i].append(now - clock)
            clock, done = now, done + 1
            if settings.request.keep_latents:
                self.kept[i].setdefault(at, []).append(picture.latents)
            if journal is not None:
                journal.save(recipes[i][at], picture.steps_done, picture.latents[0])
            self.progress("denoise", done, total)

        self._without_oom(lambda phases: phases.denoise(self.jobs, after_step))
        self.timings["denoise"] = time.perf_counter() - started

    def _resume(self, journal: Journal, recipes: list[list[dict[str, Any]]]) -> None:
        for job, of_job in zip(self.jobs, recipes, strict=True):
            for picture, recipe in zip(job.pictures, of_job, strict=True):
                found = journal.load(recipe)
                if found is not None and found[1].shape == picture.latents.shape[1:]:
                    steps_done = min(found[0], len(job.schedule) - 1)
                    picture.steps_done, picture.latents = steps_done, found[1][None]

    def decode(self) -> Iterator[RunResult]:
        """One result per request, as soon as its pictures are decoded."""
        started, done = time.perf_counter(), 0
        total = sum(len(job.pictures) for job in self.jobs)
        self.progress("vae", 0, total)
        latents = [picture.latents for job in self.jobs for picture in job.pictures]
        pixels = self._pixels(latents)
        for i, settings in enumerate(self.requests):
            images = []
            for _ in range(settings.request.count):
                images.append(to_image(next(pixels)))
                done += 1
                self.progress("vae", done, total)
            if i == len(self.requests) - 1:
                # the network is gone when the last is handed out
                after = next(pixels, None)
                assert after is None
            self.timings["vae"] = time.perf_counter() - started
            yield self._result(i, images)

    def _pixels(self, latents: list[Tensor]) -> Iterator[Tensor]:
        """Decoded pictures, one after the other."""
        done = 0
        try:
            for picture in self.phases.decode(latents):
                done += 1
                yield picture
            return
        except RuntimeError as error:
            said = _said(error)
        self._plan_again(said)
        try:
            yield from self.phases.decode(latents[done:])
        except RuntimeError as error:
            raise _out_of_memory(_said(error)) from error

    def _result(self, i: int, images: list[Any]) -> RunResult:
        studio, settings, phases = self.studio, self.requests[i], self.phases
        request, device = settings.request, studio.device
        hint = studio.checkpoint.files.hint
        about = hint.about(request.prompt) if hint else None
        cuts = dict.fromkeys(self.cuts[prompt] for prompt in settings.prompts)
        notices = [*studio.notices, about, *cuts, *self.notices, *phases.notices, *phases.redone]
        kept = [torch.cat(step) for step in zip(*self.kept[i].values(), strict=True)]
        recipes = [settings.recipe(n, studio.checkpoint, device) for n in range(request.count)]
        redone = {"redone": phases.redone} if phases.redone else {}
        total = time.perf_counter() - self.start
        return RunResult(
            images=images,
            recipes=[recipe | redone for recipe in recipes],
            latents=torch.stack(kept) if kept else None,
            prompt_embeds=[e.clone() for e in self.jobs[i].embeds],  # ours serve later requests
            seed=settings.seed,
            timings={**self.timings, "steps": self.steps[i], "total": total},
            peak_host_bytes=peak_host_bytes(),
            peak_vram_bytes=device.peak_vram_bytes(),
            memory=phases.measured(),
            notices=[notice for notice in notices if notice],
        )

    def _without_oom(self, work: Callable[[Phases], T]) -> T:
        """`work(phases)`; where others take memory meanwhile, once more with what is left."""
        try:
            return work(self.phases)
        except RuntimeError as error:
            said = _said(error)
        self._plan_again(said)
        try:
            return work(self.phases)
        except RuntimeError as error:
            raise _out_of_memory(_said(error)) from error

    def _plan_again(self, said: str) -> None:
        """Go on with a smaller plan: finished steps are in `jobs`, and stay.

        Only outside of a handler: the error holds the frames of the attempt, and they its memory.
        """
        old = self.plan.budget_bytes
        # not more than is free now, and less than before, or the same would happen again
        limits = Limits(budget_bytes=int(SMALLER * old), ram_bytes=self.studio.limits.ram_bytes)
        self.plan = plan_of(self.studio, self.requests, limits)
        self.phases = Phases(self.studio.checkpoint, self.studio.device, self.plan, self.phases)
        self.notices.append(
            f"memory ran out within the budget of {format_bytes(old)}, probably taken by another "
            f"program; planned again with {format_bytes(self.plan.budget_bytes)} ({said})"
        )


def _said(error: RuntimeError) -> str:
    """What is said where VRAM ran out; any other error is raised again."""
    if not (said := lost_vram(error)):
        raise error
    return said


def _out_of_memory(said: str) -> PlanError:
    return PlanError(
        f"memory ran out twice ({said}). Another program takes it while zquant runs: "
        f"close it, or use a smaller --budget."
    )
