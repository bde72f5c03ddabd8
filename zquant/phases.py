"""The three phases of painting, each carrying out its part of a memory plan.

A phase owns its network: the weights are placed when it begins and gone when it ends, so that the
next one finds the device empty. On a GPU torch's allocator may not grow beyond the budget, and what
a step works in is reserved once: the allocator cuts its tensors out of that.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from zquant import sampling
from zquant.errors import ZQuantError
from zquant.memory.device import Device, peak_host_bytes
from zquant.memory.driver import process_vram_bytes
from zquant.memory.lanes import CudaLanes, HostLanes, Lanes
from zquant.memory.machine import trim_heap
from zquant.memory.plan import MemoryPlan, NetworkPlan, margin
from zquant.memory.residency import Residency
from zquant.memory.stream import StreamReport
from zquant.models.checkpoint import Checkpoint
from zquant.models.dit import DiT, Prompt
from zquant.models.text_encoder import TextEncoder
from zquant.models.vae import VAE
from zquant.models.vae_stripes import decode_striped
from zquant.units import format_bytes
from zquant.velocity import Guidance, Velocity, check_finite, not_finite

__all__ = ["Job", "Phases", "Picture", "uncapped_after"]

T = TypeVar("T")
WORKSPACES = 64 * 2**20  # of cuBLAS and cuDNN
FULL_BYTES = 64 * 2**20  # of VRAM that are free when none is


@dataclass(slots=True, kw_only=True)
class Picture:
    """One picture on its way: float32 latents `[1, C, H, W]` on the CPU after so many steps."""

    latents: Tensor
    steps_done: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Pictures that share a schedule and prompts.

    Attributes:
        pictures: brought forward in place.
        schedule: float32 `[steps + 1]`.
        embeds: float32 `[T, width]` of the prompt, and of the negative prompt if guidance is on.
        guidance: of the sampler.
    """

    pictures: list[Picture]
    schedule: Tensor
    embeds: list[Tensor]
    guidance: Guidance


