"""What must be rejected is rejected: tiny kernels that spill or multiply without matrix units."""

from dataclasses import replace
from types import SimpleNamespace

import compiling
import pytest
from compiling import Figures, compile_case, launches, name_cases, problems, why_not
from kernel_resources import Row, read_table, worse, write_table
from zquant_kernels import runtime
from zquant_kernels.runtime import CompileCase, tl, triton

needs_compiler = pytest.mark.skipif(bool(why_not()), reason=why_not())
FINE = Figures(registers=64, local_bytes=0, shared_bytes=1024, n_warps=4, n_instructions=800)
POINTERS = {"x": "*fp32", "out": "*fp32"}
SQUARES = {"x": "*fp16", "y": "*fp16", "out": "*fp32"}


@triton.jit
def double(x):
    return x * 2


@triton.jit
def negate(x):
    return -x


@triton.jit
def apply(x, out, FUNCTION: tl.constexpr, TILE: tl.constexpr):
    i = tl.arange(0, TILE)
    tl.store(out + i, FUNCTION(tl.load(x + i)))


@triton.jit
def normalize(x, out, TILE: tl.constexpr):
    i = tl.arange(0, TILE)
    row = tl.load(x + i)
    tl.store(out + i, row / tl.sum(row))


@triton.jit
def multiply(x, y, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


@triton.jit
def multiply_by_sums(x, y, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    products = tl.load(x + at)[:, :, None] * tl.load(y + at)[None, :, :]
    tl.store(out + at, tl.sum(products.to(tl.float32), axis=1))


APPLY = CompileCase(kernel=apply, types=POINTERS, constants={"FUNCTION": double, "TILE": 1024})
NORMALIZE = CompileCase(
    kernel=normalize, types=POINTERS, constants={"TILE": 1024}, options={"num_warps": 1}
)
MULTIPLY = CompileCase(
    kernel=multiply, types=SQUARES, constants={"SIZE": 64}, aligned=("x", "y", "out"), matmul=True
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def figures_of(case: CompileCase, arch: int) -> Figures:
    """Without matrix instructions, which take longer to find than all else to compile."""
    return compiling._build(case, arch)[0]


@needs_compiler
@pytest.mark.parametrize("arch", [75, 86, 120])
def test_a_kernel_that_spills_is_rejected(arch):
    # 256 float32 values per thread
    spilling = replace(NORMALIZE, constants={"TILE": 8192})
    (found,) = problems(spilling, arch, figures_of(spilling, arch))
    assert found.startswith("spills: ")
    assert problems(NORMALIZE, arch, figures_of(NORMALIZE, arch)) == []


@needs_compiler
@pytest.mark.parametrize("arch", [80, 90])
def test_a_matmul_without_matrix_instructions_is_rejected(arch):
    scalar = replace(MULTIPLY, kernel=multiply_by_sums, constants={"SIZE": 16})
    figures = compile_case(scalar, arch)
    assert problems(scalar, arch, figures) == ["has no matrix instruction"]
    assert problems(replace(scalar, matmul=False), arch, figures) == []


@needs_compiler
@pytest.mark.parametrize(("arch", "opcode"), [(80, "HMMA"), (90, "HGMMA"), (120, "HMMA")])
def test_matrix_instructions_of_every_generation_are_found(arch, opcode):
    figures = compile_case(MULTIPLY, arch)
    assert list(figures.mma) == [opcode]
    assert problems(MULTIPLY, arch, figures) == []


@needs_compiler
def test_triton_multiplies_without_matrix_instructions_on_turing():
    # which is why the wrappers that use tl.dot have min_arch 80
    small = replace(MULTIPLY, constants={"SIZE": 16})
    assert problems(small, 75, compile_case(small, 75)) == ["has no matrix instruction"]


@needs_compiler
@pytest.mark.parametrize("arch", [86, 90])
def test_kernels_disassembled_together_keep_their_own_counts(arch):
    normalize_, multiply_ = (compiling._build(case, arch)[1] for case in (NORMALIZE, MULTIPLY))
    codes = [normalize_, multiply_, normalize_, multiply_]
    (alone,) = compiling._count_mma(arch, [multiply_])
    assert alone
    assert compiling._count_mma(arch, codes) == [{}, alone, {}, alone]


@needs_compiler
def test_alignment_of_a_case_is_used():
    aligned = replace(NORMALIZE, aligned=("x", "out"))
    assert figures_of(aligned, 86).n_instructions < figures_of(NORMALIZE, 86).n_instructions


@needs_compiler
@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, {"enable_fp_fusion": True}), ({"enable_fp_fusion": False}, {"enable_fp_fusion": False})],
)
def test_fusion_of_products_and_sums_is_always_said(monkeypatch, options, expected):
    asked = []
    compile_ = triton.compile
    monkeypatch.setattr(triton, "compile", lambda *a, **k: asked.append(k) or compile_(*a, **k))
    figures_of(replace(APPLY, options=options), 86)
    assert asked[0]["options"] == expected


