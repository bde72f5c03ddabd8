"""A folder is a model, converted or official, or the message says what it lacks."""

import json
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest

from zquant.errors import CheckpointError, FormatError
from zquant.formats.model_folder import (
    VARIANTS,
    Hint,
    Variant,
    find_model,
    model_folder,
    read_json,
    source_metadata,
    variant_of_shift,
)

FILES = {"dit": "d.gguf", "text_encoder": "t.gguf", "vae": "v.safetensors"}


def manifest(**changes):
    content = {
        "format": "zquant-model-1",
        "variant": "turbo",
        "shift": 3.0,
        "steps": 8,
        "guidance_scale": 0.0,
        "files": {part: {"name": name} for part, name in FILES.items()},
    }
    return {key: value for key, value in {**content, **changes}.items() if value is not None}


@pytest.fixture
def converted(tmp_path):
    """Writes a converted folder whose manifest differs as told."""

    def write(**changes):
        for name in FILES.values():
            (tmp_path / name).write_bytes(b"x")
        (tmp_path / "model.json").write_text(json.dumps(manifest(**changes)))
        return tmp_path

    return write


@pytest.fixture
def official(tmp_path):
    for name in ("transformer", "text_encoder", "vae", "scheduler"):
        (tmp_path / name).mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text('{"shift": 3.0}')
    return tmp_path


def test_a_converted_folder(converted):
    folder = converted(variant="base", shift=6, steps=30, guidance_scale=4)
    found = find_model(folder)
    assert (found.dit, found.text_encoder, found.vae) == tuple(folder / n for n in FILES.values())
    assert found.variant == VARIANTS["base"]
    assert found.tokenizer is None
    assert (found.size, found.hint) == ((1024, 1024), None)


def test_a_folder_may_have_its_own_size_and_a_hint(converted):
    found = find_model(converted(size=[128, 96], hint={"words": ["a", "红色"], "text": "few"}))
    assert found.size == (128, 96)
    assert found.hint == Hint(words=["a", "红色"], text="few")


def test_the_hint_is_given_for_words_beyond_the_known():
    hint = Hint(words=["a", "red", "circle", "红色", "圆形", "形"], text="few words")
    for known in ("a red circle", "A RED\ncircle.", "红色圆形。", "  ...  "):
        assert hint.about(known) is None, known
    for beyond in ("a fox", "reds", "红色狐狸", "a red circle 2", "redcircle", "a red circle 🦊"):
        assert hint.about(beyond) == "few words", beyond


def test_demo_is_the_model_inside_zquant_and_a_path_is_not():
    folder = model_folder("demo")
    assert folder == Path(str(files("zquant"))) / "demo"
    found = find_model(folder)
    assert found.size == (128, 128)
    assert found.hint is not None
    assert found.hint.about("a red circle left of a blue square") is None
    assert found.hint.about("a fox") == found.hint.text
    for path in ("./demo", "demo/", Path("demo"), "other"):
        assert model_folder(path) == Path(path)


def test_an_installation_without_the_demo_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("zquant.formats.model_folder.package_files", lambda _: tmp_path)
    with pytest.raises(CheckpointError, match=r"demo model is missing .*write \./demo"):
        model_folder("demo")


def test_an_official_folder(official):
    found = find_model(official)
    assert (found.dit, found.vae) == (official / "transformer", official / "vae")
    assert found.variant == VARIANTS["turbo"]
    assert (found.tokenizer, found.manifest) == (None, None)
    (official / "tokenizer").mkdir()
    assert find_model(official).tokenizer == official / "tokenizer"


