"""Local files are mapped, not copied, and stay usable; part files are whole or absent."""

import errno
import mmap
from pathlib import Path

import numpy as np
import pytest

from zquant.errors import FormatError, PlanError
from zquant.formats import source
from zquant.formats.part_file import part_file
from zquant.formats.source import LocalFile, quoted


def test_views_share_the_mapping_and_never_change_the_file(write, monkeypatch):
    monkeypatch.setattr(source, "ACCESS", mmap.ACCESS_COPY)  # not on Windows, unless asked
    path = write("a", b"0123456789")
    file = LocalFile(path)
    view = file.read(2, 4)
    assert view.flags.writeable
    view[0] = ord("x")
    assert file.read(2, 1).tobytes() == b"x"
    assert path.read_bytes() == b"0123456789"


def test_forget_drops_pages_and_reads_again(write):
    file = LocalFile(write("a", b"0123456789"))
    view = file.read(0, 10)
    file.forget()
    assert view.tobytes() == b"0123456789"


def test_views_outlive_close(write):
    file = LocalFile(write("a", bytes(range(100))))
    view = file.read(50, 50)
    file.close()
    file.forget()
    np.testing.assert_array_equal(view, np.arange(50, 100))


def test_reads_outside_the_file_are_a_bug_of_ours(write):
    file = LocalFile(write("a", b"0123456789"))
    for offset, size in ((-1, 1), (0, 11), (10, 1), (5, -1)):
        with pytest.raises(AssertionError):
            file.read(offset, size)


@pytest.mark.parametrize("name", ["empty", "missing", "."])
def test_unusable_files_are_refused(name, write, tmp_path):
    write("empty", b"")
    message = "file is empty" if name == "empty" else "cannot be opened"
    with pytest.raises(FormatError, match=message):
        LocalFile(tmp_path / name)


def test_text_from_files_is_escaped_and_cut():
    assert quoted("w\x1b[2J") == r"'w\x1b[2J'"
    assert len(quoted("x" * 10_000)) == 82


def test_part_file_replaces_at_the_end(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with part_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        assert (tmp_path / "out.part").read_bytes() == b"new"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ZeroDivisionError])
def test_failure_keeps_the_old_file_and_no_part(failure, tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(failure), part_file(path):
        raise failure
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_and_unwritable_folder_are_told_apart(tmp_path):
    with pytest.raises(PlanError, match=r"disk is full. Free space"), part_file(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(FormatError, match=r"cannot be written \(No such file"),
        part_file(Path(tmp_path / "missing" / "out")),
    ):
        pass