@needs_compiler
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"types": {"x": "*fp32"}}, "the kernel has arguments"),
        ({"types": {**POINTERS, "TILE": "i32"}, "constants": {"FUNCTION": double}}, "tl.constexpr"),
        ({"aligned": ("y",)}, "aligned has"),
        ({"options": {"num_warp": 4}}, "no option"),
    ],
)
def test_a_case_that_no_launch_can_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        compile_case(replace(APPLY, **change), 86)


@needs_compiler
def test_what_the_compiler_refuses_is_reported_with_its_case(monkeypatch):
    bad = replace(NORMALIZE, constants={"TILE": 1000})
    monkeypatch.setattr(compiling, "_cases", lambda: {"bad": bad})
    assert "power of 2" in compiling._build_named(("bad", 86))


def test_names_tell_what_distinguishes_the_cases_of_a_kernel():
    module = SimpleNamespace(
        __name__="zquant_kernels.example",
        COMPILE_CASES=[
            *(
                replace(APPLY, types={"x": type_, "out": type_}, constants=constants)
                for type_ in ("*fp16", "*fp32")
                for function in (double, negate)
                for constants in [{"FUNCTION": function, "TILE": 64}]
            ),
            NORMALIZE,
        ],
    )
    assert list(name_cases([module])) == [
        "example-apply-x=fp16-FUNCTION=test_compiling.double",
        "example-apply-x=fp16-FUNCTION=test_compiling.negate",
        "example-apply-x=fp32-FUNCTION=test_compiling.double",
        "example-apply-x=fp32-FUNCTION=test_compiling.negate",
        "example-normalize",
    ]
    module.COMPILE_CASES.append(NORMALIZE)
    with pytest.raises(ValueError, match="has example-normalize twice"):
        name_cases([module])


def test_architectures_before_the_oldest_of_a_case_are_left_out():
    assert launches({"a": replace(APPLY, min_arch=90)}) == [("a", 90), ("a", 120)]


@pytest.mark.parametrize(
    ("arch", "change", "expected"),
    [
        (86, {}, None),
        (86, {"registers": 255}, None),
        (86, {"registers": 256}, "256 registers per thread, of 255"),
        (86, {"registers": 129, "n_warps": 16}, "69632 registers per program, of 65536"),
        (86, {"registers": 128, "n_warps": 16}, None),
        (86, {"local_bytes": 4}, "spills: 4 bytes of stack and local memory per thread"),
        (75, {"shared_bytes": 64 * 1024}, None),
        (75, {"shared_bytes": 65 * 1024}, "65 KiB of shared memory per program, of 64"),
        (80, {"shared_bytes": 163 * 1024}, None),
        (86, {"shared_bytes": 100 * 1024}, "100 KiB of shared memory per program, of 99"),
        (120, {"shared_bytes": 100 * 1024}, "100 KiB of shared memory per program, of 99"),
        (90, {"shared_bytes": 228 * 1024}, "228 KiB of shared memory per program, of 227"),
    ],
)
def test_limits_of_the_architectures(arch, change, expected):
    assert problems(APPLY, arch, replace(FINE, **change)) == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"registers": 72, "shared_bytes": 2048}, None),
        ({"registers": 32, "shared_bytes": 0, "mma": {"IMMA": 32, "HMMA": 1}}, None),
        ({"registers": 73}, "73 registers per thread; the table has 64"),
        ({"shared_bytes": 2049}, "2.00098 KiB of shared memory; the table has 1"),
        ({"mma": {"IMMA": 31}}, "31 matrix instructions; the table has 32"),
    ],
)
def test_figures_are_limited_by_the_table(change, expected):
    row = Row(registers=64, shared_kib=1.0, n_mma=32)
    figures = replace(FINE, **{"mma": {"IMMA": 32}, **change})
    assert worse(figures, row) == ([expected] if expected else [])


def test_large_kernels_may_grow_by_a_tenth():
    row = Row(registers=200, shared_kib=1.0, n_mma=0)
    assert worse(replace(FINE, registers=220), row) == []
    assert worse(replace(FINE, registers=221), row) != []


def test_the_table_reads_back_what_was_written():
    compiled = {
        ("a-kernel-x=fp16", 75): FINE,
        ("a-kernel-x=fp16", 120): replace(FINE, shared_bytes=16, mma={"IMMA": 8, "HMMA": 4}),
        ("b-kernel", 90): replace(FINE, shared_bytes=100608),
    }
    triton_version, cells = read_table(write_table(compiled, "Triton 3.9.0; ptxas 12.9.86"))
    assert triton_version == "3.9.0"
    assert cells == {
        ("a-kernel-x=fp16", 75): Row(registers=64, shared_kib=1.0, n_mma=0),
        ("a-kernel-x=fp16", 120): Row(registers=64, shared_kib=0.02, n_mma=12),
        ("b-kernel", 90): Row(registers=64, shared_kib=98.25, n_mma=0),
    }


def test_the_reason_for_skipping_is_triton_or_its_tools(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "REASON", "Triton cannot be imported")
    assert why_not() == "Triton cannot be imported"
    monkeypatch.setattr(runtime, "REASON", "")
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setattr(compiling, "nvidia_tool", lambda name: tmp_path / name)
    assert why_not() == "this Triton comes without cuobjdump, nvdisasm, ptxas"
