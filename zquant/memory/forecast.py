"""From requests to a plan: the machine is probed and the needs are added up."""

from collections.abc import Sequence
from dataclasses import replace

from zquant.memory.activations import Picture
from zquant.memory.advice import plan_or_advise, smallest_ceiling
from zquant.memory.demand import needs_of
from zquant.memory.device import Device
from zquant.memory.machine import machine_of
from zquant.memory.needs import Limits, Machine, Needs
from zquant.memory.plan import MemoryPlan
from zquant.memory.sizes import model_sizes
from zquant.models.checkpoint import Checkpoint

__all__ = ["Forecast"]

TYPICAL = "layers.0.feed_forward.w1.weight"


class Forecast:
    """Plans for one model on one device, as they are now.

    Attributes:
        sizes: of the model.
        machine: what it offers now; measured where it is not given.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: Device, machine: Machine | None = None
    ) -> None:
        self.checkpoint, self.device = checkpoint, device
        self.sizes = model_sizes(checkpoint)
        self.machine = machine or machine_of(device, checkpoint.parts["dit"][TYPICAL])

    def plan(
        self,
        pictures: Sequence[Picture],
        limits: Limits,
        lengths: Sequence[int] = (),
        n_pictures: int = 1,
    ) -> MemoryPlan:
        """One plan for all: what it holds is what the most demanding picture needs.

        Args:
            pictures: of the requests, at least one.
            limits: of the user.
            lengths: tokens of the prompts to be encoded.
            n_pictures: to be painted.

        Raises:
            PlanError: it does not fit; the message says what would.
        """
        largest = max(pictures, key=lambda picture: picture.n_tokens)
        merged = replace(
            largest,
            n_prompt=max(picture.n_prompt for picture in pictures),
            n_prompts=max(picture.n_prompts for picture in pictures),
            steps=max(picture.steps for picture in pictures),
        )

        def needs(picture: Picture) -> Needs:
            return self._needs(picture, lengths, n_pictures)

        return plan_or_advise(needs, merged, self.machine, limits, dit_bpw=self.sizes.dit_bpw)

    def smallest(self, picture: Picture, limits: Limits) -> int | None:
        """The smallest ceiling on the device that `picture` fits, in bytes; None is none."""
        return smallest_ceiling(self._needs(picture, (), 1), self.machine, limits.ram_bytes)

    def _needs(self, picture: Picture, lengths: Sequence[int], n_pictures: int) -> Needs:
        return needs_of(
            self.checkpoint,
            self.sizes,
            self.device,
            picture,
            lengths=lengths,
            n_pictures=n_pictures,
        )
