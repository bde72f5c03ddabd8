"""What would fit when a plan does not: the nearest budget, picture size and storage type."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from zquant.errors import PlanError
from zquant.memory.activations import Picture
from zquant.memory.needs import Limits, Machine, Needs
from zquant.memory.plan import MemoryPlan, ceilings, make_plan

__all__ = ["plan_or_advise", "recommendation", "smallest_ceiling"]

STEP = 2**20 * 64  # ceilings are advised in steps of 64 MiB
SQUARES = tuple(range(2048, 192, -64))  # sizes worth proposing
SLOWER = 1.05  # a phase beyond this times its products waits for copies
COMPACT_BPW, COMPACT_QTYPE = 5.5, "Q4_K_M"  # models above take less when converted so


def plan_or_advise(
    needs_of: Callable[[Picture], Needs],
    picture: Picture,
    machine: Machine,
    limits: Limits,
    *,
    dit_bpw: float,
) -> MemoryPlan:
    """`make_plan`, whose refusal names what would fit.

    Args:
        needs_of: the needs of a picture.
        picture: wanted.
        machine: to run on.
        limits: of the user.
        dit_bpw: bits per weight of the model.

    Raises:
        PlanError: the picture does not fit.
    """
    try:
        return make_plan(needs_of(picture), machine, limits)
    except PlanError as error:
        said = str(error)
    advice = ", or ".join(_advice(needs_of, picture, machine, limits))
    if dit_bpw > COMPACT_BPW:
        advice += f", or convert the model with --qtype {COMPACT_QTYPE}"
    remedy = f"{advice[:1].upper()}{advice[1:]}"
    raise PlanError(f"{picture.width}x{picture.height}: {said} {remedy}.")


def recommendation(plan: MemoryPlan, smallest: int | None, dit_bpw: float) -> dict[str, str]:
    """What `zquant plan` recommends for this machine.

    Args:
        plan: that fits.
        smallest: the smallest ceiling on the device that would, in bytes.
        dit_bpw: bits per weight of the model.
    """
    machine, n_streamed = plan.machine, len(plan.dit.streamed)
    flag = "--budget" if machine.is_gpu else "--max-ram"
    said = {}
    if smallest is not None:
        said["smallest"] = f"{flag} {smallest / 2**30:.2f}GiB would still do"
    slow = plan.phases[1].seconds > SLOWER * plan.compute_seconds > 0
    if not n_streamed:
        said["recommended"] = "this model as it is; every block stays"
    elif slow and dit_bpw > COMPACT_BPW:
        said["recommended"] = f"{COMPACT_QTYPE}: copies of this model take longer than its products"
    elif slow:
        said["recommended"] = f"a larger {flag}: copies take longer than products"
    else:
        said["recommended"] = "this model as it is; copies hide behind products"
    return said


def _advice(
    needs_of: Callable[[Picture], Needs], picture: Picture, machine: Machine, limits: Limits
) -> Iterator[str]:
    """What to do instead, as clauses; the first is about memory."""
    _, ram = ceilings(machine, limits)
    needs = needs_of(picture)
    least = smallest_ceiling(needs, machine, ram)
    if least is not None:
        yield _room_for(least, machine, limits)
    elif machine.is_gpu and smallest_ceiling(needs, machine, None) is not None:
        asked = limits.ram_bytes is not None
        yield "use a larger --max-ram" if asked else "close programs that use RAM"
    else:
        yield "use a machine with more memory"
    for edge in SQUARES:
        if edge * edge >= picture.width * picture.height:
            continue
        try:
            make_plan(needs_of(replace(picture, width=edge, height=edge)), machine, limits)
        except PlanError:
            continue
        yield f"use at most {edge}x{edge}"
        return


def _room_for(least: int, machine: Machine, limits: Limits) -> str:
    """How to get `least` bytes on the device: a ceiling beyond what is free would give no more."""
    gpu = machine.is_gpu
    flag = f"{'--budget' if gpu else '--max-ram'} {least / 2**30:.2f}GiB"
    if least <= machine.device_bytes:
        return f"use {flag}"
    asked = limits.budget_bytes if gpu else limits.ram_bytes
    where = "the GPU" if gpu else "RAM"
    closed = f"close programs that use {where} until {least / 2**30:.2f} GiB are free"
    return closed if asked is None or asked >= least else f"{closed} and use {flag}"


def smallest_ceiling(needs: Needs, machine: Machine, ram_bytes: int | None) -> int | None:
    """The smallest ceiling on the device, in steps of 64 MiB, that `needs` fit; None is none.

    `ram_bytes` is the ceiling on host memory beside a GPU; None does not limit it.
    """
    roomy = replace(machine, device_bytes=2**40, ram_bytes=ram_bytes or 2**40)

    def fits(ceiling: int) -> bool:
        limits = Limits(budget_bytes=ceiling)
        if not machine.is_gpu:
            limits = Limits(ram_bytes=ceiling)
        try:
            make_plan(needs, roomy, limits)
        except PlanError:
            return False
        return True

    low, high = 0, 2**40 // STEP  # in steps: `low` does not fit, `high` may
    if not fits(high * STEP):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle * STEP) else (middle, high)
    return high * STEP
