"""Every case that the engine can launch compiles for every architecture and fits it; no GPU needed.

`RESOURCES.md` has the figures of all of them with one version of Triton. With that version nothing
may get worse than the table; with any other only what a GPU refuses, and spills, are errors.
"""

import importlib
import pkgutil
from types import ModuleType

import pytest
import zquant_kernels
from compiling import Figures, find_modules, launches, name_cases, problems, why_not
from kernel_resources import TABLE, read_table, worse
from zquant_kernels import runtime

CASES = name_cases(find_modules())
LAUNCHES = launches(CASES)  # (case, architecture)
TRITON, CELLS = read_table(TABLE.read_text(encoding="utf-8"))

needs_compiler = pytest.mark.skipif(bool(why_not()), reason=why_not())
every_launch = pytest.mark.parametrize(
    "launch", LAUNCHES, ids=[f"{name}-sm_{arch}" for name, arch in LAUNCHES]
)


def figures_of(compiled: dict, launch: tuple[str, int]) -> Figures:
    if isinstance(figures := compiled[launch], str):
        pytest.fail(figures)
    return figures


def used_by(function) -> list:
    """Triton functions named in the body of one, directly or as `module.function`."""
    code, names = function.fn.__code__, function.fn.__globals__
    values = [names.get(name) for name in code.co_names]
    modules = [value for value in values if isinstance(value, ModuleType)]
    values += [vars(module).get(name) for module in modules for name in code.co_names]
    return [value for value in values if isinstance(value, runtime.triton.JITFunction)]


@needs_compiler
def test_every_triton_function_is_part_of_a_case():
    compiled = set()
    left = [case.kernel for case in CASES.values()]
    left += [v for c in CASES.values() for v in c.constants.values() if hasattr(v, "fn")]
    while left:
        if (function := left.pop()).fn not in compiled:
            compiled.add(function.fn)
            left += used_by(function)
    modules = [
        importlib.import_module(f"zquant_kernels.{found.name}")
        for found in pkgutil.iter_modules(zquant_kernels.__path__)
    ]
    ours = {
        value.fn
        for module in modules
        for value in vars(module).values()
        if isinstance(value, runtime.triton.JITFunction)
    }
    assert ours
    assert {f"{f.__module__}.{f.__name__}" for f in ours - compiled} == set()


def test_oldest_triton_is_the_one_that_was_asked_for(request):
    if not request.config.getoption("oldest_triton", default=False):
        pytest.skip("run without --oldest-triton")
    assert why_not() == ""
    assert tuple(map(int, runtime.triton.__version__.split(".")[:2])) == runtime.MIN_TRITON


@needs_compiler
@every_launch
def test_compiles_and_fits(compiled, launch):
    name, arch = launch
    assert problems(CASES[name], arch, figures_of(compiled, launch)) == []


def test_the_table_has_every_case_and_no_other():
    assert list(CELLS) == LAUNCHES, "run tools/kernel_resources.py"


@needs_compiler
@pytest.mark.skipif(
    not why_not() and runtime.triton.__version__ != TRITON, reason=f"the table is Triton {TRITON}'s"
)
@every_launch
def test_needs_no_more_than_the_table_says(compiled, launch):
    assert launch in CELLS, "run tools/kernel_resources.py"
    assert worse(figures_of(compiled, launch), CELLS[launch]) == []
