"""`zquant run` from its words to its files: stdout, stderr, exit codes, the recipe and back."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import zquant
from zquant.image import read_recipe, save_png

Run = Callable[..., tuple[int, str, str]]


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_a_picture_on_disk_its_name_on_stdout_the_rest_on_stderr(run: Run, tmp_path: Path) -> None:
    code, out, err = run("a fox", "--seed", "7", "--out", "fox.png")
    assert code == 0
    assert out == "fox.png  seed 7\n"
    line = r"^CPU, \d+ threads?, float32 \(as asked\), exact \(int8 pays on GPUs only"
    assert re.search(line, err, re.MULTILINE)
    assert "2 steps of" in err
    with Image.open(tmp_path / "fox.png") as image:
        assert image.size == (32, 32)
    assert [p.name for p in tmp_path.iterdir()] == ["fox.png"]


def test_json_is_one_document(run: Run, tmp_path: Path) -> None:
    words = ("a fox", "--json", "--count", "2", "--seed", "7", "--save-latents", "x.npy")
    code, out, _ = run(*words)
    assert code == 0
    document = json.loads(out)
    assert out.count("\n") == 1
    assert document["images"] == ["zquant-1.png", "zquant-2.png"]
    assert document["latents"] == "x.npy"
    assert [r["seed"] for r in document["recipes"]] == [7, 8]
    assert document["recipes"][1] == read_recipe("zquant-2.png")
    assert len(document["timings"]["steps"]) == 4
    assert document["peak_host_bytes"] > 0
    assert document["notices"] == []
    assert np.load("x.npy").shape == (2, 16, 4, 4)


def test_a_cut_prompt_is_told_on_stderr_and_in_json(run: Run) -> None:
    code, out, err = run("snow " * 600, "--json")
    assert code == 0
    (notice,) = json.loads(out)["notices"]
    assert notice.startswith("the prompt needs 609 tokens with its template, 512 are used; cut off")
    assert f"note: {notice}\n" in err


def test_single_files_instead_of_a_folder(run: Run, toy_folder: Path) -> None:
    files = [
        *("--dit", str(toy_folder / "transformer")),
        *("--text-encoder", str(toy_folder / "text_encoder")),
        *("--vae", str(toy_folder / "vae")),
    ]
    code, _, err = run("a fox", "--seed", "7", *files)
    assert code == 0
    assert "note: single files do not tell the variant; turbo is assumed" in err
    alone = pixels(Path("zquant.png"))
    run("a fox", "--seed", "7")
    assert pixels(Path("zquant.png")) == alone


def test_a_size_in_one_flag(run: Run) -> None:
    words = ("a", "--steps", "1", "--compute-dtype", "float32")
    assert run(*words, "--size", "48x16", small=False)[0] == 0
    assert read_recipe("zquant.png")["width"] == 48
    assert run(*words, "--size", "48x16", "--height", "32", small=False)[0] == 0
    assert read_recipe("zquant.png")["height"] == 32
    code, _, err = run(*words, "--size", "huge", small=False)
    assert code == 2
    assert "size 'huge' is not pixels; write it like 512 or 1280x720" in err
    code, _, err = run(*words, "--size", "500", small=False)
    assert code == 2
    assert "width is 500; it must be a multiple of 16" in err


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_from_png_repeats_the_picture(run: Run, tmp_path: Path, dtype: str) -> None:
    words = ("a fox, 狐狸", "--seed", "3", "--negative-prompt", "blur", "--guidance-scale", "2.5")
    words += ("--cfg-normalization", "0.8", "--cfg-truncation", "0.9", "--shift", "2.0")
    size = ("--width", "48", "--height", "16", "--steps", "3", "--compute-dtype", dtype)
    assert run(*words, *size, "--out", "one.png", small=False)[0] == 0
    code, out, err = run("--from-png", "one.png", "--out", "two.png", small=False)
    assert code == 0
    assert out == "two.png  seed 3\n"
    assert "note:" not in err
    assert pixels(Path("two.png")) == pixels(Path("one.png"))
    assert read_recipe("two.png") == read_recipe("one.png")


def test_the_second_picture_of_several_is_repeated_alone(run: Run) -> None:
    run("a fox", "--seed", "3", "--count", "2", "--out", "fox.png")
    run("--from-png", "fox-2.png", "--out", "again.png", small=False)
    assert pixels(Path("again.png")) == pixels(Path("fox-2.png"))
    assert pixels(Path("again.png")) != pixels(Path("fox-1.png"))


def test_flags_override_the_recipe(run: Run) -> None:
    run("a fox", "--seed", "3", "--out", "one.png")
    words = ("a cat", "--from-png", "one.png", "--seed", "4", "--steps", "1", "--out", "two.png")
    code, _, err = run(*words, "--compute-dtype", "bfloat16", small=False)
    assert code == 0
    one, two = read_recipe("one.png"), read_recipe("two.png")
    changed = {name for name in one if one[name] != two[name]}
    assert changed == {"prompt", "seed", "steps", "compute_dtype"}
    assert "note: compute_dtype was 'float32' and is 'bfloat16'; the picture may differ" in err


def test_what_differs_is_shown_without_control_characters(run: Run) -> None:
    run("a fox", "--seed", "3", "--out", "one.png")
    recipe = read_recipe("one.png") | {"device": "\x1b[31mevil" + "x" * 9999, "model": ["?"]}
    save_png(Image.new("RGB", (8, 8)), "evil.png", recipe)
    code, _, err = run("--from-png", "evil.png", "--out", "two.png", small=False)
    assert code == 0
    assert "\x1b" not in err
    assert max(map(len, err.splitlines())) < 1000
    assert pixels(Path("two.png")) == pixels(Path("one.png"))


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "width of text": ({"width": "abc"}, "width is 'abc'; it must be a whole number"),
    "steps without end": ({"steps": 10**9}, "steps is 1000000000; it must be from 1 to 1000"),
    "prompt is a list": ({"prompt": ["a"]}, "prompt is ['a']; it must be text"),
    "no prompt": ({"prompt": None}, "prompt is None; it must be text"),
    "seed is a float": ({"seed": 1e300}, "seed is 1e+300; it must be a whole number"),
    "guidance is a list": ({"guidance_scale": []}, "guidance_scale is []; it must be a finite"),
    "truncation None": ({"cfg_truncation": None}, "cfg_truncation is None; it must be a finite"),
    "dtype is a path": ({"compute_dtype": "../x"}, "compute_dtype is '../x'; expected one of auto"),
    "dtype is a list": ({"compute_dtype": []}, "compute_dtype is []; expected one of auto"),
}


@pytest.mark.parametrize(("changes", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_recipe_is_one_error(
    run: Run, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    from PIL.PngImagePlugin import PngInfo

    recipe = {"prompt": "a", "width": 32, "height": 32, "steps": 1, "seed": 1} | changes
    info = PngInfo()
    info.add_itxt("zquant", json.dumps(recipe))
    Image.new("RGB", (8, 8)).save("evil.png", pnginfo=info)
    code, out, err = run("--from-png", "evil.png", "--out", "two.png", small=False)
    assert (code, out) == (1, "")
    assert err.startswith(f"zquant: error: evil.png: the recipe is damaged: {message}")
    assert err.count("\n") == 1
    assert not Path("two.png").exists()


def test_a_corrupt_png(run: Run) -> None:
    run("a fox", "--out", "one.png")
    Path("cut.png").write_bytes(Path("one.png").read_bytes()[:200])
    code, _, err = run("--from-png", "cut.png", "--out", "two.png", small=False)
    assert code == 1
    assert re.search(r"cut.png: (the PNG ends early|the recipe is damaged)", err)


def test_a_picture_from_latents_needs_them_again(run: Run) -> None:
    np.save("noise.npy", np.zeros((1, 16, 4, 4), np.float32))
    run("a fox", "--initial-latents", "noise.npy", "--out", "one.png")
    code, _, err = run("--from-png", "one.png", "--out", "two.png", small=False)
    assert code == 2
    assert "one.png was painted from --initial-latents; give them again" in err
    words = ("--from-png", "one.png", "--initial-latents", "noise.npy", "--out", "two.png")
    assert run(*words, small=False)[0] == 0
    assert pixels(Path("one.png")) == pixels(Path("two.png"))


def test_saved_latents_are_the_last_ones(run: Run, toy_engine: zquant.Engine) -> None:
    run("a fox", "--seed", "3", "--save-latents", "x.npy")
    request = zquant.RunRequest(
        prompt="a fox", seed=3, width=32, height=32, steps=2, keep_latents=True
    )
    expected = toy_engine.generate(request).latents
    assert expected is not None
    assert torch.equal(torch.from_numpy(np.load("x.npy")), expected[-1])


class Evil:
    def __reduce__(self) -> Any:
        return (Path("pwned").touch, ())


def header_says(shape: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


LATENTS: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "not there": (lambda _: None, 1, "x.npy: cannot be opened (No such file or directory)"),
    "wrong shape": (
        lambda path: np.save(path, np.zeros((1, 16, 8, 4), np.float32)),
        2,
        "initial_latents are torch.float32 [1, 16, 8, 4]; expected floats [1, 16, 4, 4]",
    ),
    "three dimensions": (
        lambda path: np.save(path, np.zeros((16, 4, 4), np.float32)),
        1,
        "x.npy: holds float32 [16, 4, 4]; expected float32 [count, channels, height / 8,",
    ),
    "integers": (
        lambda path: np.save(path, np.zeros((1, 16, 4, 4), np.int64)),
        1,
        "x.npy: holds int64 [1, 16, 4, 4]; expected float32",
    ),
    "not finite": (
        lambda path: np.save(path, np.full((1, 16, 4, 4), np.nan, np.float32)),
        2,
        "initial_latents hold 256 values that are not finite",
    ),
    "pickle": (
        lambda path: path.write_bytes(pickle.dumps(Evil())),
        1,
        "x.npy: not a readable .npy file (the magic string is not correct",
    ),
    "objects": (
        lambda path: np.save(path, np.full((1, 1, 1, 1), Evil()), allow_pickle=True),
        1,
        "x.npy: holds object [1, 1, 1, 1]; expected float32",
    ),
    "archive": (
        lambda path: (np.savez("x.npz", a=np.zeros(1)), Path("x.npz").rename(path)),
        1,
        "x.npy: not a readable .npy file",
    ),
    "truncated": (
        lambda path: path.write_bytes(header_says("(1, 16, 4, 4)") + bytes(100)),
        1,
        "x.npy: has 100 bytes of data; [1, 16, 4, 4] takes 1024. Copy it again.",
    ),
    "enormous": (
        lambda path: path.write_bytes(header_says("(99999999, 99999999, 99999999, 9)")),
        1,
        "x.npy: has 0 bytes of data",
    ),
    "negative": (
        lambda path: path.write_bytes(header_says("(-1, -16, 4, 4)") + bytes(1024)),
        1,
        "x.npy: holds float32 [-1, -16, 4, 4]; expected",
    ),
    "no header": (
        lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\xff"),
        1,
        "not a readable .npy",
    ),
    "hostile header": (
        lambda path: path.write_bytes(header_says("(" * 200)),
        1,
        "not a readable .npy",
    ),
}


@pytest.mark.parametrize(("write", "code", "message"), LATENTS.values(), ids=LATENTS)
def test_latents_that_cannot_be_used(
    run: Run, write: Callable[[Path], Any], code: int, message: str
) -> None:
    write(Path("x.npy"))
    assert not Path("pwned").exists()
    found, out, err = run("a fox", "--initial-latents", "x.npy")
    assert (found, out) == (code, "")
    assert message in err
    assert not Path("zquant.png").exists()
    assert not Path("pwned").exists()


WRONG: dict[str, tuple[list[str], int, str]] = {
    "no prompt": ([], 2, "a PROMPT is needed (or --from-png FILE)"),
    "empty prompt": ([""], 2, "the prompt is empty; describe the picture"),
    "width 1000": (
        ["a", "--width", "1000"],
        2,
        "width is 1000; it must be a multiple of 16 from 16 to 8192. Nearest: 992 or 1008",
    ),
    "negative seed": (
        ["a", "--seed=-1"],
        2,
        "seed is -1; it must be from 0 to 2**63 - 1. Leave --seed out for a random one",
    ),
    "no steps": (["a", "--steps", "0"], 2, "steps is 0; it must be from 1 to 1000"),
    "no pictures": (["a", "--count", "0"], 2, "count is 0; it must be from 1 to 1000"),
    "guidance NaN": (["a", "--guidance-scale", "nan"], 2, "guidance_scale is nan; it must be a fi"),
    "shift 0": (["a", "--shift", "0"], 2, "shift is 0.0; it must be a positive number"),
    "unknown device": (["a", "--device", "tpu"], 1, "device 'tpu' is unknown. Use auto, cpu, cuda"),
    "no GPU": (["a", "--device", "cuda"], 1, "device 'cuda' is not there: torch"),
    "no folder": (
        ["a", "--model", "gone"],
        1,
        "gone: not a model folder (is missing); expected model.json",
    ),
    "no file": (
        ["a", "--dit", "gone.gguf"],
        2,
        "no --model folder is given, and --text-encoder, -",
    ),
    "out of no folder": (
        ["a", "--out", "no/x.png"],
        1,
        "folder 'no' does not exist; create it fir",
    ),
    "not a PNG": (["a", "--out", "x.jpg"], 2, "'x.jpg' does not end in .png"),
    "latents of no folder": (
        ["a", "--save-latents", "no/x.npy"],
        1,
        "folder 'no' does not exist; create it first",
    ),
    "no PNG": (["--from-png", "gone.png"], 1, "gone.png: cannot be opened (No such file"),
}


@pytest.mark.parametrize(("words", "code", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_done_is_one_message(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found, out, err = run(*words, small=False)
    assert (found, out) == (code, "")
    assert err.startswith(f"zquant: error: {message}")
    assert err.count("\n") == 1
    assert not list(Path().glob("*.png"))


def test_numbers_that_are_not_finite_write_no_picture(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zquant.models.checkpoint import Checkpoint

    real = Checkpoint.dit

    def damaged(*args: Any) -> Any:
        dit = real(*args)
        dit.layers[1].attention_norm2.weight[0] = float("nan")
        return dit

    monkeypatch.setattr(Checkpoint, "dit", damaged)
    code, out, err = run("a fox")
    assert (code, out) == (1, "")
    assert "zquant: error: step 1 of 2: block 'layers.1' gave values that are not finite" in err
    assert not list(Path().iterdir())
