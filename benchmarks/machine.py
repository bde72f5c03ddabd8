"""What a benchmark ran on and with, for its document."""

import json
import os
import platform
import shlex
import subprocess
from argparse import ArgumentTypeError
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import zquant

__all__ = ["command_line", "describe_machine", "new_file", "told", "write_document"]


def describe_machine() -> dict[str, Any]:
    """Processor, cores, versions and commit, "-dirty" where files differ; "" without git."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "zquant": zquant.__version__,
        "commit": _commit(),
    }


def command_line(program: str, words: Iterable[str]) -> str:
    """A command without the folders of its paths, which say nothing about the result."""
    return shlex.join([program, *(Path(w).name if "/" in w else w for w in words)])


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """The whole file or none of it: whoever stops the benchmark reads what is there."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    part.replace(path)


def new_file(text: str) -> Path:
    """An argument: where a document will be written, hours later perhaps."""
    path = Path(text)
    if not path.parent.is_dir():
        raise ArgumentTypeError(f"folder '{path.parent}' does not exist; create it first")
    return path


def told(value: Any) -> Any:
    """A setting for a document, paths without their folders."""
    if isinstance(value, list):
        return [told(each) for each in value]
    return value.name if isinstance(value, Path) else value


def _commit() -> str:
    root = Path(__file__).parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
