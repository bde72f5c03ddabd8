"""`open_source` opens by content, and names what is no weights file."""

import json

import pytest

from zquant.errors import FormatError
from zquant.formats.detect import open_source


def small_safetensors(build):
    return build.safetensors({"w": build.entry("F32", [1], 0, 4)}, bytes(4))


@pytest.mark.parametrize("name", ["a.gguf", "a.safetensors", "no_ending"])
def test_content_decides_not_the_name(name, write, build):
    gguf = build.gguf([], [build.tensor("w", [1])], bytes(4))
    assert open_source(write(name, gguf)).container == "gguf"
    assert open_source(write(name, small_safetensors(build))).container == "safetensors"


@pytest.mark.parametrize("name", ["one.safetensors", "one.gguf"])
def test_folder_with_one_file(name, write, build):
    make = build.gguf if name.endswith("gguf") else lambda: small_safetensors(build)
    path = write(f"folder/{name}", make())
    write("folder/config.json", b"{}")
    assert open_source(path.parent).path == path


def test_folder_with_an_index(write, build):
    write("folder/1.safetensors", small_safetensors(build))
    write("folder/unrelated.safetensors", b"")
    text = json.dumps({"weight_map": {"w": "1.safetensors"}}).encode()
    index = write("folder/model.safetensors.index.json", text)
    assert list(open_source(index).tensors) == ["w"]
    assert list(open_source(str(index.parent)).tensors) == ["w"]


MISTAKES = {
    "page.gguf": (b"\n<!DOCTYPE html><title>401", "a web page, not weights.*login"),
    "page.safetensors": (b"<html>", "a web page"),
    "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "model.ckpt": (b"PK\x03\x04\0\0\0\0", "never loads pickles"),
    "model.bin": (b"\x80\x02}q\0", "never loads pickles"),
    "config.json": (b'{"dim": 3840}', "a JSON file, not weights"),
    "picture.png": (b"\x89PNG\r\n\x1a\n....", r"no known format, starts with b'\\x89PNG"),
    "damaged.gguf": (b"XGUF....", "starts with b'XGUF', expected b'GGUF'"),
    "damaged.safetensors": (b"\0" * 64, "JSON cannot be read"),
    "empty.gguf": (b"", "the file is empty"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name, write):
    data, message = MISTAKES[name]
    with pytest.raises(FormatError, match=message):
        open_source(write(name, data))


def test_missing_path(tmp_path):
    with pytest.raises(FormatError, match=r"does not exist. Expected a .gguf or .safetensors"):
        open_source(tmp_path / "nothing.gguf")


def test_special_file_is_not_opened():
    with pytest.raises(FormatError, match="is not a regular file"):
        open_source("/dev/null")


def test_folder_without_weights(write, tmp_path):
    with pytest.raises(FormatError, match="no weights in this folder, found nothing"):
        open_source(tmp_path)
    write("readme.md", b"")
    with pytest.raises(FormatError, match=r"no weights in this folder, found readme\.md"):
        open_source(tmp_path)


def test_folder_with_several_files(write, tmp_path):
    write("a.gguf", b"")
    write("b.safetensors", b"")
    with pytest.raises(FormatError, match=r"2 weight files and no index .*b.saf.*Give one"):
        open_source(tmp_path)
