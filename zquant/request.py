"""What to paint, and what was painted.

A request names the picture; `None` fields take the model's own defaults when it runs. Sizes are
pixels.
"""

from dataclasses import dataclass, field
from typing import Any, TypeGuard

from PIL import Image
from torch import Tensor

__all__ = [
    "MAX_COUNT",
    "MAX_PIXELS",
    "MAX_STEPS",
    "PIXEL_MULTIPLE",
    "RunRequest",
    "RunResult",
    "parse_size",
]

PIXEL_MULTIPLE = 16
MAX_PIXELS = 8192  # per side: 512 positions per axis of the checkpoint's tables, 16 pixels each
MAX_STEPS = 1000  # as many noise levels as the model was trained on
MAX_COUNT = 1000  # the noise and the results of all pictures are in memory together

_FLOAT32_MAX = 3.4e38  # the latents are float32


def parse_size(text: str) -> tuple[int, int]:
    """Width and height in pixels from "512" or "1280x720"; whether they can be painted is not said.

    Raises:
        ValueError: it is neither.
    """
    edges = text.split("x")
    if len(edges) > 2 or not all(e.isascii() and e.isdigit() and len(e) < 6 for e in edges):
        raise ValueError(f"size {text!r:.80} is not pixels; write it like 512 or 1280x720")
    return int(edges[0]), int(edges[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """What to paint. Fields that are None take the model's own defaults.

    Attributes:
        prompt: what to paint.
        negative_prompt: what to avoid; used only when guidance is on.
        width: pixels, a multiple of 16; None is the model's own, 1024 for Z-Image.
        height: likewise.
        steps: denoising steps, at most 1000.
        seed: of the first picture; None draws one, and the result tells it.
        count: pictures, at most 1000; picture i uses `seed + i`.
        guidance_scale: diffusers' scale (0 is off; A1111's CFG scale minus 1).
        cfg_normalization: 0 is off; k limits the guided velocity's norm to k times the unguided;
            True is 1.
        cfg_truncation: guidance is off in steps whose tau (1 - sigma) exceeds it.
        shift: of the sigma schedule.
        initial_latents: float32 `[count, C, H / 8, W / 8]` instead of seeded noise; `==` does not
            compare them.
        keep_latents: keep the latents after every step.

    Raises:
        ValueError: a field is of the wrong type or out of range.
    """

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    seed: int | None = None
    count: int = 1
    guidance_scale: float | None = None
    cfg_normalization: float = 0.0
    cfg_truncation: float = 1.0
    shift: float | None = None
    initial_latents: Tensor | None = field(default=None, compare=False)
    keep_latents: bool = False

    def __post_init__(self) -> None:
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            _check_text(name, text)
        if not self.prompt.strip():
            raise ValueError("the prompt is empty; describe the picture")
        for name, pixels in (("width", self.width), ("height", self.height)):
            if pixels is not None:
                _check_integer(name, pixels)
                _check_pixels(name, pixels)
        for name, number, most in (
            ("steps", self.steps, MAX_STEPS),
            ("count", self.count, MAX_COUNT),
        ):
            if number is not None:
                _check_integer(name, number)
                if not 1 <= number <= most:
                    raise ValueError(f"{name} is {number}; it must be from 1 to {most}")
        if self.seed is not None:
            _check_integer("seed", self.seed)
            if not 0 <= self.seed <= 2**63 - self.count:
                raise ValueError(
                    f"seed is {self.seed}; it must be from 0 to 2**63 - {self.count}, so that "
                    f"{self.count} pictures have seeds below 2**63"
                )
        self._check_scales()
        given: Any = self.initial_latents
        if given is not None and not isinstance(given, Tensor):
            kind = type(given).__name__
            raise ValueError(f"initial_latents is a {kind}; it must be a float torch.Tensor")

    def _check_scales(self) -> None:
        for name, value in (
            ("guidance_scale", self.guidance_scale),
            ("cfg_normalization", self.cfg_normalization),
            ("cfg_truncation", self.cfg_truncation),
            ("shift", self.shift),
        ):
            if value is None and name in ("guidance_scale", "shift"):
                continue
            # a flag is a number only where the reference has a flag
            if not _is_number(value, flag=name == "cfg_normalization"):
                raise ValueError(f"{name} is {value!r:.80}; it must be a finite number")
            if value < 0 or (name == "shift" and value == 0):
                what = "a positive number" if name == "shift" else "0 or more"
                raise ValueError(f"{name} is {value}; it must be {what}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What was painted, and how.

    Attributes:
        images: one per picture.
        recipes: per picture, everything needed to paint it again; goes into the PNG.
        latents: float32 `[steps, count, C, H / 8, W / 8]` after each step, when kept.
        prompt_embeds: float32 `[T, width]` of the prompt, then of the negative prompt if used.
        seed: of the first picture.
        timings: seconds per phase; `steps` lists every step of every picture.
        peak_host_bytes: most memory of the process so far, mapped pages included.
        peak_vram_bytes: most bytes torch reserved on the GPU; None on a CPU.
        memory: what was planned and what came of it, JSON values.
        notices: what the user should know, such as a prompt that was cut.
    """

    images: list[Image.Image]
    recipes: list[dict[str, Any]]
    latents: Tensor | None
    prompt_embeds: list[Tensor]
    seed: int
    timings: dict[str, Any]
    peak_host_bytes: int | None
    peak_vram_bytes: int | None
    memory: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r:.80}; it must be text")
    bad = next((i for i, c in enumerate(value) if 0xD800 <= ord(c) < 0xE000), None)
    if bad is not None:
        raise ValueError(
            f"{name} holds a lone surrogate ({value[bad]!r}) at character {bad}, which is not "
            f"Unicode text; write it as UTF-8"
        )


def _check_integer(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r:.80}; it must be a whole number")


def _is_number(value: Any, *, flag: bool) -> TypeGuard[float]:
    """Whether `value` is a finite int or float (`flag`: or a bool)."""
    if isinstance(value, bool):
        return flag
    return isinstance(value, (int, float)) and abs(value) <= _FLOAT32_MAX


def _check_pixels(name: str, pixels: int) -> None:
    if pixels % PIXEL_MULTIPLE or not PIXEL_MULTIPLE <= pixels <= MAX_PIXELS:
        below = pixels // PIXEL_MULTIPLE * PIXEL_MULTIPLE
        allowed = (PIXEL_MULTIPLE, MAX_PIXELS)
        nearest = {
            min(max(edge, allowed[0]), allowed[1]) for edge in (below, below + PIXEL_MULTIPLE)
        }
        raise ValueError(
            f"{name} is {pixels}; it must be a multiple of {PIXEL_MULTIPLE} from {allowed[0]} to "
            f"{allowed[1]}. Nearest: {' or '.join(map(str, sorted(nearest)))}"
        )
