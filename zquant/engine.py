"""Prompt -> picture. Owns the life of the three networks, one at a time on the device.

    engine = Engine.open("models/z-image-turbo-q4_k_m")
    result = engine.generate(RunRequest(prompt="a red fox in the snow", seed=7))

Opening reads headers only. Weights stay packed: on the CPU they are the mapped files themselves, on
a GPU the packed bytes are copied there for the phase that needs them. Every picture of a request
has a seed of its own (`seed`, `seed + 1`, ...), so each can be painted again alone.
"""

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from zquant_kernels.runtime import forbidden

import zquant
from zquant import sampling
from zquant.errors import CheckpointError
from zquant.formats.model_folder import demo_notice
from zquant.image import to_image
from zquant.memory.device import Device, peak_host_bytes, probe
from zquant.models.checkpoint import Checkpoint, model_files
from zquant.models.dit import DiT
from zquant.models.text_encoder import TextEncoder
from zquant.models.tokenizer import PromptIds, Tokenizer, prompt_ids
from zquant.models.vae import VAE
from zquant.request import RunRequest, RunResult
from zquant.velocity import Guidance, Velocity, check_finite

__all__ = ["Engine", "Progress"]

Progress = Callable[[str, int, int], None]  # phase, done, total
T = TypeVar("T")

KEPT_PROMPTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """A request with every default filled in."""

    width: int
    height: int
    steps: int
    seed: int
    guidance_scale: float
    shift: float
    schedule: Tensor

    def guidance(self, request: RunRequest) -> Guidance:
        """What the sampler needs to know of it."""
        return Guidance(
            scale=self.guidance_scale,
            normalization=float(request.cfg_normalization),
            truncation=request.cfg_truncation,
            taus=sampling.taus(self.schedule).tolist(),
        )


