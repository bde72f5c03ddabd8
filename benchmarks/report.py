"""Tables and plots from the files in `benchmarks/results`; those of the READMEs are made here.

    python benchmarks/report.py            print every table
    python benchmarks/report.py --write    put them into the READMEs, between their marks
    python benchmarks/report.py --check    exit code 1 if a README has another text
    python benchmarks/report.py --plots DIR    PNGs (needs matplotlib: pip install '.[report]')

A table stands between `<!-- table NAME -->` and `<!-- end of table -->`, in README.md or in
benchmarks/README.md. No number is written by hand. Measured and projected figures are never in one
table or plot.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from report_plots import multiplies, peer_rows, plot_all

from zquant.units import format_seconds

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
READMES = (ROOT / "README.md", Path(__file__).parent / "README.md")
MARKS = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
GIB = 2**30
SCHEMAS = {  # that the tables are written for
    *("zquant-bench-1", "zquant-demo-quality-1", "zquant-end-to-end-2", "zquant-fidelity-1"),
    *("zquant-importance-1", "zquant-peers-1", "zquant-projection-1", "zquant-quality-1"),
    *("zquant-streaming-1", "zquant-target-size-1"),
}
CONVERTED = ("cpu-full-q8_0", "cpu-full-q6_k", "cpu-full-q4_k_m")
PICTURES = ("cpu-bench-256-q4_k_m",)
PHASES = {
    "plan_s": "plan",
    "text_encoder_s": "text encoder",
    "first_step_s": "first step",
    "step_s": "every other step",
    "vae_s": "autoencoder",
    "save_s": "save",
    "total_s": "whole picture",
}
CEILINGS = ("cpu-ram-512-q4_k_m", "cpu-ram-512-q8_0")
CONVERTERS = {"zquant": "zquant, everything", "sdcpp": "stable-diffusion.cpp, the DiT"}
OTHER_TYPE = {("sdcpp", "Q4_K_M"): "to q4_K, "}  # it has no policies
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
FULL_ONLY = ("runs", "times the floor", "first step", "whole run")  # not in the main README
HIDDEN = 0.005  # less than this share of a step is none


def load(name: str) -> dict[str, Any]:
    """A result file.

    Raises:
        ValueError: it is of a schema that no table is written for.
    """
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    if document["schema"] not in SCHEMAS:
        raise ValueError(f"{name}.json has the schema {document['schema']!r}; known: {SCHEMAS}")
    return document


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines) + "\n"


def measured() -> str:
    """Size and conversion of the whole model on a CPU, one column per policy."""
    converted = {row["qtype"]: row for name in CONVERTED for row in load(name)["convert"]}

    def size(qtype: str) -> str:
        files = converted[qtype]["files"]
        each = (f"{files[f]['bytes'] / GIB:.1f}" for f in ("dit", "text_encoder"))
        return " + ".join(each) + " GiB"

    rows = [
        ["DiT + text encoder", *map(size, converted)],
        [
            "convert the 20.5 GB BF16 checkpoint",
            *(f"{row['wall_s']:.0f} s, {_ram(row)}" for row in converted.values()),
        ],
    ]
    return markdown(["", *converted], rows)


def phases() -> str:
    """Where the time of a picture goes, by `zquant bench`."""
    columns: list[list[str]] = []
    for document in map(load, PICTURES):
        steps = document["settings"]["steps"]
        for row in document["sizes"]:
            title = f"{row['width']}x{row['height']}, {document['model']['name']}, {steps} steps"
            columns += [[f"{title}, {way}", *_phases(row, way)] for way in ("cold", "warm")]
    names = ["", "start-up", *PHASES.values(), "peak RAM (planned)"]
    head, *rows = zip(names, *columns, strict=True)
    return markdown(head, rows)


def _phases(row: Mapping[str, Any], way: str) -> list[str]:
    """The cells of one picture."""
    seconds = [row[way][name] for name in PHASES]
    step = row[way]["step_s"]
    memory = (row["peaks"]["ram_bytes"], row["predicted"]["ram_bytes"])
    return [
        format_seconds(row["startup_s"]) if way == "cold" else "-",
        *(
            f"{each['median']:.1f} s ({each['min']:.1f} to {each['max']:.1f})"
            if each is step
            else format_seconds(each["median"])
            for each in seconds
        ),
        "{:.1f} GiB ({:.1f})".format(*(n_bytes / GIB for n_bytes in memory)),
    ]


def _ram(row: Mapping[str, Any]) -> str:
    return f"peak RAM {row['peak_rss_bytes'] / GIB:.1f} GiB"


def converters() -> str:
    """The same checkpoint by zquant and by its peers."""
    found: dict[tuple[str, str], Any] = {}
    for name in CONVERTED:
        document = load(name)
        for row in (*document["convert"], *document["peers_convert"]):
            found[row["engine"], row["qtype"]] = row

    def cell(row: Mapping[str, Any]) -> str:
        if "skipped" in row:
            return str(row["skipped"])
        other = OTHER_TYPE.get((row["engine"], row["qtype"]), "")
        return f"{other}{row['wall_s']:.0f} s, {row['mb_s']:.0f} MB/s, {_ram(row)}"

    qtypes = list(dict.fromkeys(qtype for _, qtype in found))
    rows = [[CONVERTERS[e], *(cell(found[e, q]) for q in qtypes)] for e in CONVERTERS]
    return markdown(["", *qtypes], rows)


def peers(*sizes: int, brief: bool = False) -> str:
    """The same picture by several engines on one machine; who was absent is not listed."""
    rows = [row for row in peer_rows(load) if row["size"] in sizes or not sizes]
    rows.sort(key=lambda row: (row["size"], row["step_s"]))
    cells = [_peer(row) for row in rows]
    heads = [name for name in cells[0] if not (brief and name in FULL_ONLY)]
    return markdown(heads, [[row[name] for name in heads] for row in cells])


def _peer(row: Mapping[str, Any]) -> dict[str, str]:
    """A row by the heads of its columns."""
    step, n = f"{row['step_s']:.0f} s", row["n_runs"]
    least, most = row["step_range_s"]
    return {
        "": f"{row['size']}x{row['size']}, {row['label']}",
        "multiplies": multiplies(row),
        "one step (range)": step if n == 1 else f"{step} ({least:.0f} to {most:.0f})",
        "runs": str(n),
        "times the floor": f"{row['step_s'] / row['floor_s']:.2f}",
        "first step": f"{row['first_step_s']:.0f} s",
        "whole run": f"{row['total_s']:.0f} s",
        "peak RAM": f"{row['peak_rss_bytes'] / GIB:.1f} GiB",
        "own": f"{row['peak_private_bytes'] / GIB:.1f} GiB" if "peak_private_bytes" in row else "-",
        "error of the latents": f"{100 * row['latents_error']:.2f} %"
        if "latents_error" in row
        else "-",
        "PSNR": f"{row['psnr_db']:.1f} dB" if "psnr_db" in row else "-",
    }


def ram() -> str:
    """What a ceiling on RAM costs on a CPU."""
    rows = []
    for model in (model for name in CEILINGS for model in load(name)["models"]):
        free, *limited = model["rows"]
        for row in (free, *limited):
            limit = row["budget_bytes"]
            same = row["latents_sha256"] == free["latents_sha256"]
            rows.append(
                [
                    f"{model['model']}, {f'{limit / GIB:.0f} GiB' if limit else 'no ceiling'}",
                    f"{row['planned_ram_bytes'] / GIB:.1f} GiB",
                    f"{row['peak_ram_bytes'] / GIB:.1f} GiB",
                    f"{row['streamed_blocks']} of {model['ceilings']['n_blocks']}",
                    "same" if same else "other",
                ]
            )
    return markdown(["", "planned", "peak RAM", "blocks streamed", "latents"], rows)


def quality() -> str:
    """What storage and int8 cost the demo model."""
    document = load("quality-demo")
    n = document["settings"]["prompts"]
    rows = []
    for row in document["rows"]:
        cells = [f"{row['qtype']}, {row['compute']}", f"{round(n * row['right'])} of {n}"]
        if "latents_error" in row:
            cells.append(f"{100 * row['prompt_embeds_error']:.2f} %")
            cells.append(f"{100 * row['latents_error'][-1]:.2f} %")
            cells.append(f"{row['psnr_db_mean']:.1f} dB ({row['psnr_db_lowest']:.1f})")
            cells.append(f"{row['ssim_mean']:.4f} ({row['ssim_lowest']:.4f})")
        else:
            cells += ["-"] * 4
        rows.append(cells)
    head = ["", "right", "error of the embeddings", "of the latents", "PSNR (lowest)"]
    return markdown([*head, "SSIM (lowest)"], rows)


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
    "phases": phases,
    "converters": converters,
    "peers": peers,
    "peers-256": partial(peers, 256, brief=True),
    "ram": ram,
    "quality": quality,
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
    parser.add_argument("--write", action="store_true", help="into the READMEs")
    parser.add_argument("--check", action="store_true", help="that the READMEs are up to date")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="folder for PNGs")
    args = parser.parse_args(argv)
    if args.write:
        for readme in READMES:
            readme.write_text(with_tables(readme.read_text("utf-8")), "utf-8")
    elif args.check:
        texts = {readme: readme.read_text("utf-8") for readme in READMES}
        stale = [readme for readme, text in texts.items() if with_tables(text) != text]
        for readme in stale:
            print(f"{readme} is not what the results say: python benchmarks/report.py --write")
        return int(bool(stale))
    if args.plots:
        for path in plot_all(args.plots, load):
            print(path)
    elif not args.write:
        for name, table in TABLES.items():
            print(f"{name}\n\n{table()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
