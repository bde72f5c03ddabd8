"""A memory plan as one line, as a table, or as JSON, and beside it what was measured."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from zquant.memory.plan import MemoryPlan, NetworkPlan, Phase
from zquant.units import format_bytes, format_seconds

__all__ = ["measured_line", "plan_document", "plan_text", "summary_line"]


def plan_document(plan: MemoryPlan, advice: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The plan as JSON values; `advice` is what `zquant plan` recommends."""
    vae = plan.vae
    return {
        "kind": "plan",
        "picture": asdict(plan.picture),
        "machine": asdict(plan.machine),
        "budget_bytes": plan.budget_bytes if plan.machine.is_gpu else None,
        "max_ram_bytes": plan.ram_bytes,
        "predicted_vram_bytes": plan.device_bytes if plan.machine.is_gpu else None,
        "predicted_host_bytes": plan.host_bytes,
        "predicted_step_s": plan.step_seconds,
        "text_encoder": _network(plan.text_encoder),
        "dit": _network(plan.dit),
        "vae": {"rows": vae.rows, "feature_maps": "device" if vae.stored else "host"},
        "phases": [_phase(phase) for phase in plan.phases],
        "advice": dict(advice or {}),
    }


def _network(plan: NetworkPlan) -> dict[str, Any]:
    shape = plan.shape
    return {
        "streamed": sorted(plan.streamed),
        "expanded": sorted(plan.expanded),
        "slots": shape.n_slots if shape else 0,
        "ring": shape.n_ring if shape else 0,
        "pinned": len(shape.kept) if shape else 0,
    }


def _phase(phase: Phase) -> dict[str, Any]:
    return {
        "name": phase.name,
        "device_bytes": phase.device_bytes,
        "host_bytes": phase.host_bytes,
        "seconds": phase.seconds,
        "device": phase.device,
        "host": phase.host,
    }


def summary_line(plan: MemoryPlan, n_blocks: int) -> str:
    """What is where, and the peaks to expect."""
    n_streamed, machine = len(plan.dit.streamed), plan.machine
    where = f"{n_blocks - n_streamed} of {n_blocks} blocks resident"
    if n_streamed:
        shape = plan.dit.shape
        kept = len(shape.kept) if shape else 0
        source = f"{kept} of them pinned" if kept else "from the file"
        where += f", {n_streamed} streamed ({source if machine.is_gpu else 'from the file'})"
    if plan.dit.expanded:
        where += f", {len(plan.dit.expanded)} expanded"
    vae = "whole" if plan.vae.rows is None else f"in stripes of {plan.vae.rows} rows"
    peaks = f"RAM {format_bytes(plan.host_bytes)} of {format_bytes(plan.ram_bytes)}"
    if machine.is_gpu:
        vram = f"VRAM {format_bytes(plan.device_bytes)} of {format_bytes(plan.budget_bytes)}"
        peaks = f"{vram}, {peaks}"
    seconds = ""
    if plan.step_seconds:
        total = format_seconds(sum(phase.seconds for phase in plan.phases))
        seconds = f", about {format_seconds(plan.step_seconds)} a step and {total} in all"
    return f"plan: {where}; VAE {vae}; peak {peaks}{seconds}"


def measured_line(memory: Mapping[str, Any], step_s: float) -> str:
    """Predicted beside measured; empty where nothing was predicted."""
    if not memory:
        return ""
    pairs = []
    for name, kind in (("VRAM", "vram"), ("RAM", "host")):
        predicted, measured = memory[f"predicted_{kind}_bytes"], memory[f"measured_{kind}_bytes"]
        if predicted and measured:
            pairs.append(f"{name} {format_bytes(predicted)} / {format_bytes(measured)}")
    if memory["predicted_step_s"]:
        predicted = format_seconds(memory["predicted_step_s"])
        pairs.append(f"step {predicted} / {format_seconds(step_s)}")
    read = sum(stream["bytes_read"] for stream in memory["streams"].values())
    copied = sum(stream["bytes_copied"] for stream in memory["streams"].values())
    moved = f"; read {format_bytes(read)} from files" if read else ""
    moved += f", copied {format_bytes(copied)} to the GPU" if copied else ""
    return f"predicted / measured: {', '.join(pairs)}{moved}"


def plan_text(document: Mapping[str, Any]) -> str:
    """What `plan_document` gave, as aligned text."""
    picture, is_gpu = document["picture"], document["machine"]["is_gpu"]
    lines = [
        f"{picture['width']}x{picture['height']}, {picture['steps']} steps, prompt of "
        f"{picture['n_prompt']} tokens",
        "",
        *_table(document["phases"], "device"),
    ]
    if is_gpu:
        lines += ["", *_table(document["phases"], "host")]
    lines += ["", *_networks(document), "", *_totals(document)]
    lines += [f"{name}: {text}" for name, text in document["advice"].items()]
    return "\n".join(lines)


def _table(phases: list[dict[str, Any]], where: str) -> list[str]:
    """One column per phase, one row per purpose."""
    title = {"device": "bytes on the device", "host": "bytes in RAM"}[where]
    names = list(dict.fromkeys(key for phase in phases for key in phase[where]))
    rows = [[title, *(phase["name"] for phase in phases)]]
    rows += [[n, *(format_bytes(phase[where].get(n, 0)) for phase in phases)] for n in names]
    rows.append(["peak", *(format_bytes(phase[f"{where}_bytes"]) for phase in phases)])
    if where == "device":
        rows.append(["seconds", *(_seconds(phase["seconds"]) for phase in phases)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def _seconds(value: float) -> str:
    return format_seconds(value) if value else "unknown"


def _networks(document: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, title in (("text_encoder", "text encoder"), ("dit", "DiT")):
        network = document[key]
        text = f"{title}: {len(network['streamed'])} blocks streamed"
        if network["streamed"]:
            text += (
                f" through {network['slots']} slots, {network['pinned']} pinned in RAM, ring of "
                f"{network['ring']}"
            )
        if network["expanded"]:
            text += f", {len(network['expanded'])} expanded"
        lines.append(text)
    rows, maps = document["vae"]["rows"], document["vae"]["feature_maps"]
    striped = f"in stripes of {rows} rows, feature maps on the {maps}"
    return [*lines, f"VAE: {'whole' if rows is None else striped}"]


def _totals(document: Mapping[str, Any]) -> list[str]:
    lines = []
    if document["machine"]["is_gpu"]:
        peak, most = document["predicted_vram_bytes"], document["budget_bytes"]
        lines.append(f"VRAM: {format_bytes(peak)} at the peak, budget {format_bytes(most)}")
    peak, most = document["predicted_host_bytes"], document["max_ram_bytes"]
    lines.append(f"RAM: {format_bytes(peak)} at the peak, ceiling {format_bytes(most)}")
    if document["predicted_step_s"]:
        lines.append(f"step: {format_seconds(document['predicted_step_s'])} (an estimate)")
    return lines
