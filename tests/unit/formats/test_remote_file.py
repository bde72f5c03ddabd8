"""`RemoteFile`: the bytes of a file on a server, whatever the network does meanwhile."""

import hashlib
import pickle
import re
import threading
import time
from itertools import pairwise

import numpy as np
import pytest

from tests import http_server as http
from zquant.errors import FormatError, ZQuantError
from zquant.formats import remote_file, remote_http
from zquant.formats.remote_file import RemoteFile
from zquant.formats.remote_http import Entry, Refused

DATA = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8).tobytes()
FAR = 1_000_000  # beyond what opening reads


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_file, "FIRST_WAIT_S", 0.01)
    (tmp_path / "w.bin").write_bytes(DATA)
    with http.serve(tmp_path) as server:
        yield server


def entry(server, name="w.bin", **fields):
    return Entry(name=f"far/{name}", url=f"{server.url}/{name}", **fields)


def some_of(file, offset=FAR, size=1_500_000):
    out = np.zeros(size, np.uint8)
    file.read_into(offset, out)
    return out.tobytes()


def fails(action, *args):
    with pytest.raises(ZQuantError) as failure:
        action(*args)
    return str(failure.value)


def test_the_bytes_are_those_of_the_file(server):
    file = RemoteFile(entry(server))
    assert (file.size, file.name) == (len(DATA), "far/w.bin")
    assert some_of(file) == DATA[FAR : FAR + 1_500_000]
    assert file.read(len(DATA) - 5, 5).tobytes() == DATA[-5:]


def test_a_beginning_is_read_once_and_grows(server):
    file = RemoteFile(entry(server))
    assert file.read(0, 8).tobytes() == DATA[:8]
    assert file.read(8, 200_000).tobytes() == DATA[8:200_008]
    assert len(server.asked) == 1
    assert file.read(0, 300_000).tobytes() == DATA[:300_000]
    assert file.read(100_000, 400_000).tobytes() == DATA[100_000:500_000]
    assert sum(asked.n_bytes for asked in server.asked) == 2 * remote_file.HEAD_BYTES


def test_only_what_is_needed_passes_over_the_wire(server):
    file = RemoteFile(entry(server))
    some_of(file, FAR, 12345)
    assert [asked.n_bytes for asked in server.weights()] == [12345]


def test_a_dropped_connection_goes_on_where_it_broke(server):
    file = RemoteFile(entry(server))
    server.faults += [http.drop(400_000), http.drop(500_000)]
    assert some_of(file) == DATA[FAR : FAR + 1_500_000]
    starts = [int(asked.range[6:].split("-")[0]) for asked in server.weights()]
    assert starts[0] == FAR
    assert all(after > before for before, after in pairwise(starts))
    assert starts[-1] <= FAR + 900_000  # what was not seen to arrive is asked for again
    assert sum(asked.n_bytes for asked in server.weights()) < 1_500_000 + 2 * 131_072


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_a_server_in_trouble_is_asked_again(code, server):
    file = RemoteFile(entry(server))
    server.faults += [http.status(code), http.status(code)]
    assert some_of(file) == DATA[FAR : FAR + 1_500_000]


def test_a_server_says_how_long_to_wait(server):
    file = RemoteFile(entry(server))
    server.faults += [http.status(429, Retry_After="1")]
    start = time.monotonic()
    some_of(file)
    assert time.monotonic() - start > 0.9


def test_longer_than_our_patience_is_not_waited_for(server):
    file = RemoteFile(entry(server))
    server.faults += [http.status(503, Retry_After="3600")]
    assert re.fullmatch(
        r"far/w\.bin: at byte 1000000 of 3000000: no bytes from the server for [\d.]+ s \(HTTP "
        r"503, it asks to wait 60 min 00 s\)\. Check the connection and run again with --resume, "
        r"which goes on from what is done\.",
        fails(some_of, file),
    )


def test_a_dead_server_is_given_up_in_bounded_time(server, monkeypatch):
    monkeypatch.setattr(remote_file, "READ_PATIENCE_S", 1)
    file = RemoteFile(entry(server))
    server.faults += [http.drop(300_000), *[http.status(500)] * 1000]
    start = time.monotonic()
    message = fails(some_of, file)
    assert time.monotonic() - start < 30
    assert "of 3000000: no bytes from the server for" in message
    assert "(HTTP 500). Check the connection and run again with --resume" in message


def test_nobody_there(monkeypatch):
    entry = Entry(name="far/w.bin", url="http://127.0.0.1:9/w.bin")
    monkeypatch.setattr(remote_file, "OPEN_PATIENCE_S", 0.2)
    assert "refuses the connection" in fails(RemoteFile, entry)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (401, "not permitted (HTTP 401). A gated or private model needs its terms accepted"),
        (403, "a login: hf auth login"),
        (404, "no such file (HTTP 404). Check the address"),
        (410, "no such file (HTTP 410)"),
        (418, "the server answers HTTP 418; expected 200 or 206"),
    ],
)
def test_a_refusal_is_final_and_says_what_to_do(code, expected, server):
    server.faults += [http.status(code)]
    assert expected in fails(RemoteFile, entry(server))
    assert len(server.asked) == 1


