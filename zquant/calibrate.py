"""Measure what enters every linear of a model: the importance that quantizing can weigh by.

    squares[k] = sum over tokens of x[k]^2

Pictures are painted as `zquant run` paints them, without the VAE, and every linear of the DiT and
of the text encoder adds up the squares of its inputs. Tokens are

    text encoder        those of the prompt in its template; each prompt counts once
    blocks of the DiT   image, caption, and the pads up to a multiple of 32, which take part in this
                        model as the others do; every step counts, and with guidance every prompt
    modulation          one for each step

Always in floats (exact), and in float32 where the device would choose float16: there inputs are
scaled, and what overflows is computed twice. Blocks may be streamed; any qtype will do, and the
less it rounds the better. The table of token embeddings is looked up, not multiplied, and the text
encoder's last layer is never run: they have no importance.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from zquant_kernels.runtime import forbidden

from zquant.errors import ZQuantError
from zquant.formats.imatrix import Imatrix, InputSums
from zquant.formats.model_folder import ModelFiles
from zquant.formats.names import dit_file_names, text_encoder_file_names
from zquant.layers.compute import Compute
from zquant.layers.linear import QuantLinear
from zquant.memory.device import Device, probe
from zquant.memory.needs import Limits
from zquant.memory.plan_report import summary_line
from zquant.memory.shortage import memory_that_runs_out
from zquant.models.checkpoint import Checkpoint
from zquant.models.dit import DiT
from zquant.models.text_encoder import TextEncoder
from zquant.painting import Painting, Progress, Studio
from zquant.phases import uncapped_after
from zquant.prompts import Prompts
from zquant.request import RunRequest
from zquant.settings import Settings

__all__ = ["Calibration", "calibrate", "exact_device"]

CHUNK = 2**20  # numbers squared at a time: little beside the activations of a picture

N = TypeVar("N", bound=nn.Module)
NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What to measure.

    Attributes:
        files: the model.
        requests: what to paint, at least one picture.
        dataset: what the importance file calls them.
        device: from `exact_device`.
        limits: ceilings on memory.
    """

    files: ModelFiles
    requests: Sequence[RunRequest]
    dataset: str
    device: Device
    limits: Limits = NO_LIMITS


def exact_device(device: str) -> Device:
    """The device by its name ("auto", "cpu", "cuda" or "cuda:1"), to compute in floats.

    Raises:
        DeviceError: it is unknown or absent.
    """
    chosen = probe(device, compute="exact")
    if chosen.compute_dtype == torch.float16:
        return probe(device, "float32", compute="exact")
    return chosen


@torch.inference_mode()
def calibrate(
    calibration: Calibration,
    progress: Progress = lambda *_: None,
    announce: Callable[[str], None] = lambda _: None,
) -> Imatrix:
    """Paint, and add up what enters the linears.

    Args:
        calibration: what to measure.
        progress: called with a phase ("text encoder", "denoise"), done and total.
        announce: called with lines for the user.

    Raises:
        PlanError: a picture does not fit into the memory it may use.
        ZQuantError: numbers stopped being finite, or a file is damaged.
    """
    device = calibration.device
    checkpoint = _Observed(calibration.files)
    try:
        studio = Studio(
            checkpoint=checkpoint,
            device=device,
            limits=calibration.limits,
            prompts=Prompts(checkpoint, device, None),  # from a cache, nothing would be seen
            notices=[],
        )
        with forbidden(device.paths.forbidden), memory_that_runs_out(), uncapped_after(device):
            settings = [Settings.of(request, checkpoint) for request in calibration.requests]
            run = Painting(studio, settings, progress)
            announce(summary_line(run.plan, checkpoint.n_blocks))
            run.encode()
            checkpoint.leave_device()
            run.denoise(None)
            checkpoint.leave_device()
        for notice in run.notices:
            announce(notice)
        n_pictures = sum(request.count for request in calibration.requests)
        return checkpoint.imatrix(calibration.dataset, n_pictures)
    finally:
        checkpoint.close()


class _Squares:
    """Sums of the squared inputs of one linear, where its inputs are."""

    def __init__(self, n_columns: int) -> None:
        self.count = 0
        self.sums = torch.zeros(n_columns, dtype=torch.float64)

    def add(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A hook: the linear is called with `inputs`, tokens `[..., K]` first."""
        x = inputs[0]
        assert isinstance(x, Tensor)
        x = x.reshape(-1, x.shape[-1])
        self.sums = self.sums.to(x.device)
        self.count += len(x)
        step = max(1, CHUNK // x.shape[-1])
        for row in range(0, len(x), step):
            self.sums += x[row : row + step].float().square().sum(0)


class _Observed(Checkpoint):
    """A checkpoint whose networks add up the inputs of their linears, by name in the file."""

    def __init__(self, files: ModelFiles) -> None:
        super().__init__(files)
        self._squares: dict[str, _Squares] = {}

    def dit(self, device: torch.device, compute: Compute) -> DiT:
        """The transformer; see `Checkpoint`."""
        names = dit_file_names(self.parts["dit"])
        return self._watch(super().dit(device, compute), names)

    def text_encoder(self, device: torch.device, compute: Compute) -> TextEncoder:
        """The text encoder; see `Checkpoint`."""
        names = text_encoder_file_names(self.parts["text_encoder"])
        return self._watch(super().text_encoder(device, compute), names)

    def _watch(self, network: N, names: Sequence[tuple[str, tuple[str, ...]]]) -> N:
        """Hook the first of the linears that a file stores as one: they share their input."""
        for file_name, officials in names:
            module = self._linear(network, officials[0]) if officials else None
            if module is not None:
                squares = self._squares.setdefault(file_name, _Squares(module.in_features))
                module.register_forward_pre_hook(squares.add)
        return network

    @staticmethod
    def _linear(network: nn.Module, official: str) -> QuantLinear | None:
        """The linear whose weight is called that; None for another tensor, or an unused one."""
        owner, _, kind = official.rpartition(".")
        try:
            module = network.get_submodule(owner)
        except AttributeError:
            return None
        return module if kind == "weight" and isinstance(module, QuantLinear) else None

    def leave_device(self) -> None:
        """Bring all sums to the CPU, so that the next network finds the device empty."""
        for squares in self._squares.values():
            squares.sums = squares.sums.cpu()

    def imatrix(self, dataset: str, n_pictures: int) -> Imatrix:
        """All sums; a chunk is a picture."""
        entries = {}
        for name, squares in self._squares.items():
            if not torch.isfinite(squares.sums).all():
                raise ZQuantError(
                    f"{self.files.dit.parent}: the inputs of {name!r} are not finite. The model is "
                    f"damaged, or was quantized wrongly; check it with zquant run."
                )
            if squares.count:
                entries[name] = InputSums(squares=squares.sums.numpy(), count=squares.count)
        longest = max(sums.count for sums in entries.values())
        return Imatrix(
            entries=entries,
            datasets=(dataset,),
            n_chunks=n_pictures,
            chunk_size=int(longest) // n_pictures,
        )
