"""Train the demo model from nothing: autoencoder, then text encoder and DiT together.

    python tools/train_demo.py WORK [--seed 0]    # then demo_export.py

The world is `demo_scenes`, the networks are the engine's (`demo_networks`). Everything follows from
the seed; a killed run goes on from its last state in WORK. Progress goes to stderr, sample grids to
WORK, one line of losses per 50 steps to WORK/log.jsonl.

    autoencoder   L1 + a little KL, on crops, then on whole pictures
    latents       a fixed set of pictures, encoded once
    painter       flow matching; Muon for the blocks' matrices, Adam for the rest; averaged weights
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from demo_networks import Painter, cut_vocabulary, new_vae
from demo_scenes import SIZE, Scene, caption, draw, random_scene
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from zquant.image import to_image
from zquant.models.vae import VAE

CROP = 64
KL_WEIGHT = 3e-4
LATENT_STD = 1 / 0.3611  # so that the sampler's latents have unit variance
EMA = 0.998


def main() -> int:
    """Train what is missing in the work folder."""
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    vae = train_vae(args)
    scenes, latents = encode_pictures(args, vae)
    train_painter(args, vae, scenes, latents)
    return 0


def to_tensor(images: Iterable[Image.Image]) -> Tensor:
    """float32 `[B, 3, H, W]` in [-1, 1]."""
    pixels = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(args: argparse.Namespace) -> VAE:
    """The autoencoder, with latents of the standard deviation that the sampler expects."""
    torch.manual_seed(args.seed)
    vae = new_vae()
    done = args.work / "vae.pt"
    if done.is_file():
        vae.load_state_dict(torch.load(done, weights_only=True))
        return vae.eval()
    with torch.no_grad():  # little noise on the latents at first, or nothing gets through
        vae.encoder.conv_out.bias[vae.config.latent_channels :] = -6
    convs = [p for p in vae.parameters() if p.ndim == 4]
    others = [p for p in vae.parameters() if p.ndim != 4]
    optimizers = _optimizers(convs, others, args)
    state = State(args.work / "vae.state.pt", {"vae": vae, **optimizers})
    whole_from = int(0.85 * args.vae_steps)
    start = state.load()
    for step in _progress("autoencoder", start, args.vae_steps):
        rng = random.Random(f"vae {args.seed} {step}")
        generator = torch.Generator().manual_seed(args.seed * 10**6 + step)
        batch = _crops(rng, 16) if step < whole_from else _pictures(rng, 4)
        mean, log_variance = vae.encoder(batch).chunk(2, dim=1)
        log_variance = log_variance.clamp(-14, 6)
        noise = torch.randn(mean.shape, generator=generator)
        picture = vae.decode(mean + noise * (0.5 * log_variance).exp())
        l1 = F.l1_loss(picture, batch)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = l1 + 0.5 * F.mse_loss(picture, batch) + KL_WEIGHT * kl
        _update(loss, optimizers, vae.parameters(), _trapezoid(step, args.vae_steps))
        if step % 50 == 0:
            _log(
                args.work, {"phase": "autoencoder", "step": step, "l1": l1.item(), "kl": kl.item()}
            )
        if (step + 1) % args.save_every == 0:
            state.save(step + 1)
            both = torch.cat([batch[:8], picture[:8].detach()])
            _grid(both, args.work / "autoencoder.png", 8)
    _set_scale(vae, args.seed)
    torch.save(vae.state_dict(), done)
    return vae.eval()


@torch.no_grad()
def _set_scale(vae: VAE, seed: int) -> None:
    """Scale the latents, and the decoder's first layer against it: the pictures stay the same."""
    z = vae.encode(_pictures(random.Random(f"scale {seed}"), 64))
    factor = LATENT_STD / z.std()
    n = vae.config.latent_channels
    vae.encoder.conv_out.weight[:n] *= factor
    vae.encoder.conv_out.bias[:n] *= factor
    vae.decoder.conv_in.weight /= factor


