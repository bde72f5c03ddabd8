"""Plots of result files: memory against seconds, quality against size, a timeline of a stream."""

import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from simulated_lanes import Machine, SimulatedLanes
from stream_simulator import Clock, SimulatedBlock, Use, forward

from zquant.memory.plan import spread
from zquant.memory.stream import BlockStream, StreamShape

__all__ = ["multiplies", "peer_rows", "plot_all"]

Load = Callable[[str], dict[str, Any]]
GIB = 2**30
PEERS = (  # in the order in which they ran
    *(f"cpu-peers-256-{run}" for run in (2, 3, 4, 5, "bf16", 6, 7)),
    *(f"cpu-peers-512-{run}" for run in (1, "bf16", 3, 4)),
)
NEWEST = ("cpu-peers-256-6", "cpu-peers-256-7", "cpu-peers-512-3")
# zquant's decoder became faster; stable-diffusion.cpp was given its flash attention and no mapping
ONLY_NEWEST = ("zquant Q4_K_M", "sdcpp Q8_0", "sdcpp Q4_K_M")
SIZE = (7, 4.5)  # inches
TIMELINE = ("RTX 3060, Gen3 board", "dit-Q4_K_M.gguf", "2GiB")  # card, model and budget


def plot_all(folder: Path, load: Load) -> Iterator[Path]:
    """Write every plot into `folder`; yields their paths.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("plots need matplotlib: pip install '.[report]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (
        ("memory-seconds", _memory_seconds),
        ("quality-size", _quality_size),
        ("timeline-projected", _timeline),
    ):
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure.subplots(), load)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=120)
        yield path


def peer_rows(load: Load) -> list[dict[str, Any]]:
    """Every picture that an engine painted, with how often; the reference is not among them.

    Seconds are medians of the runs, `step_range_s` the least and the most; `floor_s` is the lowest
    floor of that size that any run measured; memory and errors are those of the last run.
    """
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    floors: dict[int, float] = {}
    for name in PEERS:
        document = load(name)
        for each in document["ceilings"]:
            floors[each["size"]] = min(each["floor_s"], floors.get(each["size"], math.inf))
        for row in document["rows"]:
            ran = row["engine"] != "reference" and row["status"] == "ok"
            if ran and (row["label"] not in ONLY_NEWEST or name in NEWEST):
                found.setdefault((row["label"], row["size"], multiplies(row)), []).append(row)
    return [_merged(rows, floors) for rows in found.values()]


def _merged(rows: list[dict[str, Any]], floors: dict[int, float]) -> dict[str, Any]:
    seconds = {
        name: statistics.median(row[name] for row in rows)
        for name in ("step_s", "first_step_s", "total_s")
    }
    steps = [row["step_s"] for row in rows]
    more = {"n_runs": len(rows), "step_range_s": (min(steps), max(steps))}
    return {**rows[-1], **seconds, **more, "floor_s": floors[rows[-1]["size"]]}


def multiplies(row: dict[str, Any]) -> str:
    """The numbers that an engine's products are made of."""
    if row["engine"] == "sdcpp":
        return "8 bits"
    return "int8" if row.get("compute") == "int8" else str(row["dtype"])


def _memory_seconds(axes: Any, load: Load) -> None:
    """Every engine with the whole model on one machine: peak RAM against seconds per step."""
    for row in peer_rows(load):
        x, y = row["peak_rss_bytes"] / GIB, row["step_s"]
        axes.plot(x, y, "o" if row["engine"] == "zquant" else "s")
        label = f"{row['label']}, {row['size']}, {multiplies(row)}"
        axes.annotate(label, (x, y), fontsize=7, xytext=(4, 4), textcoords="offset points")
    machine = load(PEERS[0])["machine"]
    axes.set(
        xlabel="peak RAM, GiB",
        ylabel="seconds per step",
        yscale="log",
        title=f"measured, {machine['cores']} cores of {machine['cpu']}, {machine['capability']}",
    )


def _quality_size(axes: Any, load: Load) -> None:
    """Error of the demo model's latents against the size of its files."""
    document = load("demo-quality")
    for row in document["qtypes"]:
        if "latent_error_median" not in row:
            continue  # the reference itself
        x, y = row["folder_bytes"] / 1e6, 100 * row["latent_error_median"]
        axes.plot(x, y, "o")
        axes.annotate(row["qtype"], (x, y), fontsize=8)
    axes.set(
        xlabel="MB of the demo model",
        ylabel="median error of the latents, %",
        yscale="log",
        title=f"measured, {document['prompts']} prompts, {document['steps']} steps",
    )


def _timeline(axes: Any, load: Load) -> None:
    """Copies and products of one step of a projected card, by the virtual clock."""
    projection, (model, *_) = load("projection-1024"), load("cpu-ram-512-q4_k_m")["models"]
    card = next(card for card in projection["cards"] if card["name"] == TIMELINE[0])
    row = next(
        row for row in projection["rows"] if (row["card"], row["model"], row["budget"]) == TIMELINE
    )
    n, n_streamed = model["ceilings"]["n_blocks"], row["streamed"]
    n_bytes, block_s = model["ceilings"]["all_blocks_bytes"] // n, row["resident_s"] / n
    disk, link = (1e9 * of[key] for of, key in ((projection, "disk_gb_s"), (card, "link_gb_s")))
    lanes = SimulatedLanes(Clock(), Machine(link_bytes_s=link, disk_bytes_s=disk))
    streamed = spread(n, n_streamed)
    uses = [Use(n_bytes if i in streamed else None, block_s) for i in range(n)]
    blocks = [SimulatedBlock(str(i), n_bytes) for i in range(n_streamed)]
    shape = StreamShape(n_slots=2, n_ring=0, kept=frozenset(range(n_streamed)))
    stream = BlockStream(blocks, shape, lanes)
    forward(stream, lanes, uses)  # reads the file
    began = lanes.clock
    forward(stream, lanes, uses)
    stream.close()
    rows = {"copy": 0, "compute": 1}
    for span in lanes.spans:
        if span.lane in rows and span.end > began:
            color = "tab:blue" if span.lane == "copy" else "tab:orange"
            axes.barh(
                rows[span.lane], span.end - span.start, left=span.start - began, color=color, ec="w"
            )
    axes.set(
        yticks=list(rows.values()),
        yticklabels=list(rows),
        xlabel="seconds of the second step",
        title=f"PROJECTED: {TIMELINE[0]}, 1024x1024, Q4_K_M within 2 GiB",
    )
