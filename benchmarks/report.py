"""Tables and plots from the files in `benchmarks/results`; the tables of the README are made here.

    python benchmarks/report.py            print every table
    python benchmarks/report.py --write    put them into README.md, between their marks
    python benchmarks/report.py --check    exit code 1 if README.md has another text
    python benchmarks/report.py --plots DIR    PNGs (needs matplotlib: pip install zquant[report])

A table stands between `<!-- table NAME -->` and `<!-- end of table -->`. No number is written by
hand. Measured and projected figures are never in one table or plot.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from report_plots import peer_rows, plot_all

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
README = ROOT / "README.md"
MARKS = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
GIB = 2**30
END_TO_END = (  # the newer file wins where two have the same figure
    *("cpu-full-256", "cpu-full-512", "cpu-full-512-q4_k_m"),
    *("cpu-full-convert-q8_0", "cpu-full-convert-q4_k_m"),
)
STREAMS = {
    "gaussian": "Gaussian",
    "heavy": "heavy tails (Student's t, 4)",
    "outliers": "8 channels 40 times as large",
}
PROJECTED = (  # columns of the table: edge, model, budget
    (1024, "Q4_K_M", "2GiB"),
    (1024, "Q8_0", "4GiB"),
    (512, "Q4_K_M", "2GiB"),
    (512, "Q4_K_M", "4GiB"),
)
HIDDEN = 0.005  # less than this share of a step is none


def load(name: str) -> dict[str, Any]:
    """A result file."""
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines) + "\n"


def measured() -> str:
    """Size, conversion and steps of the whole model on a CPU, one column per policy."""
    converted: dict[str, dict[str, Any]] = {}
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for name in END_TO_END:
        document = load(name)
        converted |= {row["qtype"]: row for row in document["convert"]}
        runs |= {(row["qtype"], row["size"]): row for row in document["run"]}
    qtypes = list(converted)

    def size(qtype: str) -> str:
        files = converted[qtype]["files"]
        return (
            " + ".join(f"{files[f]['bytes'] / GIB:.1f}" for f in ("dit", "text_encoder")) + " GiB"
        )

    def conversion(qtype: str) -> str:
        row = converted[qtype]
        return f"{row['wall_s']:.0f} s, peak RAM {row['peak_rss_bytes'] / GIB:.1f} GiB"

    def step(qtype: str, edge: int) -> str:
        row = runs[qtype, edge]
        return f"{row['step_s']:.0f} s, peak RAM {row['peak_rss_bytes'] / GIB:.1f} GiB"

    rows = [
        ["DiT + text encoder", *map(size, qtypes)],
        ["convert the 20.5 GB BF16 checkpoint", *map(conversion, qtypes)],
        *([f"{e}x{e}, one step", *(step(q, e) for q in qtypes)] for e in (256, 512)),
    ]
    return markdown(["", *qtypes], rows)


def peers() -> str:
    """The same picture by several engines on one machine; who was absent is not listed."""
    rows = [(row["size"], row["step_s"], row) for row in peer_rows(load)]
    return markdown(
        ["", "computes in", "one step", "peak RAM", "error of the latents"],
        [
            [
                f"{size}x{size}, {row['label']}",
                row["dtype"],
                f"{step_s:.0f} s",
                f"{row['peak_rss_bytes'] / GIB:.1f} GiB",
                f"{100 * row['latents_error']:.2f} %",
            ]
            for size, step_s, row in sorted(rows, key=lambda each: each[:2])
        ],
    )


def int8_blocks() -> str:
    """What int8 costs in one block of the true width."""
    errors = {
        (row["stream"], row["mode"]): row["error"]
        for row in load("fidelity-blocks")["rows"]
        if row["qtype"] == "Q4_K"
    }
    modes = ("int8", "int8, not rotated", "int8 + int8 attention")
    rows = [
        [title, *(f"{100 * errors[stream, mode]:.1f} %" for mode in modes)]
        for stream, title in STREAMS.items()
    ]
    return markdown(["input", "int8", "without rotation", "and int8 attention"], rows)


def int8_demo() -> str:
    """What int8 costs in pictures of the demo model."""
    document = load("fidelity-demo")
    n, rows = document["settings"]["prompts"], {}
    for row in document["rows"]:
        rows[row["qtype"], row["mode"]] = row

    def cell(row: Mapping[str, Any], *, full: bool = False) -> str:
        right = f"{round(n * row['right'])}"
        psnr = f"{row['latent_psnr_db_mean']:.1f} dB ({row['latent_psnr_db_lowest']:.1f})"
        error = f", error {100 * row['latent_error_median']:.2f} %" if full else ""
        return f"{right} of {n}, {psnr}{error}"

    table = [
        [
            qtype,
            cell(rows[qtype, "int8"], full=True),
            cell(rows[qtype, "int8, not rotated"]),
            cell(rows[qtype, "int8 + int8 attention"]),
        ]
        for qtype in document["settings"]["qtypes"]
    ]
    return markdown(
        ["weights", "int8: right, latents", "without rotation", "int8 attention"], table
    )


def projected() -> str:
    """Seconds per step on cards that nobody ran."""
    rows = {}
    for edge in (1024, 512):
        for row in load(f"projection-{edge}")["rows"]:
            model = row["model"].removeprefix("dit-").removesuffix(".gguf")
            rows[row["card"], edge, model, row["budget"]] = row

    def cell(row: Mapping[str, Any]) -> str:
        if "refused" in row:
            return "does not fit"
        cost = row["step_s"] / row["resident_s"] - 1
        return f"{row['step_s']:.2f} s, {f'+{100 * cost:.0f} %' if cost > HIDDEN else 'hidden'}"

    head = ["projected"]
    head += [f"{e}x{e}, {model}, {b.replace('GiB', ' GiB')}" for e, model, b in PROJECTED]
    cards = dict.fromkeys(card for card, *_ in rows)
    return markdown(head, [[c, *(cell(rows[(c, *key)]) for key in PROJECTED)] for c in cards])


def importance() -> str:
    """What importance does to the output of linears, mean over the matrices of a type."""
    rows = [
        [
            row["qtype"],
            str(row["n"]),
            *(f"{100 * row[way]:.2f} %" for way in ("without", "with")),
        ]
        for row in load("importance-demo")["linears"]
        if row["kind"] == "all"
    ]
    return markdown(["", "matrices", "plain", "with --imatrix"], rows)


def target_size() -> str:
    """The same bytes by a policy and by the solver."""
    rows = {}
    models = {"demo": "demo model", "wide": "random toy"}
    for model in models:
        for row in load(f"target-size-{model}")["rows"]:
            solved = row["how"] == "target size"
            rows[model, row["imatrix"], row["like"], solved] = row["latent_error_rms"]

    def cell(model: str, imatrix: bool, like: str) -> str:
        policy, solved = (rows[model, imatrix, like, which] for which in (False, True))
        return f"{100 * policy:.2f} -> {100 * solved:.2f} %"

    columns = [(model, imatrix) for model in models for imatrix in (False, True)]
    head = [f"{models[model]}{', --imatrix' if imatrix else ''}" for model, imatrix in columns]
    likes = dict.fromkeys(like for *_, like, _ in rows)
    table = [[like, *(cell(*column, like) for column in columns)] for like in likes]
    return markdown(["bytes of", *head], table)


TABLES: dict[str, Callable[[], str]] = {
    "measured": measured,
    "peers": peers,
    "int8-blocks": int8_blocks,
    "int8-demo": int8_demo,
    "projected": projected,
    "importance": importance,
    "target-size": target_size,
}


def with_tables(text: str) -> str:
    """`text` with every marked table as the results have it now."""
    return MARKS.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[3]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Print, write, check or plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into README.md")
    parser.add_argument("--check", action="store_true", help="that README.md is up to date")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="folder for PNGs")
    args = parser.parse_args(argv)
    text = README.read_text(encoding="utf-8")
    if args.write:
        README.write_text(with_tables(text), encoding="utf-8")
    elif args.check:
        if with_tables(text) != text:
            print("README.md is not what the results say: python benchmarks/report.py --write")
            return 1
    elif args.plots:
        for path in plot_all(args.plots, load):
            print(path)
    else:
        for name, table in TABLES.items():
            print(f"{name}\n\n{table()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
