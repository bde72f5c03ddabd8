"""Plans: within their ceilings, complete, monotonic, and helpful when they refuse."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from checkpoint_layout import CONFIGS, SHAPES
from hypothesis import given, settings
from hypothesis import strategies as st

from zquant.errors import PlanError
from zquant.layers.compute import Compute
from zquant.memory.activations import Picture, dit_bytes
from zquant.memory.advice import plan_or_advise, recommendation, smallest_ceiling
from zquant.memory.needs import Limits, Machine, Needs, NetworkNeeds, VAENeeds
from zquant.memory.plan import MemoryPlan, make_plan, spread
from zquant.memory.plan_report import summary_line
from zquant.models.config import DiTConfig, VAEConfig
from zquant.models.vae_memory import fitting_rows, striped_bytes, weight_bytes, whole_bytes
from zquant.units import format_seconds

GIB, MIB = 2**30, 2**20
DIT = DiTConfig.from_shapes(dict(SHAPES["transformer"](CONFIGS["transformer"])), {})
BLOCK_WEIGHTS = 4 * 3840**2 + 3 * 3840 * 10240
LAYER_WEIGHTS = 100_900_000
BPW = {"Q4_K": 4.5, "Q6_K": 6.5625, "Q8_0": 8.5, "BF16": 16.0}
INT8 = Compute(dtype=torch.bfloat16, int8=True)
EXACT = Compute(dtype=torch.float16)


FLUX = VAEConfig.from_shapes(dict(SHAPES["vae"](CONFIGS["vae"])), {})


def needs_of(picture: Picture, qtype: str = "Q4_K", compute: Compute = INT8) -> Needs:
    """Z-Image at its true size, on a GPU with kernels."""
    block, layer = (int(n * BPW[qtype] / 8) for n in (BLOCK_WEIGHTS, LAYER_WEIGHTS))
    size = (picture.height // 8, picture.width // 8)
    return Needs(
        picture=picture,
        text_encoder=NetworkNeeds(
            blocks=(layer,) * 35,
            fixed=5 * MIB,
            working=100 * MIB,
            flops=2.0 * 35 * LAYER_WEIGHTS * picture.n_prompt,
            n_weights=35 * LAYER_WEIGHTS,
            passes=1,
        ),
        dit=NetworkNeeds(
            blocks=(block,) * 32,
            fixed=40 * MIB,
            working=dit_bytes(DIT, picture, compute, torch.device("cuda"), kernels=True),
            flops=2.0 * 32 * BLOCK_WEIGHTS * picture.n_tokens,
            n_weights=32 * BLOCK_WEIGHTS,
            passes=picture.steps * picture.n_prompts,
        ),
        vae=VAENeeds(
            weights=weight_bytes(FLUX, 2),
            whole=whole_bytes(FLUX, *size, 2),
            rows=lambda room, stored: fitting_rows(
                FLUX, *size, 2, device_bytes=room, stored=stored
            ),
            striped=lambda rows, stored: striped_bytes(FLUX, *size, 2, rows=rows, stored=stored),
            flops=1e7 * picture.width * picture.height,
        ),
    )


def card(vram: float, **fields: Any) -> Machine:
    """An RTX 3060's rates with so many GiB free, in a machine of 16 GiB."""
    chosen: dict[str, Any] = {
        "is_gpu": True,
        "device_bytes": int(vram * GIB),
        "outside": 400 * MIB,
        "ram_bytes": 12 * GIB,
        "ram_held": 2 * GIB,
        "pinned_bytes": 12 * GIB,
        "flops": 4 * 16e12,
        "link_bytes_s": 12e9,
        "disk_bytes_s": 2e9,
    }
    return Machine(**(chosen | fields))


def square(edge: int, **fields: Any) -> Picture:
    return Picture(width=edge, height=edge, n_prompt=fields.pop("n_prompt", 128), **fields)


def planned(edge: int, vram: float, qtype: str = "Q4_K", **limits: Any) -> MemoryPlan:
    return make_plan(needs_of(square(edge), qtype), card(vram), Limits(**limits))


