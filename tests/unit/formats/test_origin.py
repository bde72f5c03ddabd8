"""Where a model comes from; above all, that a machine without network is told so, and soon."""

import shutil
import socket
import time
from types import SimpleNamespace

import huggingface_hub
import pytest

from zquant.errors import CheckpointError, ZQuantError
from zquant.formats import remote_hub
from zquant.formats.model_folder import VARIANTS
from zquant.formats.origin import Origin, find_origin

ID = "Tongyi-MAI/Z-Image-Turbo"


def official_folder(folder):
    for name in ("transformer", "text_encoder", "vae", "scheduler", "tokenizer"):
        (folder / name).mkdir(parents=True)
    (folder / "scheduler/scheduler_config.json").write_text('{"shift": 6.0}')
    return folder


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers as `hub.info` and `hub.download` say, and what it was asked."""
    hub = SimpleNamespace(asked=[], sha="c0ffee")

    def model_info(self, repository, **options):
        hub.asked.append((repository, options))
        return hub.info()

    def snapshot_download(repository, **options):
        hub.asked.append((repository, options))
        return hub.download(options)

    hub.info = lambda: SimpleNamespace(sha=hub.sha)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return hub


def unreachable(*_):
    raise RuntimeError("[Errno -2] Name or service not known\nmore")


def test_an_official_folder(tmp_path):
    folder = official_folder(tmp_path / "model")
    found = find_origin(str(folder), {})
    assert found.variant == VARIANTS["base"]
    assert found.tokenizer == folder / "tokenizer"
    assert found.paths["dit"] == folder / "transformer"
    assert (found.label, found.name) == (str(folder), "model")


def test_given_files_go_first(tmp_path):
    folder = official_folder(tmp_path)
    found = find_origin(str(folder), {"vae": tmp_path / "ae.safetensors"})
    assert found.paths["vae"] == tmp_path / "ae.safetensors"
    assert found.paths["text_encoder"] == folder / "text_encoder"


def test_files_only(tmp_path):
    files = {c: tmp_path / f"{c}.gguf" for c in ("dit", "text_encoder", "vae")}
    found = find_origin(None, files)
    assert (found.paths, found.variant, found.tokenizer) == (files, None, None)
    assert found.label == "dit.gguf, text_encoder.gguf, vae.gguf"


@pytest.mark.parametrize("missing", ["dit", "text_encoder", "vae"])
def test_a_missing_component(missing, tmp_path):
    files = {c: tmp_path / c for c in ("dit", "text_encoder", "vae") if c != missing}
    flag = missing.replace("_", "-")
    message = rf"the given files: no source for {missing}\. Give --{flag}\."
    with pytest.raises(CheckpointError, match=message):
        find_origin(None, files)


@pytest.mark.parametrize("source", ["nothing", "a/b/c", "a/b.gguf", "../a", "a/b@", "~/model"])
def test_neither_a_path_nor_an_id(source, tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    assert "no such file or folder, and not a Hugging Face id" in find_origin_fails(source)
    assert hub.asked == []


def find_origin_fails(source):
    with pytest.raises(ZQuantError) as failure:
        find_origin(source, {})
    return str(failure.value)


@pytest.mark.parametrize(("revision", "asked"), [("", None), ("@v1.0", "v1.0"), ("@pr/1", "pr/1")])
def test_an_id_is_listed_at_its_commit(revision, asked, hub):
    hub.download = unreachable
    hub.info = lambda: SimpleNamespace(sha="c0ffee", siblings=[])
    assert "the repository has no such file or folder" in find_origin_fails(ID + revision)
    options = {"revision": asked, "timeout": remote_hub.NETWORK_TIMEOUT_S, "files_metadata": True}
    assert hub.asked[-1] == (ID, options)


@pytest.mark.parametrize("revision", ["", "@v1"])
def test_no_network_says_exactly_what_to_do(revision, hub):
    hub.info = hub.download = unreachable
    at = " --revision v1" if revision else ""
    assert find_origin_fails(ID + revision) == (
        f"{ID}: no such folder here, and it cannot be fetched from Hugging Face ([Errno -2] Name "
        f"or service not known). On a machine with network run: hf download {ID}{at} --local-dir "
        "FOLDER, copy FOLDER here, and run: zquant convert FOLDER OUT"
    )


@pytest.mark.parametrize("source", [ID + "@v1", f"hf://{ID}@v1", f"https://hf.co/{ID}/tree/v1"])
def test_an_earlier_download_needs_no_network(source, hub, toy_folder, tmp_path):
    """Other folders that are there in part are not taken for the model."""
    cache = shutil.copytree(toy_folder, tmp_path / "cache")
    hub.download = lambda options: str(cache) if options["local_files_only"] else unreachable()
    hub.info = unreachable
    assert "cannot be fetched" in find_origin_fails(source)  # there is no tokenizer
    (cache / "tokenizer").mkdir()
    found = find_origin(source, {})
    assert found.paths["dit"] == cache / "transformer"
    assert found.label == source
    options = hub.asked[-1][1]
    assert (options["revision"], options["local_files_only"]) == ("v1", True)
    next((cache / "text_encoder").glob("*.safetensors")).unlink()
    assert "cannot be fetched" in find_origin_fails(source)


def test_a_server_that_never_answers_is_given_up(monkeypatch, tmp_path):
    monkeypatch.setattr(remote_hub, "NETWORK_TIMEOUT_S", 0.2)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        api = huggingface_hub.HfApi(endpoint=endpoint, token=False)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        start = time.monotonic()
        assert "cannot be fetched from Hugging Face (" in find_origin_fails("nobody/nothing")
    assert time.monotonic() - start < 10


def test_the_name_of_the_folder_one_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Origin(label=".", paths={}, variant=None, tokenizer=None).name == tmp_path.name