class Engine:
    """A model on a device; serves any number of requests, none of which changes another.

    `notices` are what the user should know about the model; every result repeats them.
    """

    def __init__(self, checkpoint: Checkpoint, device: Device, notices: Sequence[str] = ()) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.notices = list(notices)
        self._tokenizer: Tokenizer | None = None
        self._embeds: OrderedDict[str, tuple[Tensor, str | None]] = OrderedDict()

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

        Raises:
            ZQuantError: a file or the device is not what it should be.
            ValueError: no model is named, or a choice is unknown.
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
        return cls(Checkpoint(files), chosen, notices)

    @property
    def sha256(self) -> dict[str, str]:
        """Hash per file, where `model.json` has them; a file given in place of one has none."""
        listed = (self.checkpoint.files.manifest or {}).get("files", {})
        entries = {part: listed.get(part) for part in self.checkpoint.paths}
        return {p: str(e["sha256"]) for p, e in entries.items() if e and "sha256" in e}

    def close(self) -> None:
        """Close all files."""
        self.checkpoint.close()

    @torch.inference_mode()
    def generate(self, request: RunRequest, progress: Progress = lambda *_: None) -> RunResult:
        """Paint.

        Args:
            request: what to paint.
            progress: called with a phase ("text encoder", "denoise", "vae"), done and total.

        Raises:
            ZQuantError: numbers stopped being finite, or a file is damaged.
            ValueError: `initial_latents` do not fit the request.
        """
        if self.device.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device.torch_device)
        with forbidden(self.device.paths.forbidden):
            return self._generate(request, progress)

    def _generate(self, request: RunRequest, progress: Progress) -> RunResult:
        start = time.perf_counter()
        settings = self._settings(request)
        noise = self._noise(request, settings)
        embeds, notices = self._encode(request, settings, progress)
        encoded = time.perf_counter()
        latents, step_seconds = self._denoise(request, settings, noise, embeds, progress)
        denoised = time.perf_counter()
        images = self._decode(latents[-1], progress)
        done = time.perf_counter()
        timings = {
            "text_encoder": encoded - start,
            "denoise": denoised - encoded,
            "steps": step_seconds,
            "vae": done - denoised,
            "total": done - start,
        }
        return RunResult(
            images=images,
            recipes=[self._recipe(request, settings, i) for i in range(request.count)],
            latents=latents if request.keep_latents else None,
            prompt_embeds=[e.clone() for e in embeds],  # ours serve later requests
            seed=settings.seed,
            timings=timings,
            peak_host_bytes=peak_host_bytes(),
            peak_vram_bytes=self.device.peak_vram_bytes(),
            notices=self.notices + self._hints(request) + notices,
        )

    def _settings(self, request: RunRequest) -> _Settings:
        variant = self.checkpoint.files.variant
        guidance = request.guidance_scale
        steps = variant.steps if request.steps is None else request.steps
        shift = variant.shift if request.shift is None else request.shift
        width, height = self.checkpoint.files.size
        return _Settings(
            width=width if request.width is None else request.width,
            height=height if request.height is None else request.height,
            steps=steps,
            seed=secrets.randbelow(2**32) if request.seed is None else request.seed,
            guidance_scale=variant.guidance_scale if guidance is None else guidance,
            shift=shift,
            schedule=sampling.sigmas(steps, shift),
        )

    def _hints(self, request: RunRequest) -> list[str]:
        hint = self.checkpoint.files.hint
        text = hint.about(request.prompt) if hint else None
        return [text] if text else []

    def _noise(self, request: RunRequest, settings: _Settings) -> Tensor:
        """float32 `[count, C, H, W]` on the CPU."""
        config = self.checkpoint.vae_config
        size = (settings.height // config.scale, settings.width // config.scale)
        shape = (self.checkpoint.dit_config.in_channels, *size)
        given = request.initial_latents
        if given is None:
            seeds = range(settings.seed, settings.seed + request.count)
            return torch.cat([sampling.initial_noise((1, *shape), seed) for seed in seeds])
        if given.shape != (request.count, *shape) or not given.is_floating_point():
            raise ValueError(
                f"initial_latents are {given.dtype} {list(given.shape)}; expected floats "
                f"{[request.count, *shape]} for {request.count} of {settings.width}x"
                f"{settings.height}"
            )
        noise = given.float().cpu()
        if not torch.isfinite(noise).all():
            n_bad = int((~torch.isfinite(noise)).sum())
            raise ValueError(f"initial_latents hold {n_bad} values that are not finite")
        return noise

    def _phase(self, component: str, work: Callable[[Any], T]) -> T:
        """`work(network)`; the network is on the device for no longer than that."""
        device = self.device
        how = device.vae_dtype if component == "vae" else device.compute
        try:
            # no name here holds the network, so it is gone when `work` has returned
            return work(getattr(self.checkpoint, component)(device.torch_device, how))
        finally:
            self.checkpoint.forget(component)
            if device.is_cuda:
                torch.cuda.empty_cache()

    def _encode(
        self, request: RunRequest, settings: _Settings, progress: Progress
    ) -> tuple[list[Tensor], list[str]]:
        """Embeddings of the prompts that are needed, from memory where they were made before."""
        prompts = [request.prompt]
        if settings.guidance_scale > 0:
            prompts.append(request.negative_prompt)
        missing = [p for p in dict.fromkeys(prompts) if p not in self._embeds]
        if missing:
            self._tokenizer = self._tokenizer or self.checkpoint.tokenizer()
            cuts = {prompt: prompt_ids(self._tokenizer, prompt) for prompt in missing}
            self._check_ids(cuts.values())
            progress("text encoder", 0, len(missing))

            def embed(encoder: TextEncoder) -> None:
                for i, (prompt, cut) in enumerate(cuts.items()):
                    ids = torch.tensor(cut.ids, device=self.device.torch_device)
                    embeds = encoder(ids).cpu()
                    check_finite(embeds, "the text encoder", self.device.compute_dtype)
                    self._embeds[prompt] = (embeds, cut.notice)
                    progress("text encoder", i + 1, len(missing))

            self._phase("text_encoder", embed)
        found = [self._embeds[p] for p in prompts]
        for prompt in prompts:
            self._embeds.move_to_end(prompt)
        while len(self._embeds) > KEPT_PROMPTS:
            self._embeds.popitem(last=False)
        notices = dict.fromkeys(notice for _, notice in found if notice)
        return [e for e, _ in found], list(notices)

    def _check_ids(self, cuts: Iterable[PromptIds]) -> None:
        n_rows = self.checkpoint.text_encoder_config.vocab_size
        highest = max(max(cut.ids) for cut in cuts)
        if highest >= n_rows:
            raise CheckpointError(
                f"{self.checkpoint.files.text_encoder}: token {highest} of the prompt has no "
                f"embedding; there are {n_rows}. Z-Image needs Qwen3-4B with its own tokenizer."
            )

    def _denoise(
        self,
        request: RunRequest,
        settings: _Settings,
        noise: Tensor,
        embeds: list[Tensor],
        progress: Progress,
    ) -> tuple[Tensor, list[float]]:
        """Latents `[steps or 1, count, C, H, W]` on the CPU, and the seconds of every step."""
        device = self.device.torch_device
        kept: list[list[Tensor]] = []
        seconds: list[float] = []
        total = settings.steps * request.count
        progress("denoise", 0, total)

        def paint(dit: DiT) -> None:
            modulations = dit.modulate(sampling.taus(settings.schedule).to(device))
            prompts = [dit.prepare(e.to(device), *noise.shape[-2:]) for e in embeds]
            velocity = Velocity(dit, modulations, prompts, settings.guidance(request))
            for start in noise[:, None]:
                kept.append([])
                clock = time.perf_counter()

                def after_step(step: int, latents: Tensor) -> None:
                    nonlocal clock
                    if request.keep_latents or step == settings.steps - 1:
                        kept[-1].append(latents.cpu())
                    now = time.perf_counter()
                    seconds.append(now - clock)
                    clock = now
                    progress("denoise", len(seconds), total)

                sampling.denoise(velocity, start.to(device), settings.schedule, after_step)

        self._phase("dit", paint)
        return torch.stack([torch.cat(step) for step in zip(*kept, strict=True)]), seconds

    def _decode(self, latents: Tensor, progress: Progress) -> list[Image.Image]:
        progress("vae", 0, len(latents))

        def decode(vae: VAE) -> list[Image.Image]:
            images = []
            for i, each in enumerate(latents[:, None]):
                picture = vae.decode_latents(each.to(self.device.torch_device))[0].cpu()
                check_finite(picture, "the VAE", self.device.vae_dtype)
                images.append(to_image(picture))
                progress("vae", i + 1, len(latents))
            return images

        return self._phase("vae", decode)

    def _recipe(self, request: RunRequest, settings: _Settings, index: int) -> dict[str, Any]:
        """Everything that is needed to paint picture `index` again."""
        files = self.checkpoint.files
        return {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "width": settings.width,
            "height": settings.height,
            "steps": settings.steps,
            "seed": settings.seed + index,
            "guidance_scale": settings.guidance_scale,
            "cfg_normalization": request.cfg_normalization,
            "cfg_truncation": request.cfg_truncation,
            "shift": settings.shift,
            "initial_latents": request.initial_latents is not None,
            "compute_dtype": str(self.device.compute_dtype).removeprefix("torch."),
            "compute": self.device.compute.mode,
            "attention": "int8" if self.device.compute.int8_attention else "sdpa",
            "device": self.device.name,
            "variant": files.variant.name,
            "model": {name: path.name for name, path in self.checkpoint.paths.items()},
            "sha256": self.sha256,
            "zquant": zquant.__version__,
            "torch": torch.__version__,
        }
