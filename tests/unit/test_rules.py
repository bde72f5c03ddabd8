"""The rules of the house that can be tests: floors, names, sizes, and documents that stay true."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import zquant
from zquant.cli.main import COMMANDS
from zquant.env import VARIABLES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = (ROOT / "zquant", ROOT / "kernels/zquant_kernels")
SOURCES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))

FLOORS = {
    "__main__": 13,
    "cli": 12,
    **dict.fromkeys(["serve", "bench", "calibrate", "verify"], 11),
    **dict.fromkeys(["engine", "convert", "report"], 10),
    "painting": 9,
    **dict.fromkeys(["phases", "settings"], 8),
    **dict.fromkeys(["velocity", "prompts"], 7),
    **dict.fromkeys(["sampling", "memory"], 6),
    "models": 5,
    "layers": 4,
    "formats": 3,
    **dict.fromkeys(["quant", "env"], 2),
    **dict.fromkeys(["units", "image", "request"], 1),
    # every floor raises our errors and may ask for the version
    **dict.fromkeys(["errors", ""], 0),
}
# a list, so that a new package on a kernel's path is noticed
KERNEL_IMPORTS = {"zquant_kernels", "torch", "triton", *sys.stdlib_module_names}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit(name: str) -> str:
    """`zquant.quant.q8_0` -> `quant`; the package itself is the empty name."""
    return [*name.split("."), ""][1]


def imports(path: Path) -> set[str]:
    """Every module that the file imports, inside functions too, but not for types only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # `from zquant import env` names the module env
            below = {f"{node.module}.{a.name}" for a in node.names if node.module == "zquant"}
            found |= below or {str(node.module)}
    return found


def tracked_files() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    assert done.returncode == 0, done.stderr
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def table_rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a README heading, without its two head lines."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    return [[cell.strip() for cell in row] for row in rows[2:]]


by_name = pytest.mark.parametrize("path", SOURCES, ids=module_name)


@by_name
def test_imports_go_to_lower_floors_only(path):
    name = module_name(path)
    if name == "zquant":
        return  # it hands out names of every floor, on first use
    if name.startswith("zquant_kernels"):
        assert {i.split(".")[0] for i in imports(path)} <= KERNEL_IMPORTS
        return
    for imported in imports(path):
        if imported.split(".")[0] == "zquant" and unit(imported) != unit(name):
            target = unit(imported) if unit(imported) in FLOORS else ""
            assert FLOORS[target] < FLOORS[unit(name)], f"{name} imports {imported}"


def test_the_floor_test_sees_imports_inside_functions(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("def f():\n    from zquant import engine\n    import zquant.cli.main\n")
    assert imports(file) == {"zquant.engine", "zquant.cli.main"}


def listed(path: Path) -> set[str]:
    """The names in the module's `__all__`."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


@by_name
def test_modules_take_only_public_names_from_each_other(path):
    files = {module_name(source): source for source in SOURCES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in files:
            names = {a.name for a in node.names if f"{node.module}.{a.name}" not in files}
            hidden = names - listed(files[node.module])
            assert not hidden, f"{sorted(hidden)} not in __all__ of {node.module}"


@pytest.mark.parametrize("name", [module_name(p) for p in SOURCES if listed(p)])
def test_every_name_in_all_exists(name):
    module = importlib.import_module(name)
    assert [n for n in module.__all__ if not hasattr(module, n)] == []


def test_every_public_name_of_the_package_loads():
    assert {name for name in dir(zquant) if name in zquant.__all__} == set(zquant.__all__)
    for name in zquant.__all__:
        assert getattr(zquant, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = zquant.nothing


@by_name
def test_every_module_says_what_it_does(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@by_name
def test_asserts_do_nothing_that_optimized_python_would_leave_out(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assert):
            calls = [call.func for call in ast.walk(node.test) if isinstance(call, ast.Call)]
            names = {ast.unparse(call).split(".")[-1] for call in calls}
            assert not names & {"next", "pop", "read", "write", "append", "add", "close"}, path


@by_name
def test_no_module_hides_another_package(path):
    dependencies = {"gguf", "numpy", "torch", "triton", "safetensors", "tokenizers", "transformers"}
    assert path.stem not in (set(sys.stdlib_module_names) | dependencies) - {"__main__"}


def test_no_file_lies_directly_in_kernels():
    assert [p.name for p in (ROOT / "kernels").iterdir() if p.is_file()] == []


def test_diffusers_is_only_an_oracle():
    for path in SOURCES:
        assert "diffusers" not in {i.split(".")[0] for i in imports(path)}, path


def test_files_have_at_most_400_lines_and_functions_at_most_60():
    long = []
    for path in tracked_files():
        if path.suffix != ".py":
            continue
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            long.append(f"{path}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                n_lines = (node.end_lineno or 0) - node.lineno + 1
                most = 80 if node.name in ("forward", "kernel") else 60
                if n_lines > most:
                    long.append(f"{path}:{node.lineno}: {node.name} has {n_lines} lines")
    assert long == []


def test_tracked_text_names_no_machine_path():
    pattern = re.compile(r"(^|[^a-zA-Z0-9.])/(work|root|farm|tmp|home)/[a-z]", re.MULTILINE)
    found = []
    for path in tracked_files():
        data = path.read_bytes()
        if b"\0" not in data and (match := pattern.search(data.decode("utf-8", "replace"))):
            found.append(f"{path}: {match[0]!r}")
    assert found == []


def test_version_is_the_newest_changelog_entry():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.MULTILINE)
    assert versions[0] == zquant.__version__


def test_readme_lists_the_commands_of_help(tmp_path):
    command = [sys.executable, "-m", "zquant", "--help"]
    text = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    in_help = re.findall(r"^    (\w+)\s", text, re.MULTILINE)
    in_readme = [re.match(r"`zquant (\w+)", row[0])[1] for row in table_rows("Commands")]
    assert in_help == in_readme == list(COMMANDS)


def test_readme_lists_the_environment_variables():
    ours = [[f"`{v.name}`", f"`{v.default}`" if v.default else "", v.meaning] for v in VARIABLES]
    assert table_rows("Environment variables") == ours


def test_only_env_reads_our_variables():
    for path in SOURCES:
        if path.name != "env.py" and "ZQUANT_" in (text := path.read_text(encoding="utf-8")):
            assert "environ" not in text, path


def test_license_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_kernels_import_without_zquant(tmp_path):
    code = "import sys, zquant_kernels.dequant_q8_0; sys.exit('zquant' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert importlib.util.find_spec("zquant_kernels") is not None
