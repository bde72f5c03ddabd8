"""A model is converted from a server to the same bytes as from a folder, whatever happens on the
way, and nothing but the outputs is on the disk."""

import json
import pickle
import threading
import time
from dataclasses import replace

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests import http_server as http
from zquant.cli.main import main
from zquant.convert import fetch, slabs
from zquant.convert.execute import convert
from zquant.convert.plan import ConvertRequest, plan_conversion
from zquant.convert.summary import plan_rows
from zquant.errors import FormatError, ZQuantError
from zquant.formats import remote_file
from zquant.formats.detect import open_source
from zquant.formats.names import Part
from zquant.formats.remote_folder import web_path
from zquant.quant.qtypes import QTYPES

FILES = ("dit-BF16.gguf", "text_encoder-BF16.gguf", "vae.safetensors")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote_file, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(remote_file, "HEAD_BYTES", 2**12)  # or small files would be all head


@pytest.fixture
def server(official):
    with http.serve(official) as server:
        yield server


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    return server


def same(out, expected):
    """Whether every file is the same, but for the name of the source."""
    files = {p.name for p in out.iterdir()}
    assert files == {p.name for p in expected.iterdir()}
    for name in files - {"model.json"}:
        assert (out / name).read_bytes() == (expected / name).read_bytes(), name
    ours, theirs = (json.loads((f / "model.json").read_text()) for f in (out, expected))
    return {**ours, "source": ""} == {**theirs, "source": ""}


def test_an_id_is_converted_without_a_download(hub, run, look, bf16, tmp_path, capsys, official):
    hub.folder = official.parent
    named = hub.url + "/mini"
    run(source=named, out=tmp_path / "plain", qtype="BF16")
    assert same(tmp_path / "plain", bf16)
    hub.folder = official
    assert main(["convert", "owner/mini", str(tmp_path / "hub"), "--qtype", "BF16"]) == 0
    assert same(tmp_path / "hub", bf16)
    assert "are read over the network, and not kept" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


def test_a_slab_takes_its_own_bytes_to_another_process(hub, official, tmp_path, monkeypatch):
    monkeypatch.setattr(slabs, "SLAB_WEIGHTS", 2**14)
    far, near = (
        plan_conversion(ConvertRequest(source=source, out=tmp_path))
        for source in ("owner/mini", str(official))
    )
    for filled, local in zip(fetch.fetched(plan_slabs(far)), plan_slabs(near), strict=True):
        packed = pickle.dumps(filled)
        n_bytes = (local.rows[1] - local.rows[0]) * local.part.qtype.row_bytes(local.part.shape[-1])
        assert n_bytes <= len(packed) < n_bytes + 3000
        there = pickle.loads(packed)
        ours, theirs = np.zeros(n_bytes, np.uint8), np.zeros(n_bytes, np.uint8)
        start = local.rows[0] * (n_bytes // (local.rows[1] - local.rows[0]))
        there.part.read_into(start, ours)
        local.part.read_into(start, theirs)
        assert ours.tobytes() == theirs.tobytes()


def test_files_at_addresses(server, run, comfy, look, q4, tmp_path):
    server.folder = comfy["dit"].parent
    files = {part: f"{server.url}/{path.name}" for part, path in comfy.items()}
    run(**files, out=tmp_path / "far")
    run(**comfy, out=tmp_path / "near")
    assert same(tmp_path / "far", tmp_path / "near")


def test_only_needed_bytes_are_asked_for(hub, official, tmp_path):
    plan = plan_conversion(ConvertRequest(source="owner/mini", out=tmp_path, qtype="BF16"))
    needed = sum(p.nbytes for o in plan.outputs for t in o.tensors for p in t.parts)
    headers = sum(asked.n_bytes for asked in hub.asked)
    convert(plan)
    assert sum(asked.n_bytes for asked in hub.asked) == needed + headers
    assert any("are read over the network" in row for row in plan_rows(plan))


def test_a_bad_network_changes_no_byte(hub, run, bf16, tmp_path):
    plan = plan_conversion(ConvertRequest(source="owner/mini", out=tmp_path / "o", qtype="BF16"))
    hub.faults += [http.drop(1000), http.status(503), http.fine, http.status(429)] * 5
    convert(plan)
    assert hub.faults == []
    assert same(tmp_path / "o", bf16)


def test_a_server_that_dies_is_resumed_from(hub, run, bf16, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_file, "READ_PATIENCE_S", 1)
    request = {"source": "owner/mini", "out": tmp_path / "o", "qtype": "BF16", "threads": 1}
    plan = plan_conversion(ConvertRequest(**request))
    first = plan_slabs(plan)[0].part.offset  # a request of 1 MB, far more than the headers
    hub.faults += [http.fails_but_at(first)] * 10000
    with pytest.raises(ZQuantError, match=r"no bytes from the server .* \(HTTP 500\).*--resume"):
        convert(plan)
    hub.faults.clear()
    n_asked = len(hub.asked)
    run(**request, resume=True)
    assert same(tmp_path / "o", bf16)
    plan = plan_conversion(ConvertRequest(**request))
    needed = sum(p.nbytes for o in plan.outputs for t in o.tensors for p in t.parts)
    assert sum(asked.n_bytes for asked in hub.asked[n_asked:]) < needed


def test_a_file_that_changes_ends_the_conversion(server, official, tmp_path):
    plan = plan_conversion(ConvertRequest(source=server.url, out=tmp_path, qtype="BF16"))
    server.tag = '"two"'
    with pytest.raises(FormatError, match=r"changed on the server: .* Start again; what was"):
        convert(plan)
    assert not (tmp_path / "model.json").exists()


def test_a_changed_file_is_not_resumed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_file, "READ_PATIENCE_S", 1)
    request = {"source": server.url, "out": tmp_path, "qtype": "BF16", "threads": 1}
    plan = plan_conversion(ConvertRequest(**request))
    server.faults += [http.fine] * 20 + [http.status(500)] * 10000
    with pytest.raises(ZQuantError):
        convert(plan)
    server.faults.clear()
    server.tag = '"two"'
    with pytest.raises(ZQuantError, match="made from another source"):
        convert(plan_conversion(ConvertRequest(**request, resume=True)))


