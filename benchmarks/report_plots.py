"""Plots of result files: memory against seconds, quality against size, a timeline of a stream."""

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
    *(f"cpu-peers-256-{run}" for run in (1, 2, 3, 4, 5, "bf16")),
    *(f"cpu-peers-512-{run}" for run in (1, 2, "bf16")),
)
# this plan filled the RAM with expanded blocks, as none does since: 26.6 s a step, 20.1 GiB
NO_LONGER = ("cpu-peers-256-1", "zquant Q4_K_M")
SIZE = (7, 4.5)  # inches
N_BLOCKS, N_STREAMED = 32, 27  # of the timeline: 2 GiB and Q4_K_M at 1024x1024 on an RTX 3060
BLOCK_BYTES, BLOCK_S, LINK_BYTES_S = 115 * 2**20, 1.25 / 32, 12e9


def plot_all(folder: Path, load: Load) -> Iterator[Path]:
    """Write every plot into `folder`; yields their paths.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("plots need matplotlib: pip install zquant[report]") from error
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

    The time of a step is that of the quickest run, the rest that of the last: other programs ran
    beside some, which costs time and no memory.
    """
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for name in PEERS:
        for row in load(name)["rows"]:
            ran = row["engine"] != "reference" and row["status"] == "ok"
            if ran and (name, row["label"]) != NO_LONGER:
                found.setdefault((row["label"], row["size"], multiplies(row)), []).append(row)
    return [
        {**rows[-1], "step_s": min(row["step_s"] for row in rows), "n_runs": len(rows)}
        for rows in found.values()
    ]


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


def _timeline(axes: Any, load: Load) -> None:  # noqa: ARG001 # one signature for all
    """Copies and products of one step, by the virtual clock."""
    lanes = SimulatedLanes(Clock(), Machine(link_bytes_s=LINK_BYTES_S, disk_bytes_s=2e9))
    streamed = spread(N_BLOCKS, N_STREAMED)
    uses = [Use(BLOCK_BYTES if i in streamed else None, BLOCK_S) for i in range(N_BLOCKS)]
    blocks = [SimulatedBlock(str(i), BLOCK_BYTES) for i in range(N_STREAMED)]
    shape = StreamShape(n_slots=2, n_ring=0, kept=frozenset(range(N_STREAMED)))
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
        title="PROJECTED: RTX 3060 on PCIe 3, 1024x1024, Q4_K_M within 2 GiB",
    )
