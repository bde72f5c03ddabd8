"""The word `demo` wherever a model is named, with a stand-in for the model inside zquant."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

import zquant
from zquant.cli.main import main
from zquant.formats import model_folder
from zquant.image import read_recipe

HINT = {"words": ["a", "red", "circle", "红色"], "text": "knows a red circle only"}
SIZE = [48, 32]
SHADOW = "note: demo is the model inside zquant; for the folder here write ./demo\n"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def package(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has a folder `demo` as zquant has one: the toy, converted, with size and hint."""
    package = tmp_path_factory.mktemp("package")
    assert main(["convert", str(toy_folder), str(package / "demo"), "--qtype", "Q8_0"]) == 0
    manifest = package / "demo/model.json"
    content = json.loads(manifest.read_text()) | {"size": SIZE, "hint": HINT}
    manifest.write_text(json.dumps(content))
    return package


@pytest.fixture(autouse=True)
def at_home(
    package: Path,
    toy_engine: zquant.Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An empty working directory; the stand-in; the session's tokenizer, which is slow to read."""
    from zquant.models.checkpoint import Checkpoint

    tokenizer = toy_engine.prompts.tokenizer
    monkeypatch.setattr(Checkpoint, "tokenizer", lambda _: tokenizer)
    monkeypatch.setattr(model_folder, "package_files", lambda _: package)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """`zquant ...`, with the machine's flags for `run`: exit code, stdout, stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        machine = ["--device", "cpu", "--compute-dtype", "float32", "--steps", "1"]
        code = main([*words, *machine] if words[0] == "run" else list(words))
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def engine() -> Iterator[zquant.Engine]:
    engine = zquant.Engine.open("demo", device="cpu", compute_dtype="float32")
    yield engine
    engine.close()


def test_it_paints_at_its_own_size_and_the_recipe_has_the_numbers(command: Command) -> None:
    code, out, err = command("run", "a red circle", "--model", "demo", "--seed", "1")
    assert (code, out) == (0, "zquant.png  seed 1\n")
    assert "note:" not in err
    with Image.open("zquant.png") as image:
        assert image.size == tuple(SIZE)
    recipe = read_recipe("zquant.png")
    assert [recipe["width"], recipe["height"]] == SIZE
    command("run", "--from-png", "zquant.png", "--model", "demo", "--out", "again.png")
    assert Path("again.png").read_bytes() == Path("zquant.png").read_bytes()


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        (["--width", "16"], (16, 32)),
        (["--height", "64"], (48, 64)),
        (["--size", "16"], (16, 16)),
    ],
    ids=["width", "height", "size"],
)
def test_what_is_asked_for_goes_before_its_own_size(
    command: Command, flags: list[str], size: tuple[int, int]
) -> None:
    assert command("run", "a red circle", "--model", "demo", *flags)[0] == 0
    with Image.open("zquant.png") as image:
        assert image.size == size


def test_a_size_in_a_recipe_goes_before_the_models(
    command: Command, toy_folder: Path, tmp_path: Path
) -> None:
    words = ("--model", str(toy_folder), "--width", "16", "--height", "16")
    assert command("run", "a red circle", *words, "--out", "small.png")[0] == 0
    assert command("run", "--from-png", "small.png", "--model", "demo")[0] == 0
    assert read_recipe("zquant.png")["width"] == 16


def test_words_it_does_not_know_are_told(command: Command, engine: zquant.Engine) -> None:
    code, out, err = command("run", "a red fox", "--model", "demo", "--json")
    assert code == 0
    assert f"note: {HINT['text']}\n" in err
    assert json.loads(out)["notices"] == [HINT["text"]]
    for prompt, notices in (("红色 circle!", []), ("a fox", [HINT["text"]])):
        request = zquant.RunRequest(prompt=prompt, steps=1)
        assert engine.generate(request).notices == notices


def test_inspect_and_convert_take_the_name(command: Command, package: Path) -> None:
    assert command("inspect", "demo", "--json") == command(
        "inspect", str(package / "demo"), "--json"
    )
    assert command("convert", "demo", "out", "--qtype", "F16")[0] == 1  # it is quantized already
    code, out, err = command("convert", "demo", "out", "--qtype", "F16", "--allow-requantize")
    assert (code, err) == (0, "")
    assert out.endswith("next: zquant run PROMPT --model out\n")
    manifest = json.loads(Path("out/model.json").read_text())
    assert (manifest["size"], manifest["hint"]) == (SIZE, HINT)


def test_a_folder_of_the_same_name_needs_a_path(command: Command, toy_folder: Path) -> None:
    Path("demo").symlink_to(toy_folder)
    size = ("--width", "16", "--height", "16")
    builtin = command("run", "a red circle", "--model", "demo", *size)
    assert SHADOW in builtin[2]
    assert read_recipe("zquant.png")["model"]["dit"] == "dit-Q8_0.gguf"
    folder = command("run", "a red circle", "--model", "./demo", *size)
    assert SHADOW not in folder[2]
    assert read_recipe("zquant.png")["model"]["dit"] == "transformer"
    assert [r[0] for r in (builtin, folder)] == [0, 0]
    for words in (("inspect",), ("convert", "--dry-run")):
        assert command(*words, "demo", *["out"] * (len(words) - 1))[2].startswith(SHADOW)
        assert command(*words, "./demo", *["out"] * (len(words) - 1))[2] == ""


def test_a_conversion_into_a_folder_of_that_name_says_how_to_run_it(command: Command) -> None:
    words = ("--qtype", "Q8_0", "--allow-requantize")
    assert command("convert", "demo", "demo", *words)[1].endswith("--model ./demo\n")


def test_python_takes_text_as_the_name_and_a_path_as_a_folder(engine: zquant.Engine) -> None:
    assert engine.checkpoint.files.size == tuple(SIZE)
    with pytest.raises(zquant.ZQuantError, match=r"demo: not a model folder \(is missing\)"):
        zquant.Engine.open(Path("demo"), device="cpu")
