"""The best DiT in a number of bytes: a plan whose qtypes are solved for instead of prescribed.

    damage of a matrix in a qtype = sensitivity x loss

The loss is measured on the weights (`measure.py`), the sensitivity is a table; `allocate.py` finds
the qtypes with the least damage in all. Only matrices that the Q4_K_M policy quantizes are chosen
for: norms, embedders and vectors stay as they are there, and so does what `--tensor-type` names.
The text encoder follows its policy.

The sensitivity is how far the final latents move, squared, for a given loss in one matrix, with the
first layer's attention.out as 1. `benchmarks/target_size.py sensitivity` measures it, one matrix at
a time. In the demo model the last layer counts 8 times the first, refiners and modulation a tenth
to a third; with random weights the last counts a third, refiners as much as the first layer, and
modulation twice. In both, w1 and w3 count half. The published model is not measured, so the table
has the geometric means of the two, rounded: not the best for either, and far off for none.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from zquant.convert.allocate import Choices, Option, allocate, total_damage
from zquant.convert.measure import MeasureProgress, measure_losses
from zquant.convert.plan import ConversionPlan, ConvertRequest, OutputTensor, plan_conversion
from zquant.errors import PlanError
from zquant.formats.gguf_file import ALIGNMENT
from zquant.quant.policy import POLICIES, assign
from zquant.quant.qtypes import QTYPES, QType
from zquant.units import format_bytes

__all__ = ["SizedPlan", "plan_to_size", "sensitivity"]

BASE = "Q4_K_M"  # the policy whose wide tensors stay wide
WIDEST = "BF16"
LONG_ROWS = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q4_0", "Q5_K", "Q6_K", "Q8_0", WIDEST)
SHORT_ROWS = ("IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", WIDEST)
KINDS = (  # regular expression -> sensitivity; of layers at the first
    (r"adaLN_modulation", 0.5),
    (r"^(noise|context)_refiner\.", 0.3),
    (r"\.attention\.(qkv|out)\.", 1.0),
    (r"\.feed_forward\.w2\.", 0.8),
    (r"", 0.5),
)
LAST_LAYER = 2.0  # how many times as much the last layer counts as the first


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedPlan:
    """A plan whose DiT was made for a size.

    Attributes:
        plan: what the conversion will do; its request has the allocation.
        target_bytes: what was asked for.
        is_widest: every matrix is as wide as it can be; more bytes make nothing better.
        beside: policy -> estimated error of the latents, as a share of that policy's.
    """

    plan: ConversionPlan
    target_bytes: int
    is_widest: bool
    beside: Mapping[str, float]


def sensitivity(name: str, n_layers: int) -> float:
    """How much a loss in the DiT's matrix `name` counts, of `n_layers` blocks in the main stack."""
    kind = next(value for pattern, value in KINDS if re.search(pattern, name))
    layer = re.match(r"layers\.(\d+)\.", name)
    depth = int(layer[1]) / max(1, n_layers - 1) if layer else 0.0
    return float(kind * LAST_LAYER**depth)


def plan_to_size(
    request: ConvertRequest,
    target_bytes: int,
    progress: MeasureProgress = lambda *_: None,
    check: Callable[[ConversionPlan], None] = lambda _: None,
) -> SizedPlan:
    """Measure the DiT's matrices and plan the best file of at most `target_bytes`.

    Args:
        request: its `qtype` is for the text encoder; it has no allocation for the DiT.
        target_bytes: of the DiT's file, header and all.
        progress: called as matrices are measured.
        check: called before that, with the plan of the smallest file.

    Raises:
        PlanError: no file is that small.
        ZQuantError: see `plan_conversion`.
        ValueError: an allocation and a size were asked for; or see `plan_conversion`.
    """
    if "dit" in request.allocation:
        raise ValueError("an allocation says every qtype, and so the size; ask for one of the two")
    fixed, candidates = _split(request)
    narrow = {name: min(each, key=lambda q: q.bpw) for name, each in candidates.items()}
    least = _plan(request, fixed | narrow)
    if _size(least) > target_bytes:
        raise PlanError(
            f"a DiT of {format_bytes(target_bytes)} ({target_bytes} bytes) was asked for; with "
            f"every matrix in its smallest qtype it has {format_bytes(_size(least))}. Ask for "
            f"--target-size {_size(least)} or more."
        )
    check(least)
    # the narrow plan has all importance there is: nothing in it is too wide to be weighed
    tensors = [t for t in _dit(least) if t.name in candidates]
    choices = _measured(tensors, candidates, request.threads, progress)
    known = _known(tensors, choices)
    budget = target_bytes - (_size(least) - sum(_aligned(t) for t in tensors))
    while True:
        chosen = allocate(choices, budget, list(known.values()))
        plan = _plan(request, fixed | {name: QTYPES[chosen[name]] for name in candidates})
        if (excess := _size(plan) - target_bytes) <= 0:
            break
        budget -= excess  # the header may say more than that of the smallest file
    damage = total_damage(choices, chosen)
    others = {name: total_damage(choices, each) for name, each in known.items()}
    return SizedPlan(
        plan=plan,
        target_bytes=target_bytes,
        is_widest=set(chosen.values()) == {WIDEST},
        beside={name: math.sqrt(damage / other) for name, other in others.items() if other},
    )