def plan_slabs(plan):
    return [s for o in plan.outputs for s in slabs.slabs_of(o.tensors)]


def test_neighbours_are_one_request_up_to_a_limit(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(slabs, "SLAB_WEIGHTS", 2**12)
    monkeypatch.setattr(fetch, "RUN_BYTES", 2**16)
    plan = plan_conversion(ConvertRequest(source="owner/mini", out=tmp_path))
    given = plan_slabs(plan)
    n_before = len(hub.asked)
    filled = list(fetch.fetched(given))
    assert [(s.name, s.rows) for s in filled] == [(s.name, s.rows) for s in given]
    sizes = [asked.n_bytes for asked in hub.asked[n_before:]]
    assert max(sizes) == 2**16
    assert len(sizes) < len(given) / 2


def test_scales_come_with_their_weights(server, tmp_path):
    tensors = {"w": torch.arange(64, dtype=torch.int8).view(4, 16), "s": torch.rand(4)}
    save_file(tensors, tmp_path / "w.safetensors")
    server.folder = tmp_path
    found = []
    for path in (tmp_path / "w.safetensors", web_path(f"{server.url}/w.safetensors")):
        infos = open_source(path).tensors
        part = Part(replace(infos["w"], scale=infos["s"]), None, (4, 16))
        slab = slabs.Slab("w", QTYPES["F32"], part, (0, 4), 0, True)
        (filled,) = fetch.fetched([slab])
        found.append(pickle.loads(pickle.dumps(filled)).part)
    assert torch.equal(found[0].scaling.factors, found[1].scaling.factors)
    assert torch.equal(found[1].scaling.factors, tensors["s"])
    assert found[0].raw().tobytes() == found[1].raw().tobytes()


def test_no_more_than_a_bounded_number_of_bytes_waits(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(slabs, "SLAB_WEIGHTS", 2**12)
    monkeypatch.setattr(fetch, "RUN_BYTES", 2**14)
    monkeypatch.setattr(fetch, "AHEAD_BYTES", 2**16)
    plan = plan_conversion(ConvertRequest(source="owner/mini", out=tmp_path))
    n_before = len(hub.asked)
    stream = fetch.fetched(plan_slabs(plan))
    next(stream)
    time.sleep(0.3)
    assert 0 < sum(asked.n_bytes for asked in hub.asked[n_before:]) <= 2**16 + 2**14
    stream.close()


def test_closing_ends_the_threads_even_while_they_wait(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_file, "READ_PATIENCE_S", 600)
    monkeypatch.setattr(remote_file, "FIRST_WAIT_S", 300)
    given = plan_slabs(plan_conversion(ConvertRequest(source="owner/mini", out=tmp_path)))
    part = given[0].part
    n_before, before = len(hub.asked), set(threading.enumerate())
    hub.faults += [http.fails_but_at(part.offset)] * 10000  # whichever thread comes first
    stream = fetch.fetched(given)
    next(stream)
    until = time.monotonic() + 60
    while all(asked.status != 500 for asked in hub.asked[n_before:]):
        assert time.monotonic() < until, "no request failed, so no thread waits"
        time.sleep(0.01)
    ours = [t for t in set(threading.enumerate()) - before if "_work" in t.name]  # not the server's
    assert ours
    stream.close()
    for thread in ours:
        thread.join(30)
        assert not thread.is_alive()
