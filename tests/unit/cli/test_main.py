import errno
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

import zquant
from zquant.cli import main as cli
from zquant.errors import FormatError


@pytest.fixture
def command(monkeypatch):
    """Makes `zquant run` do what the test says."""

    def make(action):
        module = SimpleNamespace(
            add_arguments=lambda parser: parser.add_argument("--steps", type=int),
            run=action,
        )
        monkeypatch.setattr(cli, "import_module", lambda _: module)

    monkeypatch.delenv("ZQUANT_DEBUG", raising=False)
    return make


def fail_with(error):
    def action(args):
        raise error

    return action


def in_process(*words, cwd, **options):
    """`python -m zquant` in another process and folder."""
    command = [sys.executable, "-m", "zquant", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **options)


def test_exit_code_is_the_commands(command):
    command(lambda args: args.steps)
    assert cli.main(["run", "--steps", "7"]) == 7


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (FormatError("a.gguf: empty."), 1, "zquant: error: a.gguf: empty.\n"),
        (KeyboardInterrupt(), 130, "zquant: interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out.png"),
            *(1, "zquant: error: out.png: No space left on device. Free some space or write"),
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "out.png"),
            *(1, "zquant: error: out.png: Permission denied. Check the permissions"),
        ),
        (FileNotFoundError("folder 'x' does not exist"), 1, "zquant: error: folder 'x' does"),
        (OSError(), 1, "zquant: error: OSError\n"),
        (MemoryError(), 1, "zquant: error: RAM ran out. Close other programs, or ask for less: a"),
    ],
    ids=["zquant", "interrupt", "disk-full", "permission", "own-text", "no-text", "no-memory"],
)
def test_failures_are_one_line_and_a_code(command, capsys, error, code, message):
    command(fail_with(error))
    assert cli.main(["run"]) == code
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_a_wrong_argument_found_by_zquant_is_wrong_usage(command, capsys):
    from zquant.units import parse_bytes

    command(lambda _: parse_bytes("many"))
    assert cli.main(["run"]) == 2
    assert capsys.readouterr().err.startswith("zquant: error: size 'many' is not a number")


def test_a_value_error_from_below_is_a_bug_and_keeps_its_traceback(command):
    command(lambda _: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        cli.main(["run"])


@pytest.mark.parametrize("words", [["--debug", "run"], ["run", "--debug"]], ids=" ".join)
def test_debug_shows_the_traceback(command, capsys, words):
    command(fail_with(FormatError("bad")))
    assert cli.main(words) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("zquant: error: bad\n")


def test_debug_can_come_from_the_environment(command, capsys, monkeypatch):
    monkeypatch.setenv("ZQUANT_DEBUG", "1")
    command(fail_with(FormatError("bad")))
    assert cli.main(["run"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--version"], ["run", "--version"]], ids=" ".join)
def test_version(command, capsys, words):
    command(lambda _: 0)
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"zquant {zquant.__version__}\n"


@pytest.mark.parametrize(
    "words", [[], ["paint"], ["run", "--nonsense"], ["run", "--steps", "few"]], ids=" ".join
)
def test_wrong_usage_is_2(command, capsys, words):
    command(lambda _: 0)
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "usage: zquant" in capsys.readouterr().err


def test_a_prompt_without_quotes_is_told_so(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["run", "a", "red", "fox"])
    err = capsys.readouterr().err
    assert err.endswith("unrecognized arguments: red fox; put the prompt in quotes\n")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["run", "fox", "--sted", "3"])
    assert "quotes" not in capsys.readouterr().err


def test_without_an_open_stdout_the_work_is_done(command, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    command(lambda _: print("done") or 0)
    assert cli.main(["run"]) == 0
    sys.stdout.close()


def test_every_command_has_add_arguments_and_run():
    from importlib import import_module

    for module_name, _ in cli.COMMANDS.values():
        module = import_module(module_name)
        assert callable(module.add_arguments)
        assert callable(module.run)


def test_a_reader_that_leaves_is_not_an_error_message(tmp_path):
    code = (
        "import sys; from types import SimpleNamespace as N; from zquant.cli import main as cli\n"
        "run = lambda args: print('x' * 10_000_000) or 0\n"
        "cli.import_module = lambda name: N(add_arguments=lambda parser: None, run=run)\n"
        "sys.exit(cli.main(['run']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    )
    with process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_python_m_zquant_reports_and_exits_1(tmp_path):
    done = in_process("inspect", "nothing.gguf", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "zquant: error: nothing.gguf: there is no such file or folder.\n"


def test_help_does_not_load_torch(tmp_path):
    for words in (["--help"], *([name, "--help"] for name in cli.COMMANDS)):
        code = (
            "import sys; from zquant.cli.main import main\n"
            f"try: main({words!r})\n"
            "except SystemExit as stop: assert stop.code == 0\n"
            "heavy = {'torch', 'numpy', 'transformers', 'PIL'} & set(sys.modules)\n"
            "sys.exit(f'loaded {heavy}' if heavy else 0)"
        )
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)


def test_paths_may_stand_on_both_sides_of_options(monkeypatch, capsys):
    def add_arguments(parser):
        parser.add_argument("paths", nargs="+")
        parser.add_argument("--qtype")

    module = SimpleNamespace(add_arguments=add_arguments, run=lambda args: print(args.paths) or 0)
    monkeypatch.setattr(cli, "import_module", lambda _: module)
    assert cli.main(["convert", "source", "--qtype", "Q8_0", "out"]) == 0
    assert capsys.readouterr().out == "['source', 'out']\n"
    with pytest.raises(SystemExit, match="2"):
        cli.main(["convert", "source", "--qtype", "Q8_0", "out", "--typo"])
    assert "unrecognized arguments: out --typo" in capsys.readouterr().err
