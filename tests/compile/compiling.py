"""Compile kernels for a GPU that is not there, and read from the machine code what they need.

A case compiles as its wrapper would launch it, but for a named architecture; that takes Triton,
its ptxas and its two NVIDIA readers, no driver. The matrix is compiled by several processes.

Disassembling costs half a second before the first instruction, so the code of one architecture is
put together and disassembled at once.
"""

import importlib
import inspect
import os
import pkgutil
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import zquant_kernels
from zquant_kernels import runtime
from zquant_kernels.runtime import CompileCase

__all__ = [
    "ARCHITECTURES",
    "OLDEST_ARCHITECTURES",
    "Figures",
    "Launch",
    "compile_case",
    "compile_matrix",
    "find_modules",
    "launches",
    "name_cases",
    "nvidia_tool",
    "problems",
    "why_not",
]

ARCHITECTURES = (75, 80, 86, 89, 90, 120)
OLDEST_ARCHITECTURES = (75, 90)  # with the oldest Triton, the least and the most capable code
# what one program may have, in KiB: the "maximum per thread block" of NVIDIA's programming guide
SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
REGISTERS_PER_THREAD = 255
REGISTERS_PER_PROGRAM = 65536
REGISTER_UNIT = 8  # a thread's registers are allocated in these
INSTRUCTION_BYTES = 16
MAX_WORKERS = 8  # each holds torch, Triton and LLVM: half a GiB
NVIDIA_TOOLS = ("cuobjdump", "nvdisasm", "ptxas")

Launch = tuple[str, int]  # a case's name and an architecture

# `/*0120*/  @!P0 IMMA.16832.S8.S8 R4, ...`
MMA = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z0-9]*MMA)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What the machine code of one case needs.

    Attributes:
        registers: per thread.
        local_bytes: stack and local memory per thread, where spilled registers go.
        shared_bytes: per program.
        n_warps: per program.
        n_instructions: size of the code, padding included.
        mma: matrix opcode -> how many are in the code, `{"IMMA": 64}`.
    """

    registers: int
    local_bytes: int
    shared_bytes: int
    n_warps: int
    n_instructions: int
    mma: dict[str, int] = field(default_factory=dict)


def why_not() -> str:
    """Why nothing can be compiled here; empty when it can."""
    if runtime.REASON:
        return runtime.REASON
    if runtime.INTERPRETED:
        return "TRITON_INTERPRET=1 replaces the compiler"
    missing = [name for name in NVIDIA_TOOLS if not nvidia_tool(name).exists()]
    return f"this Triton comes without {', '.join(missing)}" if missing else ""


def nvidia_tool(name: str) -> Path:
    """Where Triton keeps a program of NVIDIA's."""
    return Path(runtime.triton.__file__).parent / "backends/nvidia/bin" / name


def find_modules() -> list[ModuleType]:
    """Every module of zquant_kernels that has compile cases."""
    found = pkgutil.iter_modules(zquant_kernels.__path__, "zquant_kernels.")
    modules = [importlib.import_module(name) for name in sorted(module.name for module in found)]
    return [module for module in modules if hasattr(module, "COMPILE_CASES")]


def name_cases(modules: Iterable[ModuleType]) -> dict[str, CompileCase]:
    """Name -> case: module, kernel, and whatever distinguishes the kernel's cases."""
    named: dict[str, CompileCase] = {}
    for module in modules:
        by_kernel: dict[str, list[CompileCase]] = {}
        for case in module.COMPILE_CASES:
            by_kernel.setdefault(_python(case.kernel).__name__, []).append(case)
        for kernel, cases in by_kernel.items():
            start = f"{module.__name__.split('.')[-1]}-{kernel}"
            for case, ending in zip(cases, _differences(cases), strict=True):
                name = "-".join((start, *ending))
                if name in named:
                    raise ValueError(f"{module.__name__}.COMPILE_CASES has {name} twice")
                named[name] = case
    return named


def _differences(cases: Sequence[CompileCase]) -> list[list[str]]:
    """Per case, `BM=128` for every property that tells cases apart that no earlier one did."""
    rows = [_properties(case) for case in cases]
    endings: list[list[str]] = [[] for _ in cases]
    for name in dict.fromkeys(name for row in rows for name in row):
        longer = [[*e, f"{name}={row.get(name)}"] for e, row in zip(endings, rows, strict=True)]
        if len(set(map(tuple, longer))) > len(set(map(tuple, endings))):
            endings = longer
    return endings


