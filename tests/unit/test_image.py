import errno
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import zquant.image
from zquant.errors import FormatError
from zquant.image import MAX_RECIPE_BYTES, check_target, read_recipe, save_png, to_image

RECIPE = {
    "prompt": "a red fox\nin the snow",
    "negative_prompt": "blur",
    "steps": 8,
    "guidance_scale": 4.0,
    "seed": 42,
    "width": 3,
    "height": 2,
    "model": {"dit": "z-image, turbo.gguf", "vae": "vae.gguf"},
    "zquant": "0.1.0",
}
PARAMETERS = (
    "a red fox\nin the snow\nNegative prompt: blur\n"
    "Steps: 8, Sampler: Euler, CFG scale: 5, Seed: 42, Size: 3x2, "
    'Model: "z-image, turbo", Version: zquant 0.1.0'
)


@pytest.fixture
def image():
    return Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))


@pytest.fixture
def png(tmp_path, image):
    save_png(image, tmp_path / "fox.png", RECIPE)
    return tmp_path / "fox.png"


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def insert(png, *chunks: bytes) -> None:
    """Put chunks behind the header of `png`, after dropping the recipe it has."""
    data = png.read_bytes()
    at = data.index(b"zquant\0") - 8
    end = at + 12 + int.from_bytes(data[at : at + 4], "big")
    png.write_bytes(data[:at] + b"".join(chunks) + data[end:])


# to_image