BAD_MANIFESTS = {
    "format": ({"format": "v9"}, FormatError, r"format is 'v9'; expected 'zquant-model-1'\. Conv"),
    "newer": (
        {"format": "zquant-model-2"},
        FormatError,
        r"'zquant-model-2'; expected 'zquant-model-1'\. A newer zquant made it: upgrade this one",
    ),
    "older": ({"format": "zquant-model-0"}, FormatError, r"Convert the model with this version"),
    "no-files": ({"files": None}, FormatError, r"the file of 'dit' is None; expected a plain file"),
    "no-variant": ({"variant": None}, FormatError, r"incomplete \('variant'\)\. Convert the model"),
    "no-number": ({"steps": "x"}, FormatError, r"incomplete \(invalid literal.*Convert the model"),
    "negative": ({"shift": -1}, FormatError, r"shift -1\.0 and steps 8 must be positive"),
    "size": ({"size": [128]}, FormatError, r"size is \[128\]; expected \[width, height\]"),
    "hint": ({"hint": {"words": ["a"]}}, FormatError, r"hint is \{.*expected its words and text"),
    "hint-text": (
        {"hint": {"words": [], "text": "\x1b[2J"}},
        FormatError,
        r"hint is .*expected its words and text",
    ),
    "hint-string": ({"hint": {"words": "ab", "text": ""}}, FormatError, r"hint is .*expected its"),
    "hint-list": ({"hint": ["a"]}, FormatError, r"hint is \['a'\]; expected its words and text"),
    "hint-words": ({"hint": {"words": [1], "text": ""}}, FormatError, r"hint is .*expected its"),
    "hint-space": ({"hint": {"words": [""], "text": ""}}, FormatError, r"hint is .*expected its"),
    "escape": ({"files": {"dit": {"name": "../d"}}}, FormatError, r"'dit' is '\.\./d'; expected"),
    "parent": ({"files": {"dit": {"name": ".."}}}, FormatError, r"'dit' is '\.\.'; expected a"),
    "gone": ({"files": {"dit": {"name": "gone"}}}, CheckpointError, r"gone: missing, though model"),
}


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_bad_manifests(name, converted):
    changes, error, message = BAD_MANIFESTS[name]
    with pytest.raises(error, match=message):
        find_model(converted(**changes))


@pytest.mark.parametrize(("text", "problem"), [("[1]", "holds a list"), ("{", "not valid JSON")])
def test_a_manifest_that_is_no_json_object(text, problem, tmp_path):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(FormatError, match=rf"model\.json: {problem}"):
        find_model(tmp_path)
    with pytest.raises(FormatError, match=r"nothing: cannot be read \(No such file"):
        read_json(tmp_path / "nothing")


def test_not_a_model(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for name, found in (("", "has neither"), ("file", "is a file"), ("gone", "is missing")):
        message = rf"not a model folder \({found}\); expected model\.json .* or transformer/"
        with pytest.raises(CheckpointError, match=message):
            find_model(tmp_path / name)


@pytest.mark.parametrize("lost", ["text_encoder", "vae"])
def test_an_incomplete_official_folder(lost, official):
    (official / lost).rmdir()
    with pytest.raises(CheckpointError, match=rf"lacks {lost}/\. Download the whole model"):
        find_model(official)


@pytest.mark.parametrize("shift", ["null", "0", "-3", "true", '"3"'])
def test_a_bad_scheduler(shift, official):
    (official / "scheduler/scheduler_config.json").write_text(f'{{"shift": {shift}}}')
    with pytest.raises(FormatError, match=r"scheduler shift is .*; expected a positive number"):
        find_model(official)


def test_variants_by_shift():
    assert variant_of_shift(3.0) is VARIANTS["turbo"]
    assert variant_of_shift(6.0) is VARIANTS["base"]
    other = Variant(name="turbo", shift=4.5, steps=8, guidance_scale=0.0)
    assert variant_of_shift(4.5) == other


def test_metadata_of_an_official_component_is_its_config(tmp_path):
    source = SimpleNamespace(path=tmp_path, container="safetensors", metadata={"format": "pt"})
    assert source_metadata(source) == {"format": "pt"}
    (tmp_path / "config.json").write_text('{"axes_dims": [1, 2], "rope_theta": 9, "dim": 3}')
    expected = {"lumina2.rope.dimension_sections": [1, 2], "lumina2.rope.freq_base": 9}
    assert source_metadata(source) == expected
    (tmp_path / "config.json").write_text('{"rms_norm_eps": 0.1, "rope_theta": null}')
    expected = {"qwen3.attention.layer_norm_rms_epsilon": 0.1}
    assert source_metadata(source) == expected
    (tmp_path / "config.json").write_text('{"block_out_channels": [16], "norm_num_groups": 8}')
    assert source_metadata(source) == {"norm_num_groups": 8}
    source.container = "gguf"
    assert source_metadata(source) == {"format": "pt"}
