"""Most bytes of activations that are alive at once, step by step through the networks.

Each step of `Block.forward` holds what it reads and what it writes; the peak is the largest step.
Widths: D of the model, F of the feed-forward; M tokens, C of them per feed-forward chunk; e bytes
of the compute dtype. Weights in their slots are not counted; the scratch they are expanded to is.

Without our kernels the references run, whose temporaries in float32 are counted on top.
"""

from dataclasses import dataclass

import torch
from zquant_kernels import fused_swiglu, matmul_int8

from zquant.layers.compute import Compute
from zquant.layers.linear import slab_rows
from zquant.models.config import DiTConfig, TextEncoderConfig
from zquant.models.dit import FLOAT32, SEQUENCE_MULTIPLE
from zquant.models.dit_block import ffn_chunk
from zquant.quant.codec import scratch_bytes

__all__ = ["Picture", "block_bytes", "dit_bytes", "text_encoder_bytes"]

ROW_SCALE_SCRATCH = 4 * 2**22 + 2**22  # a slab of weights as float32, and as int8


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """What decides the activations of one picture.

    Attributes:
        width: pixels.
        height: pixels.
        n_prompt: tokens of the longest prompt.
        n_prompts: 2 when guidance uses a negative prompt.
        steps: of the schedule.
    """

    width: int
    height: int
    n_prompt: int
    n_prompts: int = 1
    steps: int = 8

    @property
    def n_image(self) -> int:
        """Image tokens with their pads."""
        return _padded((self.width // 16) * (self.height // 16))

    @property
    def n_caption(self) -> int:
        """Caption tokens with their pads."""
        return _padded(self.n_prompt)

    @property
    def n_tokens(self) -> int:
        """Tokens of a layer."""
        return self.n_image + self.n_caption


def _padded(n: int) -> int:
    return -(-n // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE


def dit_bytes(
    config: DiTConfig, picture: Picture, compute: Compute, device: torch.device, *, kernels: bool
) -> int:
    """Activations of a step, with everything the prompts and the schedule decided beforehand.

    A block that overflows is computed in float32, so that must fit as well.
    """
    m, d = picture.n_tokens, config.dim
    ways = (compute,) if compute.dtype == torch.float32 and not compute.int8 else (compute, FLOAT32)
    most = max(block_bytes(config, m, way, device, kernels=kernels) for way in ways)
    tables = m * config.head_dim * 4 * picture.n_prompts  # cos and sin
    captions = picture.n_caption * d * 4 * picture.n_prompts
    modulation = picture.steps * d * 4 * (4 * (config.n_layers + config.n_refiner_layers) + 1)
    latents = 6 * picture.width * picture.height // 64 * config.in_channels * 4
    return most + tables + captions + modulation + latents


def block_bytes(
    config: DiTConfig, m: int, compute: Compute, device: torch.device, *, kernels: bool
) -> int:
    """One block on `m` tokens, the residual stream included."""
    d, f, e = config.dim, config.hidden_dim, compute.dtype.itemsize
    c = -(-m // -(-m // ffn_chunk(compute.dtype)))
    quant, half = (1, m * d) if compute.int8 else (e, 0)  # bytes of a token's number; int8 copy

    def scratch(n_rows: int, n_columns: int) -> int:
        if compute.int8:
            return n_rows * n_columns + ROW_SCALE_SCRATCH
        return slab_rows(n_rows, n_columns, compute.dtype, device) * n_columns * e

    entering = m * (d * quant + 4)
    chunked = m * d * e if c < m else 0
    attended = m * d * e + m * config.n_heads * 4
    steps = [
        entering + 3 * m * d * e + scratch(d, d),  # project
        3 * m * d * e + attended + (m * d if compute.int8_attention else 0),
        attended + half + m * d * e + scratch(d, d),  # output
        m * d * e + entering,  # residual and norm
        entering + chunked + 2 * c * f * e + scratch(f, d),  # gate and up
        entering + chunked + (2 * e + 1 if compute.int8 else e) * c * f,  # product
        entering + chunked + c * f * quant + c * d * e + scratch(d, f),  # down
    ]
    most = max(steps)
    if not kernels:
        most = max(most, *_reference_steps(config, m, c, compute, device, steps))
    return 4 * m * d + most


def _reference_steps(
    config: DiTConfig, m: int, c: int, compute: Compute, device: torch.device, steps: list[int]
) -> list[int]:
    """The same with the float32 temporaries of the references."""
    d, f = config.dim, config.hidden_dim
    project, attend, output, norm, gate, product, down = steps

    def product_of(rows: int, n_columns: int) -> int:
        if not compute.int8:
            return 0
        columns = matmul_int8.REFERENCE_N
        return 4 * rows * n_columns + columns * (24 * rows + 8 * n_columns)

    decoding = scratch_bytes(device)
    return [
        project + product_of(m, d) + decoding,
        12 * m * d,  # the first norm
        attend + (16 if compute.int8_attention else 4) * m * d,
        output + product_of(m, d) + decoding,
        norm + 12 * m * d,
        gate + product_of(c, d) + decoding,
        product + 3 * 4 * fused_swiglu.REFERENCE_ROWS * f,
        down + product_of(c, f) + decoding,
    ]


def text_encoder_bytes(
    config: TextEncoderConfig,
    lengths: list[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    kernels: bool,
) -> int:
    """Activations for prompts of so many tokens, whose streams are all alive.

    Without `kernels` decoding has temporaries of its own. A layer that overflows is computed in
    float32, so that must fit as well.
    """
    t, e = max(lengths), 4
    streams = 4 * config.hidden_size * sum(lengths)
    heads = (3 * config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    layer = t * (e * (2 * config.hidden_size + heads + 3 * config.intermediate_size) + 8 * heads)
    sizes = (config.intermediate_size, config.hidden_size), (config.hidden_size,) * 2
    scratch = max(
        slab_rows(*size, way, device) * size[1] * way.itemsize
        for size in (*sizes, sizes[0][::-1])
        for way in (dtype, torch.float32)
    )
    return streams + layer + scratch + (0 if kernels else scratch_bytes(device))
