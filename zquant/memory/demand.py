"""What a request needs of every phase: bytes from the headers, work from the shapes."""

from collections.abc import Sequence

import torch

from zquant.layers.compute import Compute
from zquant.memory.activations import Picture, block_bytes, dit_bytes, text_encoder_bytes
from zquant.memory.device import Device
from zquant.memory.needs import Needs, NetworkNeeds, VAENeeds
from zquant.memory.sizes import ModelSizes, NetworkSizes
from zquant.models.checkpoint import Checkpoint
from zquant.models.config import DiTConfig, VAEConfig
from zquant.models.vae_memory import (
    decoder_flops,
    fitting_rows,
    striped_bytes,
    weight_bytes,
    whole_bytes,
)

__all__ = ["needs_of"]

# what libraries take for convolutions beside our tensors: a share of those (half of it in stripes),
# and bytes; measured with oneDNN at the true widths, an allowance for cuDNN
CPU_CONVOLUTION = (0.5, 16 * 2**20)
GPU_CONVOLUTION = (0.0, 64 * 2**20)
INT8_GAIN = 4  # int8 products against those of the compute dtype, where int8 is chosen


def needs_of(
    checkpoint: Checkpoint,
    sizes: ModelSizes,
    device: Device,
    picture: Picture,
    *,
    lengths: Sequence[int] = (),
    n_pictures: int = 1,
) -> Needs:
    """The needs of a request.

    Args:
        checkpoint: the opened model.
        sizes: of its weights.
        device: where it runs, and how it computes.
        picture: the largest of the request.
        lengths: tokens of every prompt that is to be encoded; empty is `picture.n_prompt` alone.
        n_pictures: in the request.
    """
    return Needs(
        picture=picture,
        text_encoder=_text_encoder(checkpoint, sizes.text_encoder, device, picture, lengths),
        dit=_dit(checkpoint.dit_config, sizes.dit, device, picture, n_pictures),
        vae=_vae(checkpoint.vae_config, device, picture, n_pictures),
        held=2 * n_pictures * _latent_bytes(checkpoint.dit_config, picture),  # noise, and denoised
    )


def _latent_bytes(config: DiTConfig, picture: Picture) -> int:
    return picture.width * picture.height // 64 * config.in_channels * torch.float32.itemsize


def _text_encoder(
    checkpoint: Checkpoint,
    sizes: NetworkSizes,
    device: Device,
    picture: Picture,
    lengths: Sequence[int],
) -> NetworkNeeds:
    lengths = list(lengths) or [picture.n_prompt] * picture.n_prompts
    config, dtype = checkpoint.text_encoder_config, device.compute_dtype
    kernels = not device.is_cuda or not device.paths.families[0].reason
    working = text_encoder_bytes(config, lengths, dtype, device.torch_device, kernels=kernels)
    return NetworkNeeds(
        blocks=sizes.blocks,
        fixed=sizes.fixed,
        working=working,
        flops=2.0 * sum(sizes.n_weights) * sum(lengths),
        n_weights=sum(sizes.n_weights),
        passes=1,
    )


def _dit(
    config: DiTConfig, sizes: NetworkSizes, device: Device, picture: Picture, n_pictures: int
) -> NetworkNeeds:
    compute, where = device.compute, device.torch_device
    kernels = device.is_cuda and not device.paths.families[0].reason
    working = dit_bytes(config, picture, compute, where, kernels=kernels)
    # the context refiner runs on caption tokens alone, its weights being visitors
    caption = block_bytes(config, picture.n_caption, compute, where, kernels=kernels)
    return NetworkNeeds(
        blocks=sizes.blocks,
        expanded=_expanded(sizes, compute, where),
        fixed=sizes.fixed,
        working=max(working, caption + sizes.visitor),
        flops=_pass_flops(config, sizes, compute, picture),
        n_weights=sum(sizes.n_weights),
        passes=picture.steps * picture.n_prompts * n_pictures,
    )


def _expanded(sizes: NetworkSizes, compute: Compute, where: torch.device) -> tuple[int, ...]:
    """Bytes of blocks in the compute dtype, where expanding them once can pay: on a CPU."""
    if where.type != "cpu" or compute.int8:
        return ()
    return tuple(n * compute.dtype.itemsize for n in sizes.n_weights)


def _pass_flops(
    config: DiTConfig, sizes: NetworkSizes, compute: Compute, picture: Picture
) -> float:
    """Of one step and prompt, in operations of the compute dtype."""
    n_refiners = config.n_refiner_layers
    total = 0.0
    for i, n_weights in enumerate(sizes.n_weights):
        tokens = picture.n_image if i < n_refiners else picture.n_tokens
        linear = 2.0 * n_weights * tokens
        total += linear / INT8_GAIN if compute.int8 else linear
        total += 4.0 * config.dim * tokens**2
    return total


def _vae(config: VAEConfig, device: Device, picture: Picture, n_pictures: int) -> VAENeeds:
    height, width = picture.height // config.scale, picture.width // config.scale
    itemsize = device.vae_dtype.itemsize
    share, hidden = GPU_CONVOLUTION if device.is_cuda else CPU_CONVOLUTION

    def rows(room: int, stored: bool) -> int | None:
        room = int((room - hidden) / (1 + share / 2))
        return fitting_rows(config, height, width, itemsize, device_bytes=room, stored=stored)

    def striped(rows: int, stored: bool) -> tuple[int, int]:
        device_bytes, host_bytes = striped_bytes(
            config, height, width, itemsize, rows=rows, stored=stored
        )
        return int(device_bytes * (1 + share / 2)) + hidden, host_bytes

    return VAENeeds(
        weights=weight_bytes(config, itemsize),
        whole=int(whole_bytes(config, height, width, itemsize) * (1 + share)) + hidden,
        rows=rows,
        striped=striped,
        flops=n_pictures * decoder_flops(config, height, width),
    )