@torch.no_grad()
def encode_pictures(args: argparse.Namespace, vae: VAE) -> tuple[list[Scene], Tensor]:
    """Scenes of the training set and their latents, float32 `[N, 16, 16, 16]`."""
    rng = random.Random(f"scenes {args.seed}")
    scenes = [random_scene(rng) for _ in range(args.pictures)]
    file = args.work / "latents.pt"
    if file.is_file():
        latents: Tensor = torch.load(file, weights_only=True)
        if len(latents) == len(scenes):
            return scenes, latents.float()
    config, parts = vae.config, []
    for i in _progress("latents", 0, math.ceil(len(scenes) / 32)):
        rng = random.Random(f"pictures {args.seed} {i}")
        batch = to_tensor(draw(scene, rng) for scene in scenes[32 * i : 32 * i + 32])
        z = (vae.encode(batch) - config.shift_factor) * config.scaling_factor
        parts.append(z.half())
    latents = torch.cat(parts)
    torch.save(latents, file)
    return scenes, latents.float()


def train_painter(
    args: argparse.Namespace,
    vae: VAE,
    scenes: list[Scene],
    latents: Tensor,
    after_step: Callable[[int], None] = lambda _: None,
) -> None:
    """Text encoder and DiT; WORK/painter.pt receives the averaged weights.

    Args:
        args: from the command line.
        vae: decodes the sample grids.
        scenes: of the training set.
        latents: of the scenes, float32 `[N, 16, 16, 16]`.
        after_step: called with every step's number, after its state is saved.
    """
    torch.manual_seed(args.seed)
    painter = Painter(cut_vocabulary())
    average = {name: p.detach().clone() for name, p in painter.named_parameters()}
    optimizers = _optimizers(*_matrices(painter), args)
    state = State(args.work / "painter.state.pt", {"painter": painter, **optimizers}, average)
    recent: list[float] = []
    start, clock = state.load(), time.monotonic()
    for step in _progress("painter", start, args.steps):
        rng = random.Random(f"painter {args.seed} {step}")
        generator = torch.Generator().manual_seed(args.seed * 10**6 + step)
        rows = rng.choices(range(len(scenes)), k=args.batch)
        prompts = [_words(scenes[row], rng) for row in rows]
        loss = painter.loss(latents[rows], prompts, generator)
        _update(loss, optimizers, painter.parameters(), _trapezoid(step, args.steps))
        decay = min(EMA, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(average.values()), [p.detach() for p in painter.parameters()], 1 - decay
            )
        recent.append(loss.item())
        if step % 50 == 49:
            seconds = time.monotonic() - clock
            _log(
                args.work,
                {
                    "phase": "painter",
                    "step": step + 1,
                    "loss": float(np.mean(recent)),
                    "seconds": round(seconds, 1),
                },
            )
            recent.clear()
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            state.save(step + 1)
            _sample(args, vae, painter, average)
        after_step(step)
    torch.save(average, args.work / "painter.pt")


def _words(scene: Scene, rng: random.Random) -> str:
    """A caption of the scene, told from either shape; some with a capital or a full stop."""
    text = caption(scene.turned() if rng.random() < 0.5 else scene, rng)
    if rng.random() < 0.1:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.1 else text


@torch.no_grad()
def _sample(
    args: argparse.Namespace, vae: VAE, painter: Painter, average: dict[str, Tensor]
) -> None:
    """A grid of pictures of held-out captions, painted with the averaged weights."""
    kept = {name: p.detach().clone() for name, p in painter.named_parameters()}
    _assign(painter, average)
    rng = random.Random(1)
    scenes = [random_scene(rng, held_out=True) for _ in range(args.samples)]
    latents = painter.paint([caption(scene, rng) for scene in scenes])
    pictures = vae.decode_latents(latents)
    wanted = to_tensor(draw(scene, rng) for scene in scenes)
    _grid(
        torch.cat(
            [torch.cat([wanted[i : i + 8], pictures[i : i + 8]]) for i in range(0, args.samples, 8)]
        ),
        args.work / "samples.png",
        8,
    )
    _assign(painter, kept)


