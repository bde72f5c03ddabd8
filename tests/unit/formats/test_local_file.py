"""`LocalFile`: views and copies of the same bytes, in this process and another."""

import mmap
import os
import pickle
import warnings
from contextlib import closing

import numpy as np
import pytest
import torch

import zquant
from zquant.errors import FormatError
from zquant.formats import source
from zquant.formats.source import LocalFile
from zquant.models.checkpoint import Checkpoint


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


@pytest.fixture
def read_only(monkeypatch):
    """Files are mapped as on Windows, where torch would say that their arrays are not writable."""
    monkeypatch.setattr(source, "ACCESS", mmap.ACCESS_READ)
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # not only once in a process
    yield
    torch.set_warn_always(before)


def test_a_read_only_view_becomes_a_tensor_without_a_warning(file, read_only):
    reader = LocalFile(file)
    view = reader.read(0, 10)
    assert not view.flags.writeable
    assert torch.from_numpy(view).tolist() == list(range(10))
    # another's array is another's business
    with pytest.raises(UserWarning, match="something else"):
        warnings.warn("something else is not writable", UserWarning, stacklevel=1)
    reader.close()


def test_a_model_paints_the_same_from_read_only_views(
    read_only, toy_folder, toy_engine, monkeypatch
):
    """Warnings are errors here, and so is writing into such a view."""
    tokenizer = toy_engine.prompts.tokenizer
    monkeypatch.setattr(Checkpoint, "tokenizer", lambda _: tokenizer)
    request = zquant.RunRequest(prompt="a fox", seed=3, width=32, height=32, steps=2)
    with closing(zquant.Engine.open(toy_folder, device="cpu", compute_dtype="float32")) as engine:
        ours = engine.generate(request).images[0]
    assert ours.tobytes() == toy_engine.generate(request).images[0].tobytes()


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