@pytest.mark.parametrize(("vram", "qtype"), [(2, "Q4_K"), (2, "Q8_0"), (4, "Q8_0"), (6, "Q4_K")])
def test_1024_fits_small_cards(vram: float, qtype: str) -> None:
    plan = planned(1024, vram, qtype)
    assert plan.device_bytes <= vram * GIB
    # copies hide: no step is slower than one whose weights are all there
    assert plan.step_seconds == pytest.approx(planned(1024, 24, qtype).step_seconds)


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(4, 128).map(lambda n: 16 * n),
    height=st.integers(4, 128).map(lambda n: 16 * n),
    n_prompt=st.integers(9, 512),
    guided=st.booleans(),
    qtype=st.sampled_from(sorted(BPW)),
    compute=st.sampled_from([INT8, EXACT]),
    budget=st.integers(1 * GIB, 16 * GIB),
    more=st.integers(0, 8 * GIB),
    ram=st.integers(3 * GIB, 40 * GIB),
    is_gpu=st.booleans(),
)
def test_every_plan_keeps_its_promises(
    width: int, height: int, n_prompt: int, guided: bool, qtype: str, compute: Compute,
    budget: int, more: int, ram: int, is_gpu: bool,
) -> None:  # fmt: skip
    picture = Picture(width=width, height=height, n_prompt=n_prompt, n_prompts=1 + guided)
    needs, machine = needs_of(picture, qtype, compute), card(64, is_gpu=is_gpu, ram_bytes=ram)

    def plan_for(ceiling: int) -> MemoryPlan:
        key = "budget_bytes" if is_gpu else "ram_bytes"
        return make_plan(needs, machine, Limits(**{key: ceiling}))

    try:
        plan = plan_for(budget)
    except PlanError:
        # refused: then the smallest that is said to fit must be larger, unless RAM is short
        least = smallest_ceiling(needs, machine, ram)
        assert least is None or least > budget
        return
    assert plan.device_bytes <= budget
    assert plan.host_bytes <= (ram if is_gpu else budget)
    for network, sizes in ((plan.dit, needs.dit), (plan.text_encoder, needs.text_encoder)):
        n = len(sizes.blocks)
        assert network.streamed <= set(range(n))
        assert not network.streamed & network.expanded
        assert (network.shape is not None) == bool(network.streamed)
        if network.shape is not None:
            kept, ring = network.shape.kept, network.shape.n_ring
            assert kept <= set(range(len(network.streamed)))
            assert ring or not is_gpu or len(kept) == len(network.streamed)
    larger = plan_for(budget + more)
    assert larger.step_seconds <= plan.step_seconds
    assert len(larger.dit.streamed) <= len(plan.dit.streamed)


def test_more_ram_never_pins_less() -> None:
    kept = []
    for ram in range(4, 12):
        machine = card(3, ram_bytes=ram * GIB)
        plan = make_plan(needs_of(square(1024), "Q8_0"), machine, Limits())
        assert plan.dit.shape is not None
        assert plan.host_bytes <= ram * GIB
        kept.append(len(plan.dit.shape.kept))
    assert kept == sorted(kept)
    assert kept[0] < kept[-1]


def test_pinning_stops_where_the_system_does() -> None:
    machine = card(3, pinned_bytes=1 * GIB)
    shape = make_plan(needs_of(square(1024)), machine, Limits()).dit.shape
    assert shape is not None
    slot = needs_of(square(1024)).dit.blocks[0]
    assert (len(shape.kept) + shape.n_ring) * slot <= 1 * GIB
    assert shape.n_ring == 2


def test_spare_ram_holds_expanded_blocks_on_a_cpu() -> None:
    needs = needs_of(square(256))
    expanded = tuple(2 * BLOCK_WEIGHTS for _ in range(32))
    needs = replace(needs, dit=replace(needs.dit, expanded=expanded))
    n_expanded = []
    for ram in (6, 8, 12, 24):
        machine = card(0, is_gpu=False, outside=1 * GIB, expand_s=1e-9)
        plan = make_plan(needs, machine, Limits(ram_bytes=ram * GIB))
        assert plan.device_bytes <= ram * GIB
        n_expanded.append(len(plan.dit.expanded))
    assert n_expanded == sorted(n_expanded)
    assert n_expanded[0] < 8
    assert n_expanded[-1] == 32


def test_expanding_must_pay_for_the_memory_it_touches() -> None:
    expanded = tuple(4 * BLOCK_WEIGHTS for _ in range(32))
    for steps, expand_s, pays in ((8, 0.3e-9, False), (8, 0.9e-9, True), (1, 0.9e-9, False)):
        needs = needs_of(square(256, steps=steps))
        needs = replace(needs, dit=replace(needs.dit, expanded=expanded))
        machine = card(0, is_gpu=False, expand_s=expand_s)
        plan = make_plan(needs, machine, Limits(ram_bytes=40 * GIB))
        assert bool(plan.dit.expanded) == pays


@pytest.mark.parametrize(("flops", "pays"), [(1.2e11, False), (5e11, True)])
def test_ram_is_filled_only_for_a_tenth_of_the_time(flops: float, pays: bool) -> None:
    needs = needs_of(square(256, steps=8))
    expanded = tuple(4 * BLOCK_WEIGHTS for _ in range(32))
    needs = replace(needs, dit=replace(needs.dit, expanded=expanded))
    machine = card(0, is_gpu=False, expand_s=0.9e-9, flops=flops)
    plan = make_plan(needs, machine, Limits(ram_bytes=40 * GIB))
    assert bool(plan.dit.expanded) == pays