class Phases:
    """Runs the phases of a plan; `before` are those of an earlier plan that did not hold.

    Attributes:
        redone: what had to be computed again in float32.
        notices: what else the user should know.
        reports: what was streamed, by phase.
        growth: allocations from the driver after the first step; a GPU's are to be 0.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: Device,
        plan: MemoryPlan,
        before: "Phases | None" = None,
    ) -> None:
        self.checkpoint, self.device, self.plan = checkpoint, device, plan
        self.redone: list[str] = before.redone if before else []
        self.notices: list[str] = before.notices if before else []
        self.reports: dict[str, StreamReport] = before.reports if before else {}
        self.growth: int | None = None
        self._told_of_spilling = False
        if device.is_cuda:
            _, total = torch.cuda.mem_get_info(device.torch_device)
            # libraries take some of what the plan has for them from torch's allocator
            share = (plan.budget_bytes - plan.machine.outside + WORKSPACES) / total
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), device.torch_device)
            _claim_workspace(device)

    def encode(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """float32 `[T, width]` embeddings on the CPU of token ids.

        Raises:
            ZQuantError: they are not finite in float32 either.
        """
        where = self.device.torch_device
        ids = [torch.tensor(each, device=where) for each in prompts]

        def work(encoder: TextEncoder) -> list[Tensor]:
            embeds = [each.cpu() for each in encoder(ids)]
            if not all(torch.isfinite(each).all() for each in embeds):
                encoder.compute_dtype = torch.float32
                self.redone.append("text encoder, redone in float32")
                embeds = [each.cpu() for each in encoder(ids)]
            for each in embeds:
                check_finite(each, "the text encoder", torch.float32)
            return embeds

        return self._run("text_encoder", self.plan.text_encoder, work)

    def denoise(self, jobs: Sequence[Job], after_step: Callable[[int, int], None]) -> None:
        """Bring every picture of every job to the end of its schedule.

        Args:
            jobs: pictures that are done are skipped.
            after_step: called with the index of the job and of the picture after every step.

        Raises:
            ZQuantError: numbers stopped being finite.
        """

        def work(dit: DiT) -> None:
            for i, job in enumerate(jobs):
                if any(p.steps_done < len(job.schedule) - 1 for p in job.pictures):
                    self._job(dit, job, partial(after_step, i))

        self._run("dit", self.plan.dit, work)

    def _job(self, dit: DiT, job: Job, after_step: Callable[[int], None]) -> None:
        where = self.device.torch_device
        modulations = dit.modulate(sampling.taus(job.schedule).to(where))
        size = job.pictures[0].latents.shape[-2:]
        prompts = [self._prepare(dit, embeds, *size) for embeds in job.embeds]
        for i, picture in enumerate(job.pictures):
            velocity = Velocity(dit, modulations, prompts, job.guidance)

            def keep(step: int, latents: Tensor, i: int = i, picture: Picture = picture) -> None:
                picture.latents, picture.steps_done = latents.cpu(), step + 1
                self._watch_allocator(step)
                after_step(i)

            start, first = picture.latents.to(where), picture.steps_done
            sampling.denoise(velocity, start, job.schedule, keep, first=first)
            self.redone.extend(velocity.redone)

    def _prepare(self, dit: DiT, embeds: Tensor, height: int, width: int) -> Prompt:
        """The prompt, refined in float32 if it overflows otherwise."""
        dit.in_float32.clear()
        prompt = dit.prepare(embeds.to(self.device.torch_device), height, width)
        if torch.isfinite(prompt.tokens).all():
            return prompt
        names = [name for name, _ in dit.blocks() if name not in dit.step_blocks]
        dit.in_float32.update(names)
        prompt = dit.prepare(embeds.to(self.device.torch_device), height, width)
        if not torch.isfinite(prompt.tokens).all():
            raise ZQuantError(not_finite("the context refiner", torch.float32))
        self.redone.append("context refiner, redone in float32")
        return prompt

    def decode(self, latents: Sequence[Tensor]) -> Iterator[Tensor]:
        """float32 `[3, 8H, 8W]` on the CPU of every `[1, C, H, W]`, one after the other.

        Raises:
            ZQuantError: a picture is not finite.
        """
        device = self.device
        where = device.torch_device
        vae = self.checkpoint.vae(where, device.vae_dtype)
        try:
            for each in latents:
                with _whole_float32():
                    picture = self._decoded(vae, each.to(where))
                check_finite(picture, "the VAE", device.vae_dtype)
                yield picture
        finally:
            del vae
            self._leave("vae")

    def _decoded(self, vae: VAE, latents: Tensor) -> Tensor:
        """float32 `[3, 8H, 8W]` on the CPU."""
        plan = self.plan.vae
        if plan.rows is None:
            return vae.decode_latents(latents)[0].cpu()
        store = latents.device if plan.stored else "cpu"
        return decode_striped(vae, latents, rows=plan.rows, store=store)[0]

    def _run(self, component: str, plan: NetworkPlan, work: Callable[[Any], T]) -> T:
        """`work(network)`, its weights where the plan wants them; all gone afterwards."""
        checkpoint, device = self.checkpoint, self.device
        network = getattr(checkpoint, component)(device.torch_device, device.compute)
        residency = None
        try:
            residency = Residency(
                network,
                checkpoint.parts[component],
                plan,
                self._lanes(),
                device.torch_device,
                device.compute_dtype,
            )
            self._reserve(plan)
            return work(network)
        finally:
            if residency is not None:
                if residency.report is not None:
                    self.reports[component] = residency.report
                residency.close()
            # no name holds the network any more when its memory is given back
            del network, residency
            self._leave(component)

    def measured(self) -> dict[str, Any]:
        """What was planned and what came of it, as JSON values."""
        plan, device = self.plan, self.device
        return {
            "budget_bytes": plan.budget_bytes if device.is_cuda else None,
            "max_ram_bytes": plan.ram_bytes,
            "predicted_vram_bytes": plan.device_bytes if device.is_cuda else None,
            "measured_vram_bytes": self._measured_vram(),
            "predicted_host_bytes": plan.host_bytes,
            "measured_host_bytes": peak_host_bytes(),
            "predicted_step_s": plan.step_seconds,
            "streamed_blocks": len(plan.dit.streamed),
            "expanded_blocks": len(plan.dit.expanded),
            "vae_rows": plan.vae.rows,
            "allocations_after_step_1": self.growth,
            "streams": {name: asdict(report) for name, report in self.reports.items()},
        }

    def _measured_vram(self) -> int | None:
        """Torch's peak, and what the process holds besides; None on a CPU."""
        peak = self.device.peak_vram_bytes()
        if peak is None:
            return None
        process = process_vram_bytes()
        if process is None:  # the plan's allowance stands for what the driver does not tell
            return peak + self.plan.machine.outside
        return peak + process - torch.cuda.memory_reserved(self.device.torch_device)

    def _lanes(self) -> Lanes:
        if self.device.is_cuda:
            return CudaLanes(self.device.torch_device)
        return HostLanes()

    def _reserve(self, plan: NetworkPlan) -> None:
        """One segment for all that a step allocates; the allocator keeps it when it is freed."""
        if self.device.is_cuda:
            n_bytes = plan.working + margin(plan.working) // 2
            torch.empty(n_bytes, dtype=torch.uint8, device=self.device.torch_device)

    def _watch_allocator(self, step: int) -> None:
        """Count what the allocator asks of the driver after the first step."""
        if not self.device.is_cuda:
            return
        n = torch.cuda.memory_stats(self.device.torch_device).get("num_device_alloc", 0)
        if step == 0 or self.growth is None:
            self._allocations = n
            self._watch_spilling()
        self.growth = n - self._allocations

    def _watch_spilling(self) -> None:
        """Windows moves what does not fit to RAM, without an error and many times slower."""
        free, _ = torch.cuda.mem_get_info(self.device.torch_device)
        if os.name == "nt" and free < FULL_BYTES and not self._told_of_spilling:
            self._told_of_spilling = True
            self.notices.append(
                f"only {format_bytes(free)} of VRAM are free, so Windows may keep some of it in "
                f"RAM, which is many times slower. Close other programs or use a smaller --budget."
            )

    def _leave(self, component: str) -> None:
        self.checkpoint.forget(component)
        trim_heap()
        if self.device.is_cuda:
            torch.cuda.empty_cache()


@contextmanager
def uncapped_after(device: Device) -> Iterator[None]:
    """Torch's allocator may take the whole device again after this, whatever phases set."""
    try:
        yield
    finally:
        if device.is_cuda:
            torch.cuda.set_per_process_memory_fraction(1.0, device.torch_device)


def _claim_workspace(device: Device) -> None:
    """Let cuBLAS take its workspace now: it keeps it, and with it the segment that it lies in.

    Taken at the first product of a phase it would lie in what `_reserve` reserved.
    """
    square = torch.ones(16, 16, dtype=device.compute_dtype, device=device.torch_device)
    torch.mm(square, square)


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Convolutions of float32 in float32: by itself cuDNN rounds what they multiply to TF32."""
    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before
