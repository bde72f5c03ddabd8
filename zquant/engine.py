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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import zquant
from zquant import sampling
from zquant.errors import ZQuantError
from zquant.formats.model_folder import VARIANTS, ModelFiles, Variant, find_model
from zquant.image import to_image
from zquant.memory.device import Device, peak_host_bytes, probe
from zquant.models.checkpoint import Checkpoint
from zquant.models.dit import DiT, Modulation, Prompt
from zquant.models.tokenizer import Tokenizer, prompt_ids
from zquant.request import RunRequest, RunResult

__all__ = ["Engine", "Progress"]

Progress = Callable[[str, int, int], None]  # phase, done, total

KEPT_PROMPTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """A request with every default filled in."""

    steps: int
    seed: int
    guidance_scale: float
    shift: float
    schedule: Tensor


class Engine:
    """A model on a device; serves any number of requests."""

    def __init__(self, checkpoint: Checkpoint, device: Device) -> None:
        self.checkpoint = checkpoint
        self.device = device
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
    ) -> "Engine":
        """Open a model folder, single files, or a folder with some files replaced.

        Args:
            model: a folder made by `zquant convert`, or an official one.
            dit: a DiT file; likewise `text_encoder` and `vae`.
            text_encoder: see `dit`.
            vae: see `dit`.
            variant: "turbo" or "base" where the files cannot tell; None believes the folder.
            device: "auto", "cpu", "cuda" or "cuda:1".
            compute_dtype: "auto", "bfloat16", "float16" or "float32".

        Raises:
            ZQuantError: a file or the device is not what it should be.
            ValueError: no model is named, or the variant is unknown.
        """
        given = {"dit": dit, "text_encoder": text_encoder, "vae": vae}
        files = _model_files(model, {k: Path(v) for k, v in given.items() if v}, variant)
        return cls(Checkpoint(files), probe(device, compute_dtype))

    @property
    def sha256(self) -> dict[str, str]:
        """Hash per file, where `model.json` has them."""
        listed = (self.checkpoint.files.manifest or {}).get("files", {})
        return {part: entry["sha256"] for part, entry in listed.items() if "sha256" in entry}

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
        start = time.perf_counter()
        settings = self._settings(request)
        embeds, notices = self._encode(request, settings, progress)
        encoded = time.perf_counter()
        noise = self._noise(request, settings)
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
            prompt_embeds=embeds,
            seed=settings.seed,
            timings=timings,
            peak_host_bytes=peak_host_bytes(),
            peak_vram_bytes=self.device.peak_vram_bytes(),
            notices=notices,
        )

    def _settings(self, request: RunRequest) -> _Settings:
        variant = self.checkpoint.files.variant
        guidance = request.guidance_scale
        steps, shift = request.steps or variant.steps, request.shift or variant.shift
        return _Settings(
            steps=steps,
            seed=secrets.randbelow(2**32) if request.seed is None else request.seed,
            guidance_scale=variant.guidance_scale if guidance is None else guidance,
            shift=shift,
            schedule=sampling.sigmas(steps, shift),
        )

    def _noise(self, request: RunRequest, settings: _Settings) -> Tensor:
        """float32 `[count, C, H, W]` on the CPU."""
        config = self.checkpoint.vae_config
        size = (request.height // config.scale, request.width // config.scale)
        shape = (self.checkpoint.dit_config.in_channels, *size)
        given = request.initial_latents
        if given is None:
            seeds = range(settings.seed, settings.seed + request.count)
            return torch.cat([sampling.initial_noise((1, *shape), seed) for seed in seeds])
        if given.shape != (request.count, *shape) or not torch.isfinite(given).all():
            raise ValueError(
                f"initial_latents have shape {list(given.shape)}; expected finite values "
                f"{[request.count, *shape]} for {request.count} of {request.width}x{request.height}"
            )
        return given.float().cpu()

    @contextmanager
    def _phase(self, component: str) -> Iterator[Any]:
        """A network on the device for as long as the phase lasts."""
        device = self.device
        dtype = device.vae_dtype if component == "vae" else device.compute_dtype
        module = getattr(self.checkpoint, component)(device.torch_device, dtype)
        try:
            yield module
        finally:
            del module
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
            progress("text encoder", 0, len(missing))
            with self._phase("text_encoder") as encoder:
                for i, prompt in enumerate(missing):
                    cut = prompt_ids(self._tokenizer, prompt)
                    ids = torch.tensor(cut.ids, device=self.device.torch_device)
                    embeds = encoder(ids).cpu()
                    _check_finite(embeds, "the text encoder", self.device)
                    self._embeds[prompt] = (embeds, cut.notice)
                    progress("text encoder", i + 1, len(missing))
        found = [self._embeds[p] for p in prompts]
        for prompt in prompts:
            self._embeds.move_to_end(prompt)
        while len(self._embeds) > KEPT_PROMPTS:
            self._embeds.popitem(last=False)
        return [e for e, _ in found], [notice for _, notice in found if notice]

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
        with self._phase("dit") as dit:
            modulations = dit.modulate((1 - settings.schedule[:-1]).to(device))
            prompts = [dit.prepare(e.to(device), *noise.shape[-2:]) for e in embeds]
            velocity = _Velocity(dit, modulations, prompts, request, settings)
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
        return torch.stack([torch.cat(step) for step in zip(*kept, strict=True)]), seconds

    def _decode(self, latents: Tensor, progress: Progress) -> list[Image.Image]:
        images = []
        progress("vae", 0, len(latents))
        with self._phase("vae") as vae:
            for i, each in enumerate(latents[:, None]):
                picture = vae.decode_latents(each.to(self.device.torch_device))[0].cpu()
                _check_finite(picture, "the VAE", self.device)
                images.append(to_image(picture))
                progress("vae", i + 1, len(latents))
        return images

    def _recipe(self, request: RunRequest, settings: _Settings, index: int) -> dict[str, Any]:
        """Everything that is needed to paint picture `index` again."""
        files = self.checkpoint.files
        return {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "width": request.width,
            "height": request.height,
            "steps": settings.steps,
            "seed": settings.seed + index,
            "guidance_scale": settings.guidance_scale,
            "cfg_normalization": request.cfg_normalization,
            "cfg_truncation": request.cfg_truncation,
            "shift": settings.shift,
            "initial_latents": request.initial_latents is not None,
            "compute_dtype": str(self.device.compute_dtype).removeprefix("torch."),
            "device": self.device.name,
            "variant": files.variant.name,
            "model": {name: path.name for name, path in self.checkpoint.paths.items()},
            "sha256": self.sha256,
            "zquant": zquant.__version__,
            "torch": torch.__version__,
        }


class _Velocity:
    """The velocity of one step, guided where guidance is on, and proven finite."""

    def __init__(
        self,
        dit: DiT,
        modulations: list[Modulation],
        prompts: list[Prompt],
        request: RunRequest,
        settings: _Settings,
    ) -> None:
        self.dit, self.modulations, self.prompts = dit, modulations, prompts
        self.request, self.settings = request, settings

    def __call__(self, latents: Tensor, step: int) -> Tensor:
        """float32 velocity of `latents [1, C, H, W]`."""
        positive = self._branch(latents, step, self.prompts[0])
        tau = 1 - self.settings.schedule[step].item()
        if len(self.prompts) == 1 or tau > self.request.cfg_truncation:
            return positive
        negative = self._branch(latents, step, self.prompts[1])
        scale = self.settings.guidance_scale
        return sampling.guide(positive, negative, scale, float(self.request.cfg_normalization))

    def _branch(self, latents: Tensor, step: int, prompt: Prompt) -> Tensor:
        velocity = self.dit.velocity(latents, self.modulations[step], prompt)
        if torch.isfinite(velocity).all():
            return velocity
        raise ZQuantError(
            f"step {step + 1} of {self.settings.steps}: {self._first_bad(latents, step, prompt)} "
            f"gave values that are not finite (compute dtype {self.dit.compute_dtype}). "
            f"Use --compute-dtype bfloat16 or float32; if that fails too, a weight is damaged."
        )

    def _first_bad(self, latents: Tensor, step: int, prompt: Prompt) -> str:
        """Run the step again and watch every block."""
        bad: list[str] = []

        def observe(name: str, x: Tensor) -> None:
            if not bad and not torch.isfinite(x).all():
                bad.append(f"block {name!r}")

        if not torch.isfinite(prompt.tokens).all():
            return "the context refiner"
        self.dit.velocity(latents, self.modulations[step], prompt, observe)
        return bad[0] if bad else "the final layer"


def _check_finite(values: Tensor, who: str, device: Device) -> None:
    if not torch.isfinite(values).all():
        raise ZQuantError(
            f"{who} gave values that are not finite (compute dtype {device.compute_dtype}). "
            f"Use --compute-dtype bfloat16 or float32; if that fails too, a weight is damaged."
        )


def _model_files(
    model: str | Path | None, given: dict[str, Path], variant: str | None
) -> ModelFiles:
    """The folder's files with the given ones in their place."""
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is unknown; known: {', '.join(VARIANTS)}")
    if model is None:
        lacking = [n for n in ("dit", "text_encoder", "vae") if n not in given]
        if lacking:
            flags = ", ".join("--" + n.replace("_", "-") for n in lacking)
            raise ValueError(f"no --model folder is given, and {flags} missing")
        return ModelFiles(
            dit=given["dit"],
            text_encoder=given["text_encoder"],
            vae=given["vae"],
            variant=VARIANTS[variant or "turbo"],
        )
    files = find_model(Path(model))
    chosen: Variant = VARIANTS[variant] if variant else files.variant
    paths = {"dit": files.dit, "text_encoder": files.text_encoder, "vae": files.vae, **given}
    return ModelFiles(
        dit=paths["dit"],
        text_encoder=paths["text_encoder"],
        vae=paths["vae"],
        variant=chosen,
        tokenizer=files.tokenizer,
        manifest=files.manifest,
    )
