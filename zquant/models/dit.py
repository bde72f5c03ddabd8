"""The Z-Image diffusion transformer.

Two noise-refiner blocks see the image tokens, two context-refiner blocks the caption tokens, then
all layers see both. What depends on the prompt alone (`prepare`) or on the schedule alone
(`modulate`) is computed once, outside the denoising loop. Attribute names are the checkpoint's.

The residual stream, norms, modulation, embedders and the final layer are float32; only the linears
of blocks and attention run in `compute.dtype`, or in int8 (`use`); a block whose numbers overflow
there can be computed in float32 (`in_float32`). Sequences are processed without masks: the pads up
to a multiple of 32 are real participants in this model.

Weights of a block may be elsewhere until it runs: `weights(name)` is entered around every use.

Not here: the Omni/Edit inputs and ControlNet.

Source: Z-Image official repository and diffusers `ZImageTransformer2DModel`, as facts.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zquant.layers.compute import Compute
from zquant.layers.linear import QuantLinear
from zquant.layers.norm import RMSNorm
from zquant.layers.rope import axis_angles
from zquant.models.config import DiTConfig
from zquant.models.dit_block import Block, Rope

__all__ = [
    "FLOAT32",
    "SEQUENCE_MULTIPLE",
    "DiT",
    "Modulation",
    "Prompt",
    "Rope",
    "Weights",
    "patchify",
    "unpatchify",
]

SEQUENCE_MULTIPLE = 32
FIRST_LAYER = "layers.0"
FINAL_NORM_EPS = 1e-6
TIME_FEATURES = 256

FLOAT32 = Compute(dtype=torch.float32)

# brings the weights of a block, or of its projection of the timestep, for as long as it is entered
Weights = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Modulation:
    """Everything the timestep decides, for one step.

    `blocks[name]` is float32 `[4, dim]`: 1 + scale_msa, tanh(gate_msa), 1 + scale_mlp,
    tanh(gate_mlp).
    `final` is float32 `[dim]`: 1 + scale of the final layer.
    """

    blocks: dict[str, Tensor]
    final: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Everything the prompt and the picture size decide.

    `tokens` are the refined caption tokens, float32 `[1, T', dim]`, T' a multiple of 32.
    """

    tokens: Tensor
    image_rope: Rope
    rope: Rope