def test_a_server_without_ranges_is_refused_for_weights(server):
    server.ranges = False
    file = RemoteFile(entry(server))
    assert file.read(0, 100).tobytes() == DATA[:100]
    assert "sends no ranges (HTTP 200; expected 206)" in fails(some_of, file)


def test_a_small_file_needs_no_ranges(server, tmp_path):
    server.ranges = False
    (tmp_path / "c.json").write_bytes(DATA[:400_000])
    assert RemoteFile(entry(server, "c.json")).whole() == DATA[:400_000]


@pytest.mark.parametrize("kind", ["sha256", "git"])
def test_a_small_file_is_compared_with_its_hash(kind, server):
    sums = {
        "sha256": hashlib.sha256(DATA).hexdigest(),
        "git": hashlib.sha1(b"blob 3000000\0" + DATA).hexdigest(),
    }
    assert RemoteFile(entry(server, digest=f"{kind}:{sums[kind]}")).whole() == DATA
    message = fails(RemoteFile(entry(server, digest=f"{kind}:ab")).whole)
    assert f"has the {kind} hash {sums[kind]}; its listing says ab" in message


def test_a_large_file_is_never_read_whole(server, monkeypatch):
    monkeypatch.setattr(remote_file, "SMALL_BYTES", 2**20)
    with pytest.raises(FormatError, match=r"has 2\.9 MiB; expected a small text file of 1\.0 MiB"):
        RemoteFile(entry(server)).whole()


def test_a_file_that_changes_is_an_error(server, tmp_path):
    file = RemoteFile(entry(server))
    server.tag = '"two"'
    message = fails(some_of, file)
    assert "has changed on the server: its tag was '\"one\"' and is '\"two\"'" in message
    server.tag = '"one"'
    (tmp_path / "w.bin").write_bytes(DATA + b"more")
    assert "it had 3000000 bytes and has 3000004" in fails(some_of, file)


def test_a_pinned_file_may_come_from_servers_that_tag_differently(server):
    file = RemoteFile(entry(server, pinned=True))
    server.tag = '"two"'
    assert some_of(file) == DATA[FAR : FAR + 1_500_000]


def test_another_size_than_listed(server):
    assert "listed with 7 bytes, it has 3000000" in fails(RemoteFile, entry(server, size=7))


def test_an_empty_file(server, tmp_path):
    (tmp_path / "none").touch()
    assert "the file is empty" in fails(RemoteFile, entry(server, "none"))


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Content_Range": "bytes 5-9/3000000"}, "asked for bytes 1000000 to 2500000"),
        ({"Content_Range": "nonsense"}, "the server sends 0 to 0"),
        ({"Content_Range": f"bytes {FAR}-{FAR}/{10**19}"}, "claims 10000000000000000000 bytes"),
        ({"Content_Encoding": "gzip"}, "comes as 'gzip', which was not asked for"),
    ],
)
def test_an_answer_against_the_rules(headers, expected, server):
    file = RemoteFile(entry(server))
    server.faults += [http.status(206, **headers)]
    assert expected in fails(some_of, file)


def test_redirects_are_followed_and_a_login_stays_with_its_host(server, tmp_path):
    with http.serve(tmp_path) as other:
        server.faults += [http.status(302, Location=f"{other.url}/w.bin?signature=1")]
        file = RemoteFile(entry(server, login={"Authorization": "Bearer secret"}))
        assert some_of(file) == DATA[FAR : FAR + 1_500_000]
        assert {asked.authorization for asked in server.asked} == {"Bearer secret"}
        assert {asked.authorization for asked in other.asked} == {None}
        assert len(server.asked) == 1  # the second request went where the first had ended
        other.faults += [http.status(403)]  # the signature has expired
        assert some_of(file, FAR, 10) == DATA[FAR : FAR + 10]
        assert len(server.asked) == 2


def test_redirects_that_are_not_followed(server):
    server.faults += [http.status(302, Location="/w.bin")] * 10
    assert "redirected more than 5 times" in fails(RemoteFile, entry(server))
    server.faults[:] = [http.status(302, Location="file:///etc/passwd")]
    assert "redirected to nowhere ('file')" in fails(RemoteFile, entry(server))


def test_https_is_never_left():
    entry = Entry(name="far/w.bin", url="https://a/w.bin")
    message = fails(remote_http._redirected, entry, entry.url, "http://a/w.bin")
    assert "redirected from https to http" in message


def test_reading_stops_when_nobody_wants_it(server):
    file, stop = RemoteFile(entry(server)), threading.Event()
    stop.set()
    assert "stopped" in fails(file.read_into, FAR, np.zeros(10, np.uint8), stop)


def test_the_stamp_is_the_content_s(server):
    stamps = [RemoteFile(entry(server)).stamp for _ in range(2)]
    assert stamps[0] == stamps[1] == ["far/w.bin", 3000000, '"one"']
    sha256 = hashlib.sha256(DATA).hexdigest()
    assert RemoteFile(entry(server, digest=f"sha256:{sha256}")).stamp[2] == f"sha256:{sha256}"


def test_another_process_opens_the_file_anew(server):
    again = pickle.loads(pickle.dumps(RemoteFile(entry(server))))
    assert some_of(again, FAR, 99) == DATA[FAR : FAR + 99]


def test_a_refusal_says_its_status(server):
    with pytest.raises(Refused) as failure:
        RemoteFile(entry(server, "nothing"))
    assert failure.value.status == 404
