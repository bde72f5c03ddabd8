"""`LocalFile`: views and copies of the same bytes, in this process and another."""

import os
import pickle

import numpy as np
import pytest

from zquant.errors import FormatError
from zquant.formats.source import LocalFile


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def test_views_and_copies_are_the_same_bytes(file):
    reader = LocalFile(file)
    out = np.zeros(5000, np.uint8)
    reader.read_into(250, out)
    assert out.tobytes() == file.read_bytes()[250:5250] == reader.read(250, 5000).tobytes()
    reader.close()


def test_copies_work_where_the_system_cannot_read_at_a_position(file, monkeypatch):
    monkeypatch.delattr(os, "preadv", raising=False)
    reader, out = LocalFile(file), np.zeros(300, np.uint8)
    reader.read_into(7, out)
    assert out.tobytes() == file.read_bytes()[7:307]
    reader.close()


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="Windows keeps a mapped file's size")
def test_a_file_that_shrinks_is_an_error_and_no_garbage(file):
    reader = LocalFile(file)
    os.truncate(file, 100)
    with pytest.raises(FormatError, match="became shorter while it was read; expected 10240 bytes"):
        reader.read_into(50, np.zeros(200, np.uint8))
    reader.close()


def test_a_view_is_writable_and_the_file_stays(file):
    before = file.read_bytes()
    reader = LocalFile(file)
    reader.read(0, 10)[:] = 99
    reader.close()
    assert file.read_bytes() == before


def test_a_pickled_reader_opens_the_file_again(file):
    reader = LocalFile(file)
    again = pickle.loads(pickle.dumps(reader))
    assert again.stamp == reader.stamp
    assert again.read(3, 4).tolist() == [3, 4, 5, 6]
    for each in (reader, again):
        each.close()


def test_closing_gives_the_descriptor_back(file):
    reader = LocalFile(file)
    view = reader.read(0, 256)
    reader.close()
    reader.close()
    assert view.tolist() == list(range(256))