def _assign(module: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(values[name])


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: every singular value of a matrix's update is about the same.

    A convolution counts as the matrix `[C_out, C_in * 9]`. In float32 and in one batch per shape;
    torch's own computes in bfloat16, which many CPUs only emulate.

    Source: Jordan et al., Muon, 2024, as facts.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": 0.95})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for parameters in shapes.values():
                moved = []
                for p in parameters:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    moved.append(p.grad.lerp(buffer, group["momentum"]))
                update = _orthogonal(torch.stack(moved).flatten(2))
                scale = group["lr"] * 0.2 * math.sqrt(max(update.shape[1:]))  # Adam's size of step
                for p, u in zip(parameters, update, strict=True):
                    p.sub_(u.view_as(p), alpha=scale)


def _orthogonal(x: Tensor) -> Tensor:
    """Newton-Schulz iteration on `[B, N, K]`."""
    if x.shape[-2] > x.shape[-1]:
        return _orthogonal(x.mT).mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x


def _matrices(painter: Painter) -> tuple[list[Tensor], list[Tensor]]:
    """The matrices inside the DiT's and the text encoder's blocks, and all other parameters."""
    blocks = ("layers.", "noise_refiner.", "context_refiner.")
    matrices, others = [], []
    for name, p in painter.named_parameters():
        inner = any(block in name for block in blocks) and "adaLN" not in name
        (matrices if inner and p.ndim == 2 else others).append(p)
    return matrices, others


def _optimizers(
    matrices: list[Tensor], others: list[Tensor], args: argparse.Namespace
) -> dict[str, torch.optim.Optimizer]:
    adam = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    optimizers = {"muon": Muon(matrices, args.muon_lr), "adam": adam}
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


@dataclass(slots=True)
class State:
    """Everything a killed run needs to go on, in one file that is replaced as a whole."""

    file: Path
    parts: dict[str, Any]
    average: dict[str, Tensor] | None = None

    def load(self) -> int:
        """Restore; the step to go on from."""
        if not self.file.is_file():
            return 0
        saved = torch.load(self.file, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        for name, value in (self.average or {}).items():
            value.copy_(saved["average"][name])
        return int(saved["step"])

    def save(self, step: int) -> None:
        """Write; an older state stays valid until the new one is whole."""
        new = self.file.with_suffix(".part")
        states = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save({**states, "average": self.average, "step": step}, new)
        new.replace(self.file)


def _update(
    loss: Tensor,
    optimizers: dict[str, torch.optim.Optimizer],
    parameters: Iterable[nn.Parameter],
    factor: float,
) -> None:
    """One step with `factor` of the learning rates."""
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        optimizer.zero_grad()


def _trapezoid(step: int, total: int) -> float:
    """Up in 100 steps, level, and down to nothing in the last third."""
    return min(1.0, (step + 1) / 100, (total - step) / (0.35 * total))


def _crops(rng: random.Random, n: int) -> Tensor:
    crops = []
    for _ in range(n):
        image = draw(random_scene(rng), rng)
        x, y = rng.randrange(SIZE - CROP + 1), rng.randrange(SIZE - CROP + 1)
        crops.append(image.crop((x, y, x + CROP, y + CROP)))
    return to_tensor(crops)


def _pictures(rng: random.Random, n: int) -> Tensor:
    return to_tensor(draw(random_scene(rng), rng) for _ in range(n))


def _grid(pictures: Tensor, file: Path, columns: int) -> None:
    images = [to_image(picture) for picture in pictures]
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    sheet.save(file)


def _progress(what: str, start: int, total: int) -> Iterator[int]:
    yield from tqdm(range(start, total), desc=what, initial=start, total=total, mininterval=5)


def _log(work: Path, row: dict[str, Any]) -> None:
    with (work / "log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder for states, logs and sample grids")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=1000)
    parser.add_argument("--pictures", type=int, default=12_000)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--samples", type=int, default=24, help="pictures of a grid")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--muon-lr", type=float, default=5e-3)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