@pytest.mark.parametrize("make", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_values_are_clamped_and_rounded_half_to_even(make):
    # y * 0.5 + 0.5 times 255 is 0.5, 1.5 and 2.5 for these, up to float32
    levels = [0.5, 1.5, 2.5]
    row = np.float32([-3, -1, 0, 1, 3] + [2 * v / 255 - 1 for v in levels])
    pixels = make(np.broadcast_to(row, (3, 1, 8)).copy())
    expected = np.rint(np.clip(row * 0.5 + 0.5, 0, 1) * 255).astype(np.uint8)
    got = np.asarray(to_image(pixels))[0, :, 0]
    assert got.tolist() == expected.tolist()
    assert got[:5].tolist() == [0, 0, 128, 255, 255]


def test_channels_become_red_green_blue():
    pixels = np.full((3, 4, 5), -1, np.float32)
    pixels[1] = 1
    image = to_image(pixels)
    assert (image.mode, image.size) == ("RGB", (5, 4))
    assert image.getpixel((2, 3)) == (0, 255, 0)


@pytest.mark.parametrize(
    ("pixels", "match"),
    [
        (np.zeros((3, 2, 2)), r"got float64 \[3, 2, 2\]"),
        (np.zeros((1, 2, 2), np.float32), r"got float32 \[1, 2, 2\]"),
        (np.zeros((2, 2), np.float32), r"got float32 \[2, 2\]"),
        (np.float32([[[0, np.nan]], [[np.inf, 0]], [[0, 0]]]), "2 of 6 pixel values"),
    ],
    ids=["dtype", "channels", "rank", "not-finite"],
)
def test_wrong_pixels_are_refused(pixels, match):
    with pytest.raises(ValueError, match=match):
        to_image(pixels)


# save_png


def test_pixels_and_both_texts_are_stored(png, image):
    with Image.open(png) as stored:
        stored.load()
        assert np.array_equal(np.asarray(stored), np.asarray(image))
        assert stored.text["parameters"] == PARAMETERS
        assert json.loads(stored.text["zquant"]) == RECIPE


def test_saving_leaves_one_file_and_replaces_it(png, image):
    save_png(image, png, {"prompt": "second"})
    assert read_recipe(png) == {"prompt": "second"}
    assert [p.name for p in png.parent.iterdir()] == ["fox.png"]


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing(png, image, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_png(image, png, {})
    assert read_recipe(png) == RECIPE
    assert [p.name for p in png.parent.iterdir()] == ["fox.png"]


def test_target_must_be_a_png_in_a_folder_that_exists(tmp_path, image):
    with pytest.raises(FileNotFoundError, match=r"folder '.*missing' does not exist"):
        save_png(image, tmp_path / "missing" / "a.png", {})
    with pytest.raises(ValueError, match=r"'.*a\.jpg' does not end in \.png"):
        check_target(tmp_path / "a.jpg")
    assert list(tmp_path.iterdir()) == []


def fail_to_open(monkeypatch, ending, mode):
    """Files whose names end so cannot be opened in this mode."""
    real = Path.open

    def refuse(self, *args, **options):
        if self.name.endswith(ending) and args == (mode,):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)


def test_a_folder_that_cannot_be_written_is_noticed_before_the_work(png, monkeypatch):
    check_target(png)
    assert [p.name for p in png.parent.iterdir()] == ["fox.png"]
    fail_to_open(monkeypatch, ".part", "wb")
    with pytest.raises(PermissionError, match=r"Permission denied: '.*fox\.png'$"):
        check_target(png)


def test_a_picture_that_windows_will_not_replace_is_noticed_before_the_work(png, monkeypatch):
    fail_to_open(monkeypatch, "fox.png", "r+b")
    monkeypatch.setattr(zquant.image, "_NEEDS_OLD", False)
    check_target(png)  # elsewhere it is replaced whoever has it open
    monkeypatch.setattr(zquant.image, "_NEEDS_OLD", True)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*fox\.png'$"):
        check_target(png)
    check_target(png.with_name("new.png"))
    assert [p.name for p in png.parent.iterdir()] == ["fox.png"]


def test_a_picture_that_cannot_take_its_name_is_kept_under_another(png, image, monkeypatch):
    def refuse(self, target):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    for i, seed in ((1, 7), (2, 8)):
        kept = png.with_name(f"fox-kept-{i}.png")
        message = rf"cannot be replaced \(Permission denied\); the picture is in '.*{kept.name}'"
        with pytest.raises(PermissionError, match=message):
            save_png(image, png, {"seed": seed})
        assert read_recipe(kept) == {"seed": seed}
    assert read_recipe(png) == RECIPE
    assert len(list(png.parent.iterdir())) == 3


def test_two_processes_write_different_parts_of_the_same_picture(png, image, monkeypatch):
    seen = []
    monkeypatch.setattr("os.fsync", lambda _: seen.extend(png.parent.glob("*.part")))
    for process in (11, 12):
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        save_png(image, png, {})
    assert [part.name for part in seen] == ["fox.png.11.part", "fox.png.12.part"]


def test_a_recipe_without_end_is_refused(tmp_path, image):
    with pytest.raises(ValueError, match=f"at most {MAX_RECIPE_BYTES}"):
        save_png(image, tmp_path / "a.png", {"prompt": "x" * MAX_RECIPE_BYTES})


# read_recipe


def test_recipe_comes_back_with_unicode(tmp_path, image):
    recipe = {"prompt": "雪中的红狐狸 🦊", "steps": 8}
    save_png(image, tmp_path / "a.png", recipe)
    assert read_recipe(tmp_path / "a.png") == recipe
    with Image.open(tmp_path / "a.png") as stored:
        stored.load()
        assert stored.text["parameters"].startswith("雪中的红狐狸 🦊\nSteps: 8")


def test_recipe_is_read_when_another_program_compressed_it(png, image):
    info = PngInfo()
    info.add_itxt("zquant", json.dumps(RECIPE), zip=True)
    image.save(png, pnginfo=info)
    assert read_recipe(png) == RECIPE


@pytest.mark.parametrize("keep", range(0, 350, 9))
def test_every_truncation_is_an_error(png, keep):
    data = png.read_bytes()
    assert len(data) > 350
    png.write_bytes(data[:keep] if keep else data[:-1])
    with pytest.raises(FormatError, match=r"not a PNG file|ends early or is damaged"):
        read_recipe(png)


@pytest.mark.parametrize("at", range(8, 350, 7))
def test_a_changed_byte_is_an_error(png, at):
    data = bytearray(png.read_bytes())
    data[at] ^= 0x41
    png.write_bytes(data)
    with pytest.raises(FormatError, match=r"ends early or is damaged|cannot be ours"):
        read_recipe(png)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"\0\0\0\0not json", "not JSON"),
        (b"\0\0\0\0" + b"[" * 200_000, "not JSON"),
        (b"\0\0\0\0\xff\xfe{", "not JSON"),
        (b"\0\0\0\0[1]", "expected one JSON object"),
        (b"\0\0no separators", "text chunk without text"),
        (b"", "text chunk without text"),
        (b"\1\0\0\0not zlib", "recipe is damaged"),
        (b"\1\0\0\0" + zlib.compress(b" " * 2**24), f"longer than {MAX_RECIPE_BYTES}"),
        (b"\0\0\0\0" + b" " * (2 * MAX_RECIPE_BYTES), "it cannot be ours"),
    ],
    ids=[
        *("text", "nested", "not-utf8", "array", "separators", "empty", "not-zlib", "bomb"),
        "huge",
    ],
)
def test_hostile_recipes_are_named(png, body, match):
    insert(png, chunk(b"iTXt", b"zquant\0" + body))
    with pytest.raises(FormatError, match=match):
        read_recipe(png)


def test_two_recipes_are_an_error(png):
    text = chunk(b"iTXt", b"zquant\0\0\0\0\0{}")
    insert(png, text, text)
    with pytest.raises(FormatError, match="expected one JSON object"):
        read_recipe(png)


def test_a_picture_that_claims_huge_dimensions_is_not_decoded(png):
    data = png.read_bytes()
    header = (2**31 - 1).to_bytes(4, "big") * 2 + data[24:29]
    png.write_bytes(data[:8] + chunk(b"IHDR", header) + data[33:])
    assert read_recipe(png) == RECIPE


def test_other_files_are_named(tmp_path, image):
    image.save(tmp_path / "plain.png")
    with pytest.raises(FormatError, match="no zquant recipe in this picture"):
        read_recipe(tmp_path / "plain.png")
    image.save(tmp_path / "photo.jpg")
    with pytest.raises(FormatError, match="not a PNG file"):
        read_recipe(tmp_path / "photo.jpg")
    with pytest.raises(FormatError, match=r"missing\.png: cannot be opened"):
        read_recipe(tmp_path / "missing.png")
