"""Every case that the engine can launch compiles for every architecture; no GPU is needed."""

import importlib
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest
import zquant_kernels
from zquant_kernels import runtime

pytestmark = pytest.mark.skipif(
    bool(runtime.REASON) or runtime.INTERPRETED,
    reason=runtime.REASON or "TRITON_INTERPRET=1 replaces the compiler",
)

ARCHITECTURES = [75, 80, 86, 89, 90, 100, 120]
MODULES = [
    module
    for found in pkgutil.iter_modules(zquant_kernels.__path__, "zquant_kernels.")
    if hasattr(module := importlib.import_module(found.name), "COMPILE_CASES")
]
CASES = [
    pytest.param(module.kernel, *case, id=f"{module.__name__.split('.')[1]}-{at}")
    for module in MODULES
    for at, case in enumerate(module.COMPILE_CASES)
]


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def compile_for(kernel, arch, types, constants):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    # said explicitly, because Triton's default changes between versions
    options = {"enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def local_bytes(cubin: bytes, folder: Path) -> int:
    """Stack and local memory of the kernel, which is where spilled registers go."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():  # the Windows wheels come without it
        return 0
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [tool, "--dump-resource-usage", file]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage)
    assert len(found) == 2, usage
    return sum(map(int, found))


def test_there_are_cases():
    assert CASES


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize(("kernel", "types", "constants"), CASES)
def test_compiles_without_spills(kernel, types, constants, arch, tmp_path):
    assert set(types) | set(constants) == set(kernel.arg_names)
    cubin = compile_for(kernel, arch, types, constants).asm["cubin"]
    assert cubin.startswith(b"\x7fELF")
    assert local_bytes(cubin, tmp_path) == 0
