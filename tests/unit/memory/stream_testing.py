"""For tests of the block stream with real threads: blocks in a file, and a limit to waiting."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from zquant.errors import FormatError
from zquant.memory.stream import BlockStream

__all__ = ["FileBlock", "blocks", "check_lap", "content", "deadline", "n_threads", "use"]


@dataclass
class FileBlock:
    """A part of a file."""

    path: Path
    offset: int
    n_bytes: int
    n_reads: int = 0
    before: Callable[[], None] = field(default=lambda: None)

    @property
    def name(self) -> str:
        return f"at {self.offset}"

    def read_into(self, out: npt.NDArray[np.uint8]) -> None:
        self.before()
        with self.path.open("rb") as file:
            file.seek(self.offset)
            if file.readinto(out.data) < self.n_bytes:
                raise FormatError(f"{self.path.name}: block {self.name} is cut off")
        self.n_reads += 1


@pytest.fixture(autouse=True)
def deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that waits in vain fails, instead of the run standing still."""
    wait_for = threading.Condition.wait_for

    def impatient(changed: threading.Condition, predicate: Callable[[], bool]) -> bool:
        assert wait_for(changed, predicate, timeout=20), "nobody came"
        return True

    monkeypatch.setattr(threading.Condition, "wait_for", impatient)


@pytest.fixture
def blocks(tmp_path: Path) -> list[FileBlock]:
    """Five blocks of different sizes."""
    sizes = [256 * n for n in (4, 1, 33, 2, 8)]
    data = np.random.default_rng(0).integers(0, 256, sum(sizes), np.uint8)
    (tmp_path / "blocks").write_bytes(data.tobytes())
    offsets = np.cumsum([0, *sizes]).tolist()
    return [FileBlock(tmp_path / "blocks", *each) for each in zip(offsets, sizes, strict=False)]


def content(block: FileBlock) -> bytes:
    return block.path.read_bytes()[block.offset : block.offset + block.n_bytes]


def check_lap(stream: BlockStream, blocks: list[FileBlock]) -> None:
    for index, block in enumerate(blocks):
        with stream.using(index) as slot:
            assert slot.shape == (max(b.n_bytes for b in blocks),)
            assert slot[: block.n_bytes].numpy().tobytes() == content(block)


def use(stream: BlockStream, upto: int) -> None:
    for index in range(upto):
        with stream.using(index):
            pass


def n_threads() -> int:
    return sum(thread.name.startswith("zquant ") for thread in threading.enumerate())
