"""A conversion in words: the plan before, the result after."""

from collections import defaultdict
from collections.abc import Iterator

from zquant.convert.execute import ConvertResult
from zquant.convert.plan import ConversionPlan
from zquant.formats.model_folder import typed
from zquant.units import format_bytes, format_count, format_seconds

__all__ = ["plan_rows", "result_lines"]


def plan_rows(plan: ConversionPlan) -> Iterator[str]:
    """Every tensor with its qtype and bytes, a total for each file, the place, and the variant."""
    for output in plan.outputs:
        width = max(len(t.name) for t in output.tensors)
        for t in output.tensors:
            yield f"{t.name:<{width}}  {t.qtype.name:<5} {format_bytes(t.nbytes):>11}"
        yield (
            f"= {output.path}: {format_count(output.n_weights)} weights, {output.bpw:.2f} bpw, "
            f"{format_bytes(output.total_size)}\n"
        )
    yield plan.place.summary
    stated = plan.request.variant or plan.origin.variant
    reason = "" if stated else " (assumed: the source does not say; set it with --variant)"
    yield (
        f"{plan.origin.label} -> {plan.request.out}: {format_bytes(plan.total_size)} in all, "
        f"variant {plan.variant.name}{reason}"
    )


def result_lines(result: ConvertResult) -> Iterator[str]:
    """Files with their error per qtype, then time, place, throughput and memory."""
    for component, entry in result.manifest["files"].items():
        errors = defaultdict(list)
        for tensor in result.manifest["tensors"][component].values():
            errors[tensor["qtype"]].append(tensor["relative_rms_error"])
        shown = ", ".join(
            f"{qtype} {100 * sum(e) / len(e):.3f} %"
            for qtype, e in sorted(errors.items())
            if any(e)
        )
        yield (
            f"{entry['name']}: {format_bytes(entry['bytes'])}, {entry['bpw']:.2f} bpw"
            + (f"; mean relative RMS error: {shown}" if shown else "")
        )
    rate = result.source_bytes / max(result.seconds, 1e-9) / 1e6
    memory = result.peak_host_bytes
    yield (
        f"done in {format_seconds(result.seconds)} on {result.place.name}: {rate:.0f} MB/s read"
        + (f", peak RAM {format_bytes(memory)}" if memory else "")
    )
    yield f"next: zquant run PROMPT --model {typed(result.folder)}"
