"""Write the table of what every Triton kernel needs on every architecture.

    python tools/kernel_resources.py [--check]

Compiles every case (minutes, no GPU) and writes kernels/zquant_kernels/RESOURCES.md; `--check` only
says whether it is up to date. Run it with the newest Triton, in an environment in which zquant is
installed editable, and commit the table with the kernel. `tests/compile` allows a figure to be
worse than its row by the slack below: what is more should be seen in a review.
"""

import argparse
import difflib
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/compile"))

import zquant_kernels
from compiling import (
    ARCHITECTURES,
    Figures,
    compile_matrix,
    find_modules,
    launches,
    name_cases,
    problems,
    why_not,
)
from zquant_kernels import runtime

__all__ = ["TABLE", "Row", "read_table", "worse", "write_table"]

ROOT = Path(__file__).parents[1]
TABLE = Path(zquant_kernels.__file__).with_name("RESOURCES.md")
SLACK_REGISTERS = 8  # or a tenth, if that is more
SLACK_SHARED_KIB = 1
NOT_LAUNCHED = "-"
HEAD = """# What the kernels need

Per case and architecture: registers per thread / KiB of shared memory per program / matrix
instructions in the code. No case spills registers; "{not_launched}" is never launched.

{versions}.
Written by `python tools/kernel_resources.py`. With this Triton `tests/compile` fails where a kernel
gets worse than its row.

| case | {architectures} |
|---|{rule}|
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One cell of the table: a case on an architecture."""

    registers: int
    shared_kib: float
    n_mma: int

    def __str__(self) -> str:
        return f"{self.registers}/{round(self.shared_kib, 2):g}/{self.n_mma}"


def cell_of(figures: Figures) -> Row:
    """What of the figures is in the table."""
    return Row(
        registers=figures.registers,
        shared_kib=figures.shared_bytes / 1024,
        n_mma=sum(figures.mma.values()),
    )


def write_table(compiled: dict[tuple[str, int], Figures], versions: str) -> str:
    """The text of RESOURCES.md; rows in the order of `compiled`."""
    lines = [
        HEAD.format(
            not_launched=NOT_LAUNCHED,
            versions=versions,
            architectures=" | ".join(f"sm_{arch}" for arch in ARCHITECTURES),
            rule="|".join("--:" for _ in ARCHITECTURES),
        )
    ]
    for name in dict.fromkeys(name for name, _ in compiled):
        figures = [compiled.get((name, arch)) for arch in ARCHITECTURES]
        cells = [NOT_LAUNCHED if f is None else str(cell_of(f)) for f in figures]
        lines.append(f"| {name} | {' | '.join(cells)} |\n")
    return "".join(lines)


def read_table(text: str) -> tuple[str, dict[tuple[str, int], Row]]:
    """The version of Triton, and `(case, architecture)` -> cell, in their order."""
    (triton,) = re.findall(r"^Triton ([^;]+);", text, re.MULTILINE)
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    cells = {}
    for name, *values in rows:
        for arch, value in zip(head[1:], values, strict=True):
            if value != NOT_LAUNCHED:
                registers, shared_kib, n_mma = value.split("/")
                cells[name, int(arch.removeprefix("sm_"))] = Row(
                    registers=int(registers), shared_kib=float(shared_kib), n_mma=int(n_mma)
                )
    return triton, cells


def worse(figures: Figures, row: Row) -> list[str]:
    """In words, by what the figures are worse than the table; empty when they are not."""
    found = []
    now = cell_of(figures)
    if now.registers > row.registers + max(SLACK_REGISTERS, row.registers // 10):
        found.append(f"{now.registers} registers per thread; the table has {row.registers}")
    if now.shared_kib > row.shared_kib + SLACK_SHARED_KIB:
        found.append(f"{now.shared_kib:g} KiB of shared memory; the table has {row.shared_kib:g}")
    if now.n_mma < row.n_mma:
        found.append(f"{now.n_mma} matrix instructions; the table has {row.n_mma}")
    return found


def versions() -> str:
    """`Triton 3.9.0; ptxas 12.9.86 for sm_75 to sm_89, ...`."""
    from triton.backends.nvidia.compiler import get_ptxas_version

    by_ptxas: dict[str, list[int]] = {}
    for arch in ARCHITECTURES:
        (version,) = re.findall(r"\bV(\d[\d.]+)", get_ptxas_version(arch))
        by_ptxas.setdefault(version, []).append(arch)
    parts = [f"{v} for sm_{archs[0]} to sm_{archs[-1]}" for v, archs in by_ptxas.items()]
    return f"Triton {runtime.triton.__version__}; ptxas {', '.join(parts)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile everything, then write or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare and write nothing")
    check = parser.parse_args(arguments).check
    if not TABLE.is_relative_to(ROOT / "kernels"):
        parser.error(f"zquant_kernels is {TABLE.parent}; needs this checkout installed editable")
    if reason := why_not():
        parser.error(f"nothing can be compiled: {reason}")
    cases = name_cases(find_modules())
    wanted = launches(cases)
    start = time.perf_counter()
    compiled = compile_matrix(wanted)
    elapsed_s = time.perf_counter() - start
    print(f"compiled {len(cases)} cases, {len(wanted)} in all, in {elapsed_s:.0f} s")
    fit: dict[tuple[str, int], Figures] = {}
    for name, arch in wanted:
        figures = compiled[name, arch]
        found = [figures] if isinstance(figures, str) else problems(cases[name], arch, figures)
        for problem in found:
            print(f"{name} sm_{arch}: {problem}", file=sys.stderr)
        if not found and isinstance(figures, Figures):
            fit[name, arch] = figures
    if len(fit) < len(wanted):
        return 1
    text = write_table(fit, versions())
    if not check:
        TABLE.write_text(text, encoding="utf-8")
        print(f"wrote {TABLE.relative_to(ROOT)}")
        return 0
    was = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
    changes = list(difflib.unified_diff(was.splitlines(), text.splitlines(), lineterm="", n=0))
    print("\n".join(changes) if changes else f"{TABLE.relative_to(ROOT)} is up to date")
    return int(bool(changes))


if __name__ == "__main__":
    sys.exit(main())