def _split(request: ConvertRequest) -> tuple[dict[str, QType], dict[str, list[QType]]]:
    """The qtypes of what is not chosen for, and the candidates of what is."""
    encoder = request.text_encoder_qtype or request.qtype
    # without importance, for which there may be no use in these qtypes
    base = replace(request, qtype=BASE, text_encoder_qtype=encoder, imatrix=())
    fixed, candidates = {}, {}
    for tensor in _dit(plan_conversion(base)):
        said = any(re.search(pattern, tensor.name) for pattern, _ in request.tensor_types)
        if said or tensor.qtype.is_float:
            fixed[tensor.name] = tensor.qtype
            continue
        names = SHORT_ROWS if tensor.shape[-1] % 256 else LONG_ROWS
        candidates[tensor.name] = [QTYPES[name] for name in names]
    if not candidates:
        raise PlanError(
            f"{request.out}: --target-size has no matrix of the DiT to choose for; all "
            f"{len(fixed)} tensors have their qtype. Use fewer --tensor-type, or leave it out."
        )
    return fixed, candidates


def _plan(request: ConvertRequest, dit: Mapping[str, QType]) -> ConversionPlan:
    return plan_conversion(replace(request, allocation={**request.allocation, "dit": dit}))


def _dit(plan: ConversionPlan) -> tuple[OutputTensor, ...]:
    return next(o.tensors for o in plan.outputs if o.component == "dit")


def _size(plan: ConversionPlan) -> int:
    """Bytes of the DiT's file."""
    return next(o.total_size for o in plan.outputs if o.component == "dit")


def _aligned(tensor: OutputTensor) -> int:
    """Bytes of a tensor up to where the next one begins."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _measured(
    tensors: Sequence[OutputTensor],
    candidates: Mapping[str, Sequence[QType]],
    threads: int | None,
    progress: MeasureProgress,
) -> list[Choices]:
    """What there is to choose for every matrix, and what it costs."""
    losses = measure_losses(tensors, [candidates[t.name] for t in tensors], threads, progress)
    layers = {m[1] for t in tensors if (m := re.match(r"layers\.(\d+)\.", t.name))}
    choices = []
    for tensor in tensors:
        weight = sensitivity(tensor.name, 1 + max(map(int, layers), default=0))
        options = [
            Option(q.name, _aligned(replace(tensor, qtype=q)), weight * losses[tensor.name][q.name])
            for q in candidates[tensor.name]
            if q.name in losses[tensor.name]
        ]
        choices.append(Choices(tensor.name, tuple(options)))
    return choices


def _known(
    tensors: Sequence[OutputTensor], choices: Sequence[Choices]
) -> dict[str, dict[str, str]]:
    """What policies give the same matrices, where all of it is among the choices."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    options = {each.name: {option.name for option in each.options} for each in choices}
    known = {}
    for policy in POLICIES:
        given = {n: q.name for n, q in assign("dit", shapes, policy).items()}
        if all(qtype in options[name] for name, qtype in given.items()):
            known[policy] = given
    return known
