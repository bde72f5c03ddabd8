"""Models at addresses: what is found there, without a listing and with the hub's."""

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest

from tests import http_server as http
from zquant.errors import CheckpointError, ZQuantError
from zquant.formats import remote_file
from zquant.formats.detect import open_source
from zquant.formats.model_folder import source_metadata
from zquant.formats.origin import find_origin
from zquant.formats.remote_hub import HubAddress, hub_address


@pytest.fixture
def server(toy_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_file, "FIRST_WAIT_S", 0.01)
    with http.serve(shutil.copytree(toy_folder, tmp_path / "toy")) as server:
        yield server


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The server as a hub that holds the folder as owner/name; nothing is in the local cache."""
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    return server


def opened(path):
    source = open_source(path)
    return {n: source.raw(n).tobytes() for n in source.tensors}, dict(source_metadata(source))


def same_model(found, folder):
    for component, path in found.paths.items():
        there = {"dit": "transformer"}.get(component, component)
        assert opened(path) == opened(folder / there)
    return True


def test_a_plain_folder_is_found_by_its_names(server, toy_folder):
    found = find_origin(f"{server.url}/?key=secret", {})
    assert same_model(found, toy_folder)
    assert found.variant.name == "turbo"
    assert found.label == server.url
    assert found.tokenizer is None


def test_the_query_goes_to_the_server_and_into_no_message(server):
    message = fails(f"{server.url}/nothing?key=secret")
    assert f"{server.url}/nothing: none of the files of a model are there" in message
    assert "secret" not in message


def fails(source, **given):
    with pytest.raises(ZQuantError) as failure:
        find_origin(source, given)
    return str(failure.value)


def test_a_password_in_the_address_is_a_login(server):
    find_origin(server.url.replace("//", "//me:pass@"), {})
    assert {asked.authorization for asked in server.asked} == {"Basic bWU6cGFzcw=="}
    assert "pass" not in fails(server.url.replace("//", "//me:pass@") + "/nothing")


def test_a_folder_that_lacks_a_component(server):
    shutil.rmtree(server.folder / "vae")
    assert fails(server.url) == f"{server.url}: lacks vae/. Give a whole model."


def test_a_shard_that_is_missing(server):
    shard = next((server.folder / "transformer").glob("*-of-*.safetensors"), None)
    if shard is None:
        pytest.skip("the toy is in one file")
    shard.unlink()
    with pytest.raises(ZQuantError, match="shards missing"):
        open_source(find_origin(server.url, {}).paths["dit"])


def test_a_store_that_forbids_what_is_missing(server, monkeypatch):
    """As some do unless listing is allowed; where nothing is there, it is a refusal."""
    answer = http.Handler.answer

    def forbid(self, status, *args, **headers):
        answer(self, 403 if status == 404 else status, *args, **headers)

    monkeypatch.setattr(http.Handler, "answer", forbid)
    assert find_origin(server.url, {}).variant.name == "turbo"
    assert "not permitted (HTTP 403)" in fails(f"{server.url}/nothing")


def test_single_files(server, toy_folder):
    files = {c: f"{server.url}/{f}" for c, f in FILES.items()}
    assert same_model(find_origin(None, files), toy_folder)
    files["vae"] += "x.safetensors"
    message = "has no file 'diffusion_pytorch_model.safetensorsx.safetensors'. Check the address."
    assert message in fails(None, **files)


FILES = {
    "dit": "transformer/diffusion_pytorch_model.safetensors.index.json",
    "text_encoder": "text_encoder/model.safetensors.index.json",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}


@pytest.mark.parametrize("source", ["owner/name", "owner/name@v1", "hf://owner/name"])
def test_a_repository_is_read_at_its_commit_and_with_the_login(source, hub, toy_folder):
    found = find_origin(source, {})
    assert same_model(found, toy_folder)
    assert (found.label, found.variant.name) == (source, "turbo")
    files = [asked for asked in hub.asked if not asked.path.startswith("/api")]
    assert all(f"/resolve/{http.COMMIT}/" in asked.path for asked in files)
    assert {asked.authorization for asked in files} == {"Bearer hf_secret"}


def test_the_address_of_the_page_means_the_repository(hub):
    found = find_origin(f"{hub.url}/owner/name/tree/main", {})
    assert found.label == "hf://owner/name@main"


def test_the_token_is_not_sent_to_where_files_are_kept(hub):
    with http.serve(hub.folder) as cdn:
        hub.cdn = cdn.url
        open_source(find_origin("owner/name", {}).paths["dit"])
        assert {asked.authorization for asked in cdn.asked} == {None}
        assert cdn.asked


def test_a_gated_repository_says_what_to_do(hub):
    hub.token = "another"
    assert "A gated or private model needs its terms accepted" in fails("owner/name")


def test_a_small_file_that_is_not_the_listed_one(hub):
    config = hub.folder / "scheduler/scheduler_config.json"
    found = config.read_text()
    listing = http.Handler.listing

    def changed_after(self):
        listing(self)
        config.write_text(found.replace("3", "4"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http.Handler, "listing", changed_after)
        assert "has the git hash" in fails("owner/name")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a/b@v1", HubAddress("a/b", "v1")),
        ("hf://a/b@refs%2Fpr%2F1/c/d.gguf", HubAddress("a/b", "refs/pr/1", "c/d.gguf")),
        ("https://huggingface.co/a/b", HubAddress("a/b", None)),
        ("https://huggingface.co/a/b/", HubAddress("a/b", None)),
        ("https://huggingface.co/a/b/blob/main/c/d.gguf", HubAddress("a/b", "main", "c/d.gguf")),
        ("https://hf.co/a/b/resolve/x/d?download=true", HubAddress("a/b", "x", "d")),
        ("https://huggingface.co.evil/a/b", None),
        ("https://huggingface.co/a", None),
        ("https://example.org/a/b", None),
        ("ftp://huggingface.co/a/b", None),
        ("a/b/c", None),
    ],
)
def test_what_addresses_mean_on_the_hub(source, expected):
    assert hub_address(source) == expected


def test_what_is_no_address():
    with pytest.raises(CheckpointError, match="not an http://, https:// or hf:// address"):
        find_origin("ftp://a/b", {})


def test_offline_mode_is_respected(hub, monkeypatch):
    def model_info(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    assert "cannot be fetched from Hugging Face (offline mode is enabled)" in fails("owner/name")
    assert hub.asked == []


def test_a_listing_with_names_that_cannot_be_printed(monkeypatch):
    files = [SimpleNamespace(rfilename="a\x1b[31m", size=1, lfs=None, blob_id=None)]
    info = SimpleNamespace(sha="c0ffee", siblings=files)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    assert "the repository has no such file or folder" in fails("hf://owner/name")