class TimeEmbedder(nn.Module):
    """Sinusoid and two linears: `[S]` times to float32 `[S, adaln_dim]`."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        first = QuantLinear(TIME_FEATURES, 1024, bias=True)
        self.mlp = nn.ModuleList([first, nn.SiLU(), QuantLinear(1024, config.adaln_dim, bias=True)])

    def forward(self, times: Tensor) -> Tensor:
        """`times` are tau * t_scale, float32."""
        half = TIME_FEATURES // 2
        steps = torch.arange(half, dtype=torch.float32, device=times.device)
        angles = times[:, None] * torch.exp(steps * (-math.log(10000) / half))
        h = torch.cat((angles.cos(), angles.sin()), dim=-1)
        for layer in self.mlp:
            h = layer(h)
        return h


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the projection to patches."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        features = config.in_channels * config.patch_size**2
        self.linear = QuantLinear(config.dim, features, bias=True)
        scale = QuantLinear(config.adaln_dim, config.dim, bias=True)
        self.adaLN_modulation = nn.ModuleList([nn.SiLU(), scale])

    def modulate(self, c: Tensor) -> Tensor:
        """float32 `[S, dim]` scales of time embeddings `c [S, adaln_dim]`."""
        for layer in self.adaLN_modulation:
            c = layer(c)
        return 1 + c

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """float32 `[B, L, dim]` to `[B, L, features]`."""
        out: Tensor = self.linear(F.layer_norm(x, x.shape[-1:], eps=FINAL_NORM_EPS) * scale)
        return out


class DiT(nn.Module):
    """The whole transformer; build it on the meta device and load it with `zquant.models.build`."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.compute = FLOAT32
        self.in_float32: set[str] = set()  # names of blocks that overflow in `compute`
        self.weights: Weights = lambda _: nullcontext()
        dim, patch = config.dim, f"{config.patch_size}-1"
        features = config.in_channels * config.patch_size**2
        self.all_x_embedder = nn.ModuleDict({patch: QuantLinear(features, dim, bias=True)})
        self._final_layer_name = patch
        self.all_final_layer = nn.ModuleDict({patch: FinalLayer(config)})
        self.t_embedder = TimeEmbedder(config)
        norm = RMSNorm(config.cap_feat_dim, config.norm_eps)
        self.cap_embedder = nn.ModuleList([norm, QuantLinear(config.cap_feat_dim, dim, bias=True)])
        self.x_pad_token = nn.Parameter(torch.empty(1, dim), requires_grad=False)
        self.cap_pad_token = nn.Parameter(torch.empty(1, dim), requires_grad=False)
        self.noise_refiner = _blocks(config, config.n_refiner_layers, modulated=True)
        self.context_refiner = _blocks(config, config.n_refiner_layers, modulated=False)
        self.layers = _blocks(config, config.n_layers, modulated=True)

    def use(self, compute: Compute) -> None:
        """Compute so from now on."""
        self.compute = compute
        for name, block in self.blocks():
            block.use(compute, name)

    def blocks(self) -> Iterator[tuple[str, Block]]:
        """Every block with its name in the checkpoint, in the order they run."""
        for stack in ("context_refiner", "noise_refiner", "layers"):
            for i, block in enumerate(getattr(self, stack)):
                assert isinstance(block, Block)
                yield f"{stack}.{i}", block

    def modulate(self, taus: Tensor) -> list[Modulation]:
        """Modulation of every step of a schedule.

        Args:
            taus: float32 `[S]`, 1 - sigma, on the module's device.
        """
        c = self.t_embedder(taus * self.config.t_scale)  # [S, adaln_dim]
        blocks: dict[str, Tensor] = {}
        for name, block in self.blocks():
            if name.startswith("context_refiner"):
                continue
            with self.weights(f"{name}.adaLN_modulation"):
                m = block.adaLN_modulation[0](c).unflatten(-1, (4, -1))  # [S, 4, dim]
            m[:, 0::2] += 1
            m[:, 1::2].tanh_()
            blocks[name] = m
        final = self._final_layer.modulate(c)
        return [
            Modulation(blocks={n: m[s] for n, m in blocks.items()}, final=final[s])
            for s in range(len(taus))
        ]

    def prepare(self, prompt_embeds: Tensor, height: int, width: int) -> Prompt:
        """Refine a caption and lay out the tokens of a picture.

        Args:
            prompt_embeds: float32 `[T, cap_feat_dim]`, T >= 1, on the module's device.
            height: of the latents, even.
            width: of the latents, even.
        """
        x = prompt_embeds.float()
        for layer in self.cap_embedder:
            x = layer(x)
        x = _pad(x[None], self.cap_pad_token)
        rope, image_rope, caption_rope = self.ropes(x.shape[1], height, width, x.device)
        for i, block in enumerate(self.context_refiner):
            x = self._block(f"context_refiner.{i}", block, x, caption_rope, None)
        return Prompt(tokens=x, image_rope=image_rope, rope=rope)

    def ropes(
        self, n_caption: int, height: int, width: int, device: torch.device
    ) -> tuple[Rope, Rope, Rope]:
        """Rotation of all tokens, of the image tokens and of `n_caption` caption tokens.

        Args:
            n_caption: a multiple of 32.
            height: of the latents, even.
            width: of the latents, even.
            device: of the tables.
        """
        positions = _positions(n_caption, height // 2, width // 2)
        table = axis_angles(positions, self.config.axes_dims, self.config.rope_theta).to(device)
        cos, sin, n_image = table.cos(), table.sin(), len(positions) - n_caption
        return (cos, sin), (cos[:n_image], sin[:n_image]), (cos[n_image:], sin[n_image:])

    def velocity(
        self,
        latents: Tensor,
        modulation: Modulation,
        prompt: Prompt,
        sums: Tensor | None = None,
    ) -> Tensor:
        """The velocity d latents / d sigma (the network's output, negated).

        Args:
            latents: float32 `[B, C, H, W]`.
            modulation: of this step.
            prompt: of this caption and size.
            sums: float32 `[len(self.step_blocks), 2]`; see `Block.forward`.

        Returns:
            float32 `[B, C, H, W]`.
        """
        _, _, height, width = latents.shape
        n_image = height * width // 4
        x = _pad(next(iter(self.all_x_embedder.values()))(patchify(latents)), self.x_pad_token)
        rope = prompt.image_rope
        for i, name in enumerate(self.step_blocks):
            if name == FIRST_LAYER:
                x = torch.cat((x, prompt.tokens.expand(len(x), -1, -1)), dim=1)
                rope = prompt.rope
            each = None if sums is None else sums[i]
            x = self._block(name, self.get_submodule(name), x, rope, modulation, each)
        x = self._final_layer(x[:, :n_image], modulation.final)
        return -unpatchify(x, height, width)

    def forward(self, latents: Tensor, tau: float, prompt_embeds: Tensor) -> Tensor:
        """The raw network output, once: float32 `[B, C, H, W]`; see `velocity` for the loop."""
        prompt = self.prepare(prompt_embeds, *latents.shape[-2:])
        taus = torch.tensor([tau], dtype=torch.float32, device=latents.device)
        return -self.velocity(latents, self.modulate(taus)[0], prompt)

    @property
    def step_blocks(self) -> list[str]:
        """Names of the blocks of one step, in the order they run."""
        return [name for name, _ in self.blocks() if not name.startswith("context_refiner")]

    def _block(
        self,
        name: str,
        block: nn.Module,
        x: Tensor,
        rope: Rope,
        modulation: Modulation | None,
        sums: Tensor | None = None,
    ) -> Tensor:
        """One block, its weights brought and its numbers as precise as they have to be."""
        compute = FLOAT32 if name in self.in_float32 else self.compute
        four = None if modulation is None else modulation.blocks[name].unbind()
        with self.weights(name):
            out: Tensor = block(x, rope, four, compute, sums)
        return out

    @property
    def _final_layer(self) -> FinalLayer:
        layer = self.all_final_layer[self._final_layer_name]
        assert isinstance(layer, FinalLayer)
        return layer


def _blocks(config: DiTConfig, n: int, *, modulated: bool) -> nn.ModuleList:
    return nn.ModuleList([Block(config, modulated=modulated) for _ in range(n)])


def _pad(x: Tensor, token: Tensor) -> Tensor:
    """Append copies of `token [1, dim]` to `x [B, L, dim]` up to a multiple of 32."""
    n = -x.shape[1] % SEQUENCE_MULTIPLE
    return torch.cat((x, token.expand(len(x), n, -1)), dim=1) if n else x


def _positions(n_caption: int, rows: int, columns: int) -> Tensor:
    """int64 `[L, 3]` positions (t, y, x) of the image tokens, image pads, then caption tokens."""
    n_image = rows * columns
    positions = torch.zeros(n_image + -n_image % SEQUENCE_MULTIPLE + n_caption, 3, dtype=torch.long)
    positions[:n_image, 0] = n_caption + 1
    positions[:n_image, 1] = torch.arange(rows).repeat_interleave(columns)
    positions[:n_image, 2] = torch.arange(columns).repeat(rows)
    positions[-n_caption:, 0] = 1 + torch.arange(n_caption)
    return positions


def patchify(latents: Tensor) -> Tensor:
    """`[B, C, H, W]` to `[B, H / 2 * W / 2, 4 C]`, features in the order (ph, pw, c)."""
    b, c, height, width = latents.shape
    x = latents.view(b, c, height // 2, 2, width // 2, 2).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(b, height * width // 4, 4 * c)


def unpatchify(x: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `patchify`."""
    b, _, features = x.shape
    x = x.view(b, height // 2, width // 2, 2, 2, features // 4).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(b, features // 4, height, width)
