"""Sizes + budget -> MemoryPlan. Arithmetic only: never touches a GPU or a file.

Three phases follow each other: text encoder, DiT, VAE. Each begins with an empty device, so the
peak is that of the largest phase. In a phase the device holds

    outside + fixed weights + activations + resident blocks + slots + margin

On a GPU the budget is of the whole process, CUDA context included, and streamed blocks come from
host memory: from a pinned copy of their own where RAM allows, else from the file through a ring of
staging buffers. On a CPU the device is RAM itself, and slots are filled from the file.

Resident and streamed blocks are spread evenly over depth, so that copies meet compute everywhere.
Nothing here changes what is painted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from zquant.errors import PlanError
from zquant.memory.activations import Picture
from zquant.memory.needs import Limits, Machine, Needs, NetworkNeeds, VAENeeds
from zquant.memory.stream import StreamShape
from zquant.units import format_bytes

__all__ = [
    "MemoryPlan",
    "NetworkPlan",
    "Phase",
    "VAEPlan",
    "ceilings",
    "make_plan",
    "margin",
    "spread",
]

MIB = 2**20
SEGMENT = 2 * MIB  # torch's allocator takes memory for a large tensor in whole ones
N_SLOTS = 2
N_RING = 2
MARGIN_SHARE = 0.03  # of what a phase allocates: rounding and fragments of the allocator
FRESH_S = 0.75e-9  # to touch a byte of fresh memory for the first time, measured on a CPU of 2021
WORTH_EXPANDING = 0.1  # of the time of the products must be saved before RAM is filled for it
MARGIN_BYTES = 48 * MIB  # and small tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPlan:
    """Where the blocks of one network are.

    Attributes:
        streamed: indices of the blocks that come and go; the others are resident.
        expanded: indices of resident blocks that are kept in the compute dtype.
        shape: of the stream; None without streamed blocks.
        working: bytes for activations and scratch.
    """

    streamed: frozenset[int] = frozenset()
    expanded: frozenset[int] = frozenset()
    shape: StreamShape | None = None
    working: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VAEPlan:
    """How the picture is decoded: whole, or in stripes of `rows` picture rows.

    `stored` keeps whole feature maps on the device; otherwise they are in host memory.
    """

    rows: int | None = None
    stored: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Predicted memory and time of one phase; `device` and `host` say what the bytes are for."""

    name: str
    device: dict[str, int]
    host: dict[str, int]
    seconds: float

    @property
    def device_bytes(self) -> int:
        """At its peak."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """At its peak."""
        return sum(self.host.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """All memory, decided before the first allocation.

    Attributes:
        picture: it was made for.
        machine: it was made on.
        budget_bytes: ceiling on the device.
        ram_bytes: ceiling in host memory.
        text_encoder: where its layers are.
        dit: where its blocks are.
        vae: how the picture is decoded.
        phases: predictions, in order.
        step_seconds: predicted for one step; 0 is unknown.
        compute_seconds: predicted for the DiT's phase if nothing had to be moved.
    """

    picture: Picture
    machine: Machine
    budget_bytes: int
    ram_bytes: int
    text_encoder: NetworkPlan
    dit: NetworkPlan
    vae: VAEPlan
    phases: tuple[Phase, ...] = field(default=())
    step_seconds: float = 0.0
    compute_seconds: float = 0.0

    @property
    def device_bytes(self) -> int:
        """Predicted peak on the device."""
        return max(phase.device_bytes for phase in self.phases)

    @property
    def host_bytes(self) -> int:
        """Predicted peak in host memory."""
        return max(phase.host_bytes for phase in self.phases)


def make_plan(needs: Needs, machine: Machine, limits: Limits) -> MemoryPlan:
    """Decide all memory of a request.

    Raises:
        PlanError: it does not fit, with the figures; `zquant.memory.advice` says what would.
    """
    planner = _Planner(machine, limits, needs.held)
    encoder, encoder_phase = planner.network("text encoder", needs.text_encoder, keep=False)
    dit, dit_phase = planner.network("DiT", needs.dit, keep=True)
    vae, vae_phase = planner.vae(needs.vae)
    return MemoryPlan(
        picture=needs.picture,
        machine=machine,
        budget_bytes=planner.budget,
        ram_bytes=planner.ram,
        text_encoder=encoder,
        dit=dit,
        vae=vae,
        phases=(encoder_phase, dit_phase, vae_phase),
        step_seconds=dit_phase.seconds * needs.picture.n_prompts / max(1, needs.dit.passes),
        compute_seconds=planner.compute_seconds(needs.dit, dit.expanded),
    )


def ceilings(machine: Machine, limits: Limits) -> tuple[int, int]:
    """Bytes on the device and in host memory that a plan may use."""
    ram = machine.ram_bytes if limits.ram_bytes is None else limits.ram_bytes
    if not machine.is_gpu:
        return ram, ram
    asked = limits.budget_bytes
    # what is not free cannot be used, whatever was asked
    return machine.device_bytes if asked is None else min(asked, machine.device_bytes), ram


def spread(n: int, n_chosen: int) -> frozenset[int]:
    """`n_chosen` of `n` indices, evenly."""
    return frozenset(i for i in range(n) if (i + 1) * n_chosen // n > i * n_chosen // n)


def _fewest_streamed(blocks: Sequence[int], room: int) -> frozenset[int]:
    """Indices to stream so that the others fit in `room` bytes, at least one, evenly spread."""
    n = len(blocks)
    choices = (spread(n, n_streamed) for n_streamed in range(1, n + 1))
    return next(streamed for streamed in choices if _outside(blocks, streamed) <= room)


def _outside(blocks: Sequence[int], streamed: frozenset[int]) -> int:
    """Bytes of the blocks that are not streamed."""
    return sum(n_bytes for i, n_bytes in enumerate(blocks) if i not in streamed)


def margin(n_bytes: int) -> int:
    """Kept free beside `n_bytes` of tensors."""
    return int(n_bytes * MARGIN_SHARE) + MARGIN_BYTES


class _Planner:
    """The rules, for one machine and its ceilings; `held` bytes are taken in host memory."""

    def __init__(self, machine: Machine, limits: Limits, held: int) -> None:
        self.machine, self.limits, self.held = machine, limits, held
        self.budget, self.ram = ceilings(machine, limits)
        # what is on the device before a phase begins
        self.outside = machine.outside if machine.is_gpu else machine.outside + held

    def network(self, name: str, needs: NetworkNeeds, *, keep: bool) -> tuple[NetworkPlan, Phase]:
        """Place the blocks of one network; `keep` streamed blocks in pinned RAM where it allows."""
        if self.machine.is_gpu:
            needs = replace(needs, blocks=tuple(-(-b // SEGMENT) * SEGMENT for b in needs.blocks))
        slot = max(needs.blocks)
        base = self.outside + needs.fixed + needs.working
        room = self.budget - base - margin(needs.working)
        streamed, n_slots = frozenset[int](), 0
        if sum(needs.blocks) > room:
            n_slots = N_SLOTS
            if n_slots * slot > room:
                self._refuse(name, base + margin(needs.working) + n_slots * slot, on_device=True)
            streamed = _fewest_streamed(needs.blocks, room - n_slots * slot)
        n_streamed = len(streamed)
        resident_bytes = _outside(needs.blocks, streamed)
        expanded, expanded_bytes = self._expanded(needs, streamed, room - resident_bytes)
        shape, host = self._host(name, n_streamed, n_slots, slot, keep=keep)
        device = {
            "outside": self.outside,
            "fixed weights": needs.fixed,
            "resident blocks": resident_bytes + expanded_bytes,
            "slots": n_slots * slot,
            "activations": needs.working,
            "margin": margin(needs.working),
        }
        plan = NetworkPlan(streamed=streamed, expanded=expanded, shape=shape, working=needs.working)
        seconds = self._seconds(needs, streamed, shape, expanded)
        return plan, Phase(name=name, device=device, host=host or device, seconds=seconds)

    def _expanded(
        self, needs: NetworkNeeds, streamed: frozenset[int], spare: int
    ) -> tuple[frozenset[int], int]:
        """Resident blocks that `spare` bytes can hold in the compute dtype, and the extra bytes."""
        if not needs.expanded or streamed:
            return frozenset(), 0
        machine = self.machine
        saved = (needs.passes - 1) * needs.n_weights * machine.expand_s
        saved -= sum(needs.expanded) * FRESH_S
        multiplying = needs.passes * needs.flops / machine.flops if machine.flops else 0.0
        if saved <= WORTH_EXPANDING * multiplying:
            return frozenset(), 0
        n = len(needs.blocks)
        extra = [e - b for e, b in zip(needs.expanded, needs.blocks, strict=True)]
        if max(extra) <= 0:  # stored in that dtype already
            return frozenset(), 0
        chosen = spread(n, max(0, min(n, spare // max(extra))))
        return chosen, sum(extra[i] for i in chosen)

    def _host(
        self, name: str, n_streamed: int, n_slots: int, slot: int, *, keep: bool
    ) -> tuple[StreamShape | None, dict[str, int]]:
        """The stream's buffers, and what the phase holds in host memory beside a GPU."""
        machine = self.machine
        if not machine.is_gpu:
            if not n_streamed:
                return None, {}
            return StreamShape(n_slots=n_slots, n_ring=0, kept=frozenset()), {}
        host = {"process": machine.ram_held + self.held, "loading": slot, "margin": MARGIN_BYTES}
        if not n_streamed:
            return None, host
        room = self.ram - sum(host.values())
        pinned = min(room, machine.pinned_bytes) if keep else 0
        n_kept = n_streamed if pinned >= n_streamed * slot else pinned // slot - N_RING
        n_kept = max(0, n_kept)
        n_ring = 0 if n_kept == n_streamed else min(N_RING, n_streamed)
        if n_ring * slot > room:
            self._refuse(name, sum(host.values()) + n_ring * slot, on_device=False)
        kept = spread(n_streamed, n_kept)
        host |= {"pinned blocks": n_kept * slot, "ring": n_ring * slot}
        return StreamShape(n_slots=n_slots, n_ring=n_ring, kept=kept), host

    def _seconds(
        self,
        needs: NetworkNeeds,
        streamed: frozenset[int],
        shape: StreamShape | None,
        expanded: frozenset[int],
    ) -> float:
        """Predicted for all passes: every copied byte hides behind compute, or the copies rule."""
        machine = self.machine
        if not machine.flops:
            return 0.0
        n_bytes = [needs.blocks[i] for i in sorted(streamed)]
        copied = sum(n_bytes) / machine.link_bytes_s if machine.link_bytes_s else 0.0
        kept = shape.kept if shape else frozenset()
        from_file = sum(b for i, b in enumerate(n_bytes) if i not in kept)
        read = from_file / machine.disk_bytes_s if machine.disk_bytes_s else 0.0
        return max(self.compute_seconds(needs, expanded), needs.passes * max(copied, read))

    def compute_seconds(self, needs: NetworkNeeds, expanded: frozenset[int]) -> float:
        """Of all passes, with every weight where it is needed; 0 is unknown."""
        machine = self.machine
        if not machine.flops:
            return 0.0
        share = 1 - len(expanded) / len(needs.blocks)
        once = needs.flops / machine.flops + share * needs.n_weights * machine.expand_s
        return needs.passes * once

    def vae(self, needs: VAENeeds) -> tuple[VAEPlan, Phase]:
        """Whole if that fits; else stripes, feature maps on the device; else maps in RAM."""
        machine = self.machine
        base = self.outside + needs.weights
        room = int((self.budget - base - MARGIN_BYTES) / (1 + MARGIN_SHARE))
        plan, working, held = VAEPlan(), needs.whole, 0
        if working > room:
            for stored in (True, False) if machine.is_gpu else (True,):
                rows = needs.rows(room, stored)
                if rows is not None:
                    plan = VAEPlan(rows=rows, stored=stored)
                    working, held = needs.striped(rows, stored)
                    break
            else:
                least = needs.striped(8, not machine.is_gpu)[0]
                self._refuse("VAE", base + least + margin(least), on_device=True)
        device = {
            "outside": self.outside,
            "fixed weights": needs.weights,
            "activations": working,
            "margin": margin(working),
        }
        host = device
        if machine.is_gpu:
            process = machine.ram_held + self.held
            host = {"process": process, "feature maps": held, "margin": MARGIN_BYTES}
            if sum(host.values()) > self.ram:
                self._refuse("VAE", sum(host.values()), on_device=False)
        seconds = needs.flops / machine.flops if machine.flops else 0.0
        return plan, Phase(name="VAE", device=device, host=host, seconds=seconds)

    def _refuse(self, name: str, needed: int, *, on_device: bool) -> None:
        gpu = on_device and self.machine.is_gpu
        have, asked = self.ram, self.limits.ram_bytes
        if gpu:
            have, asked = self.budget, self.limits.budget_bytes
        room = f"only {format_bytes(have)} are free"
        if asked == have:
            room = f"{'--budget' if gpu else '--max-ram'} allows {format_bytes(have)}"
        raise PlanError(
            f"the {name} needs at least {format_bytes(needed)} of {'VRAM' if gpu else 'RAM'}, "
            f"everything else that moves streamed; {room}."
        )