def _properties(case: CompileCase) -> dict[str, str]:
    types = {name: type_.removeprefix("*") for name, type_ in case.types.items()}
    constants = {name: _spell(value) for name, value in case.constants.items()}
    options = {name: _spell(value) for name, value in case.options.items()}
    rest = {"aligned": "+".join(case.aligned), "min_arch": str(case.min_arch)}
    return {**types, **constants, **options, **rest}


def _spell(value: Any) -> str:
    """A constant in words: functions of other kernel files by their module."""
    if inspect.isfunction(function := _python(value)):
        return f"{function.__module__.split('.')[-1]}.{function.__name__}"
    return str(int(value) if isinstance(value, bool) else value)


def _python(value: Any) -> Any:
    """The function below `triton.jit`, which may be the compiler's, the interpreter's or none."""
    return getattr(value, "fn", value)


def launches(cases: dict[str, CompileCase]) -> list[Launch]:
    """Every case on every architecture from its oldest."""
    return [
        (name, arch)
        for name, case in cases.items()
        for arch in ARCHITECTURES
        if arch >= case.min_arch
    ]


def problems(case: CompileCase, arch: int, figures: Figures) -> list[str]:
    """Why the case is not fit for the architecture, in words; empty when it is."""
    found = []
    if figures.local_bytes:
        found.append(f"spills: {figures.local_bytes} bytes of stack and local memory per thread")
    if case.matmul and not figures.mma:
        found.append("has no matrix instruction")
    if figures.registers > REGISTERS_PER_THREAD:
        found.append(f"{figures.registers} registers per thread, of {REGISTERS_PER_THREAD}")
    per_thread = -(-figures.registers // REGISTER_UNIT) * REGISTER_UNIT
    if (total := per_thread * 32 * figures.n_warps) > REGISTERS_PER_PROGRAM:
        found.append(f"{total} registers per program, of {REGISTERS_PER_PROGRAM}")
    if figures.shared_bytes > SHARED_KIB[arch] * 1024:
        shared_kib = figures.shared_bytes / 1024
        found.append(f"{shared_kib:g} KiB of shared memory per program, of {SHARED_KIB[arch]}")
    return found


def compile_case(case: CompileCase, arch: int) -> Figures:
    """Compile one case here and now."""
    figures, code = _build(case, arch)
    return replace(figures, mma=_count_mma(arch, [code])[0])


def compile_matrix(wanted: Iterable[Launch]) -> dict[Launch, Figures | str]:
    """Compile cases of zquant_kernels for architectures, on all processors.

    Args:
        wanted: names of `name_cases(find_modules())`, and architectures.

    Returns:
        `(name, architecture)` -> figures, or the message of the compiler that refused it.
    """
    cases = name_cases(find_modules())
    # slow ones first, or the last one would keep a single processor busy at the end
    order = sorted(wanted, key=lambda launch: not cases[launch[0]].matmul)
    results: dict[Launch, Figures | str] = {}
    built: dict[int, list[tuple[Launch, Figures, bytes]]] = {}
    with _workers() as pool:
        try:
            for launch, answer in zip(order, pool.map(_build_named, order), strict=True):
                if isinstance(answer, str):
                    results[launch] = answer
                else:
                    built.setdefault(launch[1], []).append((launch, *answer))
        except BrokenProcessPool as error:
            n_answers = len(results) + sum(map(len, built.values()))
            raise RuntimeError(f"the compiler crashed; no answer for {order[n_answers]}") from error
        codes = [[code for _, _, code in of_arch] for of_arch in built.values()]
        for arch, counts in zip(built, pool.map(_count_mma, built, codes), strict=True):
            for (launch, figures, _), mma in zip(built[arch], counts, strict=True):
                results[launch] = replace(figures, mma=mma)
    return results


@contextmanager
def _workers() -> Iterator[ProcessPoolExecutor]:
    """Processes that compile, with a Triton cache of their own: nothing stale is found in it."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(
            min(len(os.sched_getaffinity(0)), MAX_WORKERS),
            # a fork would copy whatever threads and locks the test session has
            mp_context=get_context("spawn"),
            initializer=_set_cache,
            initargs=(folder,),
        ) as pool,
    ):
        yield pool


def _set_cache(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder
    # a tenth of the time, and no instruction depends on it
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"


@cache
def _cases() -> dict[str, CompileCase]:
    return name_cases(find_modules())


def _build_named(launch: Launch) -> tuple[Figures, bytes] | str:
    """`_build` in a worker, which knows the cases by name: kernels cannot be sent to it."""
    name, arch = launch
    try:
        return _build(_cases()[name], arch)
    # whatever a compiler raises is reported with the case that it belongs to
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _build(case: CompileCase, arch: int) -> tuple[Figures, bytes]:
    """Figures without matrix instructions, and the machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _check(case)
    names = case.kernel.arg_names
    source = ASTSource(
        fn=case.kernel,
        signature={n: "constexpr" if n in case.constants else case.types[n] for n in names},
        constexprs=case.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    # said explicitly, because Triton's default changes between versions
    options = {"enable_fp_fusion": True, **case.options}
    kernel = runtime.triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, code = _usage(kernel.asm["cubin"]), _code(kernel.asm["cubin"])
    figures = Figures(
        registers=usage["REG"],
        local_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        n_warps=kernel.metadata.num_warps,
        n_instructions=len(code) // INSTRUCTION_BYTES,
    )
    return figures, code


def _check(case: CompileCase) -> None:
    """Raise ValueError for a case that no launch can be."""
    from triton.backends.nvidia.compiler import CUDAOptions

    given, wanted = [*case.types, *case.constants], case.kernel.arg_names
    if sorted(given) != sorted(wanted):
        raise ValueError(f"the kernel has arguments {sorted(wanted)}; the case has {sorted(given)}")
    constexprs = {param.name for param in case.kernel.params if param.is_constexpr}
    # Triton makes a constant of every integer that is 1
    if missing := constexprs - set(case.constants):
        raise ValueError(f"{sorted(missing)} are tl.constexpr and must be constants")
    if other := set(case.aligned) - set(case.types):
        raise ValueError(f"aligned has {sorted(other)}, which have no type")
    # compile() ignores an option that it does not know; a launch would refuse it
    if unknown := set(case.options) - set(CUDAOptions.__dataclass_fields__):
        raise ValueError(f"Triton has no option {sorted(unknown)}")


def _usage(cubin: bytes) -> dict[str, int]:
    """What the driver will allocate: REG, STACK, LOCAL and more."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        text = _run("cuobjdump", "--dump-resource-usage", file)
    usage = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)
    if sorted(name for name, _ in usage) != ["LOCAL", "REG", "STACK"]:
        raise ValueError(f"cuobjdump described not one kernel but this: {text}")
    return {name: int(value) for name, value in usage}


def _code(cubin: bytes) -> bytes:
    """The instructions in an ELF file: its sections `.text.*`."""
    (sections_at,) = struct.unpack_from("<Q", cubin, 40)
    entry_bytes, n_sections, names_index = struct.unpack_from("<HHH", cubin, 58)
    sections = []  # name's offset, file offset, bytes
    for i in range(n_sections):
        header = struct.unpack_from("<IIQQQQ", cubin, sections_at + i * entry_bytes)
        sections.append((header[0], header[4], header[5]))
    names_at = sections[names_index][1]
    texts = [
        cubin[at : at + n_bytes]
        for name, at, n_bytes in sections
        if cubin.startswith(b".text.", names_at + name)
    ]
    if not any(texts):
        raise ValueError("a cubin without code")
    return b"".join(texts)


def _count_mma(arch: int, codes: Sequence[bytes]) -> list[dict[str, int]]:
    """The matrix instructions of every one of `codes`, disassembled together."""
    from triton.backends.nvidia.compiler import sm_arch_from_capability

    owner = [i for i, code in enumerate(codes) for _ in range(len(code) // INSTRUCTION_BYTES)]
    counts: list[Counter[str]] = [Counter() for _ in codes]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "code")
        file.write_bytes(b"".join(codes))
        machine = sm_arch_from_capability(arch).replace("sm_", "SM")
        text = _run("nvdisasm", "--binary", machine, file)
    for offset, opcode in MMA.findall(text):
        counts[owner[int(offset, 16) // INSTRUCTION_BYTES]][opcode] += 1
    return [dict(sorted(count.items())) for count in counts]


def _run(tool: str, *arguments: str | Path) -> str:
    command = [nvidia_tool(tool), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr or done.stdout}")
    return done.stdout
