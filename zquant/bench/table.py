"""The document of `zquant bench` as text: the ceiling first, then what was measured."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zquant.units import format_bytes, format_count, format_seconds

__all__ = ["bench_text", "ceiling_line", "failed_line"]

PHASES = {
    "plan_s": "plan",
    "text_encoder_s": "text encoder",
    "first_step_s": "first step",
    "step_s": "step",
    "vae_s": "VAE",
    "save_s": "save",
    "total_s": "total",
}


def bench_text(document: Mapping[str, Any]) -> str:
    """What `bench` gave, as aligned text."""
    device, rates, settings = document["device"], document["rates"], document["settings"]
    rows = [row for row in document["sizes"] if row["failure"] is None]
    link = f", link {_rate(rates['link_bytes_s'])}" if rates["link_bytes_s"] else ""
    lines = [
        f"{document['model']['name']} on {device['name']}: {device['compute_dtype']}, "
        f"{device['compute']}, attention {device['attention']}, {settings['steps']} steps",
        f"rates: memory {_rate(rates['memory_bytes_s'])}{link}, "
        f"file {_rate(rates['file_bytes_s'])}",
    ]
    if rows:
        lines += ["", *_columns(_ceilings(rows)), "", *_columns(_seconds(rows))]
        lines += ["", *_columns(_memory(rows)), ""]
        lines += [f"{name}: {text}" for name, text in document["means"].items()]
        lines += [f"VRAM: {text}" for text in _witnesses(rows)]
    lines += [failed_line(row) for row in document["sizes"] if row["failure"] is not None]
    notices = dict.fromkeys(notice for row in rows for notice in row["notices"])
    lines += [f"note: {notice}" for notice in notices]
    return "\n".join(lines)


def ceiling_line(row: Mapping[str, Any]) -> str:
    """What bounds a step of a size."""
    ceiling = row["ceiling"]
    return (
        f"{_size(row)}: ceiling {format_seconds(ceiling['roofline_s'])} a step, "
        f"bound by {ceiling['bound']} ({format_count(ceiling['product_flop_s'])}FLOP/s)"
    )


def failed_line(row: Mapping[str, Any]) -> str:
    """Why a size has no figures."""
    size = _size(row)
    return f"{size}: FAILED: {row['failure'].removeprefix(f'{size}: ')}"


def _ceilings(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    head = [
        "ceiling of a step",
        "tokens",
        "rate",
        "products",
        "weights",
        "moving",
        "least",
        "bound by",
    ]
    cells = []
    for row in rows:
        ceiling = row["ceiling"]
        rate = ceiling["product_int8_op_s"] or ceiling["product_flop_s"]
        seconds = (ceiling[f"{name}_s"] for name in ("products", "weights", "moving", "roofline"))
        cells.append(
            [
                _size(row),
                str(row["n_tokens"]),
                f"{format_count(rate)}FLOP/s",
                *map(format_seconds, seconds),
                ceiling["bound"],
            ]
        )
    return [head, *cells]


def _seconds(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    head = ["measured", "", "start-up", *PHASES.values(), "/ ceiling"]
    cells = []
    for row in rows:
        cold, warm = row["cold"], row["warm"]
        startup, times = format_seconds(row["startup_s"]), f"{row['times_ceiling']:.2f}"
        cells.append([_size(row), "cold", startup, *_phases(cold, "median"), ""])
        cells.append(["", "warm, median", "", *_phases(warm, "median"), times])
        cells.append(["", "warm, least", "", *_phases(warm, "min"), ""])
        cells.append(["", "warm, most", "", *_phases(warm, "max"), ""])
    return [head, *cells]


def _phases(phases: Mapping[str, Any], which: str) -> list[str]:
    return [format_seconds(phases[name][which]) for name in PHASES]


def _memory(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    head = ["predicted / measured", "RAM", "VRAM", "allocator", "step"]
    head += ["streamed", "read", "copied", "from disk", "overlap"]
    cells = []
    for row in rows:
        predicted, peaks, moved = row["predicted"], row["peaks"], row["moved"]
        step_s = predicted["step_s"]
        share = moved["overlap_at_least"]
        cells.append(
            [
                _size(row),
                f"{_bytes(predicted['ram_bytes'])} / {_bytes(peaks['ram_bytes'])}",
                f"{_bytes(predicted['vram_bytes'])} / {_bytes(peaks['vram_process_bytes'])}",
                _bytes(peaks["vram_allocator_bytes"]),
                f"{format_seconds(step_s) if step_s else '-'} / "
                f"{format_seconds(row['warm']['step_s']['median'])}",
                f"{moved['streamed_blocks']} blocks",
                _bytes(moved["read_bytes"]),
                _bytes(moved["copied_bytes"]),
                _bytes(moved["storage_read_bytes"]),
                "-" if share is None else f"{share:.0%} at least",
            ]
        )
    return [head, *cells]


def _witnesses(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Who says what a process holds, and how often it was looked at."""
    found = {
        row["peaks"]["vram_witness"]: f" ({row['peaks']['vram_samples_hz']:.0f} samples a second)"
        for row in rows
        if row["peaks"]["vram_witness"]
    }
    return [witness + rate for witness, rate in found.items()]


def _size(row: Mapping[str, Any]) -> str:
    return f"{row['width']}x{row['height']}"


def _rate(bytes_s: float) -> str:
    return f"{format_bytes(bytes_s)}/s"


def _bytes(n_bytes: int | None) -> str:
    return format_bytes(n_bytes) if n_bytes else "-"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