def test_a_budget_beyond_what_is_free_is_what_is_free() -> None:
    plan = planned(1024, 3, budget_bytes=8 * GIB)
    assert plan.budget_bytes == 3 * GIB


def test_the_vae_is_striped_only_where_it_must_be() -> None:
    assert planned(1024, 2).vae.rows is None
    plans = [planned(2048, vram).vae for vram in (2, 2.25, 2.5, 3, 4, 10)]
    assert plans[0].rows is not None
    assert plans[-1].rows is None
    kinds = [(plan.rows is None, plan.stored, plan.rows or 0) for plan in plans]
    assert kinds == sorted(kinds)  # maps in RAM, then on the device, then whole


REFUSALS = [
    (
        card(1.5),
        {},
        2048,
        r"2048x2048: the DiT needs at least .* of VRAM.*; only 1\.5 GiB are free\. Close programs "
        r"that use the GPU until \d\.\d\d GiB are free, or use at most \d+x\d+\.$",
    ),
    (
        card(1.5),
        {"budget_bytes": GIB},
        2048,
        r"; --budget allows 1\.0 GiB\. Close .* GiB are free and use --budget \d\.\d\dGiB, or",
    ),
    (card(1.5), {"budget_bytes": 9 * GIB}, 2048, r"; only 1\.5 GiB.*until \S+ GiB are free, or"),
    (
        card(8),
        {"budget_bytes": GIB},
        2048,
        r"allows 1\.0 GiB\. Use --budget \d\.\d\dGiB, or use at",
    ),
    (card(8, ram_held=3 * GIB), {"ram_bytes": 3 * GIB, "budget_bytes": 2 * GIB}, 1024, "--max-ram"),
    (
        card(8, is_gpu=False),
        {"ram_bytes": GIB},
        1024,
        r"of RAM.*Use --max-ram \d\.\d\dGiB, or use at",
    ),
    (
        card(8, is_gpu=False, ram_bytes=GIB, device_bytes=GIB),
        {},
        1024,
        r"; only 1\.0 GiB are free\. Close programs that use RAM until \d\.\d\d GiB are free",
    ),
    (
        card(8, ram_bytes=GIB),
        {},
        1024,
        r"of RAM.*only 1\.0 GiB are free\. Close programs that use RAM",
    ),
]


@pytest.mark.parametrize(("machine", "limits", "edge", "message"), REFUSALS)
def test_a_refusal_says_what_would_fit(
    machine: Machine, limits: dict[str, int], edge: int, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        plan_or_advise(needs_of, square(edge), machine, Limits(**limits), dit_bpw=4.5)


def test_what_a_refusal_names_does_fit() -> None:
    machine, picture = card(1.5), square(2048)
    least = smallest_ceiling(needs_of(picture), machine, machine.ram_bytes)
    assert least is not None
    roomy = replace(machine, device_bytes=16 * GIB)
    assert make_plan(needs_of(picture), roomy, Limits(budget_bytes=least)).device_bytes <= least
    with pytest.raises(PlanError):
        make_plan(needs_of(picture), roomy, Limits(budget_bytes=least - 64 * MIB))
    with pytest.raises(PlanError, match="Q4_K_M"):
        plan_or_advise(needs_of, picture, machine, Limits(), dit_bpw=8.5)


def test_the_recommendation_follows_the_slower_side() -> None:
    slow = card(2, link_bytes_s=1e9)
    plan = make_plan(needs_of(square(512), "Q8_0"), slow, Limits())
    assert plan.step_seconds > 1.05 * plan.compute_seconds / 8
    assert "Q4_K_M" in recommendation(plan, 2 * GIB, 8.5)["recommended"]
    assert "larger --budget" in recommendation(plan, 2 * GIB, 4.5)["recommended"]
    fast = make_plan(needs_of(square(1024)), card(2), Limits())
    assert "hide" in recommendation(fast, 2 * GIB, 4.5)["recommended"]
    assert "stays" in recommendation(planned(1024, 24), None, 4.5)["recommended"]


def test_the_plan_in_one_line_tells_a_step_and_the_whole() -> None:
    plan = planned(1024, 4)
    total = sum(phase.seconds for phase in plan.phases)
    assert total > 8 * plan.step_seconds  # the VAE, too
    said = f"about {format_seconds(plan.step_seconds)} a step and {format_seconds(total)} in all"
    assert summary_line(plan, 32).endswith(said)
    unknown = make_plan(needs_of(square(1024)), card(4, flops=0.0), Limits())
    assert "a step" not in summary_line(unknown, 32)


@pytest.mark.parametrize(("n", "k"), [*itertools.product((1, 2, 7, 32), (0, 1, 2, 5, 32))])
def test_spread_is_even(n: int, k: int) -> None:
    chosen = sorted(spread(n, min(n, k)))
    assert len(chosen) == min(n, k)
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1
