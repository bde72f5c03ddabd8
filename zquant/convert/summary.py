"""A conversion in words: the plan before, the result after."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zquant.convert.execute import ConvertResult
from zquant.convert.plan import ConversionPlan
from zquant.convert.target_size import SizedPlan
from zquant.formats.model_folder import typed
from zquant.formats.remote_file import RemoteFile
from zquant.units import format_bytes, format_count, format_seconds

__all__ = ["plan_rows", "result_lines", "size_rows", "tensor_rows"]


def tensor_rows(plan: ConversionPlan) -> Iterator[str]:
    """Every tensor with its qtype and bytes, file by file."""
    for output in plan.outputs:
        width = max(len(t.name) for t in output.tensors)
        for t in output.tensors:
            yield f"{t.name:<{width}}  {t.qtype.name:<5} {format_bytes(t.nbytes):>11}"
        yield ""


def plan_rows(plan: ConversionPlan) -> Iterator[str]:
    """A total for each file and for its qtypes, the place, and the variant."""
    for output in plan.outputs:
        yield (
            f"= {output.path}: {format_count(output.n_weights)} weights, {output.bpw:.2f} bpw, "
            f"{format_bytes(output.total_size)}"
        )
        n_bytes: Counter[str] = Counter()
        for t in output.tensors:
            n_bytes[t.qtype.name] += t.nbytes
        counts = Counter(t.qtype.name for t in output.tensors)
        for qtype, n in n_bytes.most_common():
            yield f"  {qtype:<5} {counts[qtype]:>4} tensors {format_bytes(n):>11}"
    yield from _importance_rows(plan)
    yield from _network_rows(plan)
    yield plan.place.summary
    stated = plan.request.variant or plan.origin.variant
    reason = "" if stated else " (assumed: the source does not say; set it with --variant)"
    yield (
        f"{plan.origin.label} -> {plan.request.out}: {format_bytes(plan.total_size)} in all, "
        f"variant {plan.variant.name}{reason}"
    )


def _mean_errors(tensors: Sequence[Mapping[str, Any]], key: str) -> str:
    """The mean of an error for every qtype that has it."""
    errors = defaultdict(list)
    for tensor in tensors:
        if key in tensor:
            errors[tensor["qtype"]].append(tensor[key])
    return ", ".join(
        f"{qtype} {100 * sum(each) / len(each):.3f} %"
        for qtype, each in sorted(errors.items())
        if any(each)
    )


def _network_rows(plan: ConversionPlan) -> Iterator[str]:
    """How much comes from a server, and what of it is checked."""
    parts = (p for output in plan.outputs for t in output.tensors for p in t.parts)
    n_bytes = sum(p.nbytes for p in parts if isinstance(p.info.reader, RemoteFile))
    if n_bytes:
        yield (
            f"{format_bytes(n_bytes)} are read over the network, and not kept (checked: sizes, "
            f"headers, the revision; of weights read in parts no hash can be)"
        )


def _importance_rows(plan: ConversionPlan) -> Iterator[str]:
    """Which files have importance, and which tensors go without."""
    for output in plan.outputs:
        if not output.imatrix:
            continue
        files = ", ".join(file.path.name for file in output.imatrix)
        n = sum(t.importance is not None for t in output.tensors)
        lacking = output.unweighed
        without = f"; {len(lacking)} without (first: {lacking[0]})" if lacking else ""
        yield f"{output.path.name}: importance from {files} for {n} tensors{without}"


def size_rows(sized: SizedPlan) -> Iterator[str]:
    """What a DiT made for a size became, and what that is expected to be worth."""
    dit = next(output for output in sized.plan.outputs if output.component == "dit")
    counts = Counter(t.qtype.name for t in dit.tensors if len(t.shape) > 1)
    yield (
        f"{dit.path.name}: {format_bytes(dit.total_size)} of {format_bytes(sized.target_bytes)}: "
        + ", ".join(f"{n} {qtype}" for qtype, n in counts.most_common())
    )
    if sized.is_widest:
        yield "every matrix is as wide as it can be; more bytes would make nothing better"
    near = {policy: ratio for policy, ratio in sized.beside.items() if 1 / 3 < ratio < 3}
    if near:
        shown = ", ".join(f"{ratio:.2f} of {policy}'s" for policy, ratio in near.items())
        yield f"error of the latents, estimated: {shown}"


def result_lines(result: ConvertResult) -> Iterator[str]:
    """Files with their error per qtype, then time, place, throughput and memory."""
    for component, entry in result.manifest["files"].items():
        tensors = list(result.manifest["tensors"][component].values())
        plain = _mean_errors(tensors, "relative_rms_error")
        weighted = _mean_errors(tensors, "weighted_rms_error")
        yield (
            f"{entry['name']}: {format_bytes(entry['bytes'])}, {entry['bpw']:.2f} bpw"
            + (f"; mean relative RMS error: {plain}" if plain else "")
            + (f"; weighted by importance: {weighted}" if weighted else "")
        )
    rate = result.source_bytes / max(result.seconds, 1e-9) / 1e6
    memory = result.peak_host_bytes
    yield (
        f"done in {format_seconds(result.seconds)} on {result.place.name}: {rate:.0f} MB/s read"
        + (f", peak RAM {format_bytes(memory)}" if memory else "")
    )
    yield f"next: zquant run PROMPT --model {typed(result.folder)}"
