"""The `zquant` command: picks the subcommand, turns failures into one line and an exit code.

    0    done
    1    zquant could not do it: the message says what is wrong and what to do
    2    wrong usage
    130  interrupted

Only the module of the chosen command is imported, and commands import the heavy parts inside
`run`, so `zquant --help` loads neither torch nor numpy.
"""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import zquant
from zquant import env
from zquant.errors import ZQuantError

__all__ = ["COMMANDS", "main"]

COMMANDS = {  # name: (module, one line of help)
    "convert": ("zquant.cli.convert", "make a quantized model folder from an original checkpoint"),
    "calibrate": ("zquant.cli.calibrate", "measure what convert --imatrix weighs errors by"),
    "verify": ("zquant.cli.verify", "check that a model is whole and undamaged"),
    "run": ("zquant.cli.run", "paint a picture from a prompt"),
    "plan": ("zquant.cli.plan", "show the memory and time a picture takes, without painting it"),
    "bench": ("zquant.cli.bench", "measure speed and memory, or what a picture costs"),
    "doctor": ("zquant.cli.doctor", "show what this machine has and which kernels it runs"),
    "inspect": ("zquant.cli.inspect_file", "show what is in a model, weights file or picture"),
}

_REMEDIES = {
    errno.ENOSPC: "Free some space or write to another disk.",
    errno.EACCES: "Check the permissions or choose another place.",
    errno.EROFS: "Choose a place that can be written.",
}
_NO_RAM = "Close other programs, or ask for less: a smaller --size or --max-ram, fewer --threads."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's) and return the exit code."""
    if sys.stdout is None:  # closed, or a window without a console
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 # until the end
    if hasattr(sys.stdout, "reconfigure"):  # a console that cannot show Chinese still gets text
        sys.stdout.reconfigure(errors="backslashreplace")
    args = _parsed(sys.argv[1:] if argv is None else argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # the reader of our output has left; a second flush at exit would complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (ZQuantError, OSError, ValueError, MemoryError) as error:
        if isinstance(error, ValueError) and not _is_ours(error):
            raise
        if args.debug or env.DEBUG.is_on:
            traceback.print_exc()
        return _fail(f"error: {_message(error)}", 2 if isinstance(error, ValueError) else 1)


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; a command's `paths` may stand on both sides of its options."""
    parser = _parser(argv)
    args, rest = parser.parse_known_args(argv)
    if rest:
        paths = getattr(args, "paths", None)
        if paths is None or any(word.startswith("-") for word in rest):
            in_words = hasattr(args, "prompt") and not rest[0].startswith("-")
            remedy = "; put the prompt in quotes" if in_words else ""
            parser.error(f"unrecognized arguments: {' '.join(rest)}{remedy}")
        paths.extend(rest)
    return args


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; only the command named in `argv` gets its arguments."""
    parser = argparse.ArgumentParser(prog="zquant", description="Low-VRAM inference for Z-Image.")
    _add_common(parser, debug_default=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    # options before the command take no value, so the first plain word is the command
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        _add_common(command, debug_default=argparse.SUPPRESS)
        if name == chosen:
            module = import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def _add_common(parser: argparse.ArgumentParser, *, debug_default: bool | str) -> None:
    """Options that are accepted before and after the command."""
    parser.add_argument("--version", action="version", version=f"zquant {zquant.__version__}")
    parser.add_argument(
        "--debug", action="store_true", default=debug_default, help="show tracebacks of errors"
    )


def _is_ours(error: ValueError) -> bool:
    """Whether zquant raised it: a wrong argument. One from below is a bug and keeps its trace."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).split(".")[0] == "zquant"


def _message(error: Exception) -> str:
    """The error as one message; what the system says comes with the file and a remedy."""
    if isinstance(error, MemoryError):
        return f"RAM ran out. {_NO_RAM}"
    if not isinstance(error, OSError) or not error.strerror:
        return str(error) or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    remedy = _REMEDIES.get(error.errno or 0, "")
    return f"{where}{error.strerror}. {remedy}".rstrip()


def _fail(message: str, code: int) -> int:
    """Print `message` for the command on stderr; returns `code`."""
    print(f"zquant: {message}", file=sys.stderr)
    return code
