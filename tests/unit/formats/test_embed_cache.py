"""The cache gives back what was put, bit for bit, or nothing; it never fails the run."""

import errno
import os
import stat
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

from zquant.formats import embed_cache as subject
from zquant.formats import sealed
from zquant.formats.embed_cache import EmbedCache, embed_key
from zquant.formats.sealed import read_regular, seal, unseal

KEYS = [embed_key(encoder="e", ids=[i], template="t", compute="c") for i in range(9)]
EMBEDS = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
FILE_BYTES = len(seal(EMBEDS, KEYS[0]))
MANY = 2**20


@pytest.fixture
def cache(tmp_path):
    return EmbedCache(tmp_path / "cache", max_bytes=MANY)


def path_of(cache, key):
    return cache.folder / f"{key}.npy"


def kept(cache):
    return {path.name.removesuffix(".npy") for path in cache.folder.iterdir()}


def same_bits(found, expected):
    return found is not None and torch.equal(found.view(torch.int32), expected.view(torch.int32))


def test_what_was_put_comes_back_bit_for_bit(cache):
    embeds = EMBEDS.clone()
    embeds[0, :4] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    assert cache.get(KEYS[0]) is None
    cache.put(KEYS[0], embeds.T.requires_grad_())  # in columns, and in a graph
    cache.put(KEYS[1], embeds)
    found = EmbedCache(cache.folder, max_bytes=MANY).get(KEYS[0])
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert same_bits(found, embeds.T.contiguous())
    assert same_bits(cache.get(KEYS[1]), embeds)
    assert cache.get(KEYS[2]) is None
    found.add_(1)  # a tensor like any other
    assert cache.reason == ""


def test_nothing_is_made_before_the_first_put(cache):
    assert cache.get(KEYS[0]) is None
    assert not cache.folder.exists()


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_prompts_are_private(cache):
    before = os.umask(0)
    try:
        cache.put(KEYS[0], EMBEDS)
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path_of(cache, KEYS[0]).stat().st_mode) == 0o600


def test_numpy_reads_a_file_too(cache):
    cache.put(KEYS[0], EMBEDS)
    array = np.load(path_of(cache, KEYS[0]), allow_pickle=False)
    assert array.tobytes() == EMBEDS.numpy().tobytes()


def test_every_flipped_bit_is_a_miss(cache):
    cache.put(KEYS[0], EMBEDS)
    path = path_of(cache, KEYS[0])
    whole = path.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        assert cache.get(KEYS[0]) is None, at
        assert not path.exists(), at
    assert "damaged; removed, and encoded again" in cache.reason


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 100, 128, FILE_BYTES - 32, FILE_BYTES - 1])
def test_a_truncated_file_is_a_miss_and_replaced(size, cache):
    cache.put(KEYS[0], EMBEDS)
    os.truncate(path_of(cache, KEYS[0]), size)
    assert cache.get(KEYS[0]) is None
    assert kept(cache) == set()
    cache.put(KEYS[0], EMBEDS)
    assert same_bits(cache.get(KEYS[0]), EMBEDS)


def test_a_file_under_another_key_is_a_miss(cache):
    cache.put(KEYS[0], EMBEDS)
    path_of(cache, KEYS[0]).rename(path_of(cache, KEYS[1]))
    assert cache.get(KEYS[1]) is None


def forged(array, allow_pickle=False):
    """A file with a right checksum around any array."""
    file = BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    data = file.getvalue()
    return data + sealed._digest(data, KEYS[0])


def forged_header(text):
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + b"\0" * 80
    return data + sealed._digest(data, KEYS[0])


@pytest.mark.parametrize(
    "data",
    {
        "float64": forged(np.zeros((2, 3))),
        "big-endian": forged(np.zeros((2, 3), ">f4")),
        "in columns": forged(np.zeros((2, 3), np.float32, order="F")),
        "one dimension": forged(np.zeros(3, np.float32)),
        "no dimension": forged(np.zeros((), np.float32)),
        "empty": forged(np.zeros((0, 3), np.float32)),
        "pickle": forged(np.array([{}], object), allow_pickle=True),
        "huge": forged_header(
            "{'descr': '<f4', 'fortran_order': False, 'shape': (999999999, 999)}"
        ),
        "negative": forged_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-4, -5)}"),
        "nested": forged_header("(" * 5000),
        "not npy": b"hello" + sealed._digest(b"hello", KEYS[0]),
        "only a checksum": sealed._digest(b"", KEYS[0]),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_right_checksum_does_not_make_embeddings(data, cache):
    cache.put(KEYS[1], EMBEDS)
    path_of(cache, KEYS[0]).write_bytes(data[1])
    assert cache.get(KEYS[0]) is None
    assert kept(cache) == {KEYS[1]}


@pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")
@pytest.mark.parametrize("kind", ["pipe", "link", "loop"])
def test_what_is_not_a_file_is_a_miss_and_removed(kind, cache, tmp_path):
    cache.put(KEYS[1], EMBEDS)
    path, other = path_of(cache, KEYS[0]), tmp_path / "other"
    other.write_bytes(seal(EMBEDS, KEYS[0]))
    os.mkfifo(path) if kind == "pipe" else path.symlink_to(other if kind == "link" else path)
    assert cache.get(KEYS[0]) is None
    assert kept(cache) == {KEYS[1]}
    assert other.exists()


def test_a_file_of_any_size_is_a_miss(cache):
    cache.put(KEYS[0], EMBEDS)
    os.truncate(path_of(cache, KEYS[0]), 2**40)  # takes no space
    assert cache.get(KEYS[0]) is None
    assert kept(cache) == set()


def test_a_folder_in_the_place_of_a_file(cache):
    path_of(cache, KEYS[0]).mkdir(parents=True)
    assert cache.get(KEYS[0]) is None
    cache.put(KEYS[0], EMBEDS)
    assert "cannot be written" in cache.reason
    assert kept(cache) == {KEYS[0]}  # no part is left


@pytest.mark.parametrize("key", ["", "a", "../" + "a" * 61, "A" * 64, KEYS[0] + "\n", "/" * 64])
def test_a_key_is_never_a_path(key, cache):
    with pytest.raises(ValueError, match="is not one that embed_key makes"):
        cache.get(key)
    with pytest.raises(ValueError, match="is not one that embed_key makes"):
        cache.put(key, EMBEDS)


@pytest.mark.parametrize(
    "embeds", [EMBEDS.double(), EMBEDS.bfloat16(), EMBEDS[None], EMBEDS[:0], EMBEDS[0]]
)
def test_only_embeddings_are_put(embeds, cache):
    with pytest.raises(ValueError, match=r"embeds are float32 \[T, width\]; got torch\."):
        cache.put(KEYS[0], embeds)


def test_the_least_recently_used_go_first(cache):
    cache.max_bytes = 3 * FILE_BYTES + 1
    for key in KEYS[:3]:
        cache.put(key, EMBEDS)
    assert cache.get(KEYS[0]) is not None
    cache.put(KEYS[3], EMBEDS)
    assert kept(cache) == {KEYS[0], KEYS[2], KEYS[3]}
    cache.put(KEYS[2], EMBEDS)  # again: it becomes the newest
    cache.put(KEYS[4], EMBEDS)
    assert kept(cache) == {KEYS[2], KEYS[3], KEYS[4]}
    assert cache.reason == ""


def test_a_smaller_limit_holds_from_the_next_put(cache):
    for key in KEYS[:8]:
        cache.put(key, EMBEDS)
    smaller = EmbedCache(cache.folder, max_bytes=2 * FILE_BYTES)
    assert smaller.get(KEYS[0]) is not None
    smaller.put(KEYS[8], EMBEDS)
    assert kept(cache) == {KEYS[0], KEYS[8]}


def test_what_is_put_stays_even_beside_files_of_the_future(cache):
    cache.max_bytes = 2 * FILE_BYTES
    for key in KEYS[:2]:
        cache.put(key, EMBEDS)
        os.utime(path_of(cache, key), (2**33, 2**33))
    cache.put(KEYS[2], EMBEDS)
    assert KEYS[2] in kept(cache)
    assert len(kept(cache)) == 2


def test_embeddings_larger_than_the_cache_are_not_kept(cache):
    cache.put(KEYS[0], EMBEDS)
    cache.max_bytes = FILE_BYTES - 1
    cache.put(KEYS[1], EMBEDS)
    assert f"take {FILE_BYTES} B; the cache may take {FILE_BYTES - 1} B" in cache.reason
    assert kept(cache) == {KEYS[0]}


def test_only_our_files_are_removed(cache):
    cache.put(KEYS[0], EMBEDS)
    for name in ("notes.txt", "a.npy", "notes.part", KEYS[1], f"{KEYS[1]}.npy.bak"):
        (cache.folder / name).write_bytes(bytes(100))
        os.utime(cache.folder / name, (1, 1))
    others = kept(cache) - {KEYS[0]}
    cache.max_bytes = FILE_BYTES
    cache.put(KEYS[2], EMBEDS)
    assert kept(cache) == {*others, KEYS[2]}


def test_old_parts_of_killed_processes_are_removed(cache):
    cache.put(KEYS[0], EMBEDS)
    now = time.time()
    parts = [cache.folder / f"{KEYS[1]}-{name}.part" for name in ("abc_1", "abc_2")]
    for part, age in zip(parts, (subject._STALE_S + 60, subject._STALE_S - 60), strict=True):
        part.write_bytes(b"x")
        os.utime(part, (now - age, now - age))
    cache.put(KEYS[2], EMBEDS)
    assert [part.exists() for part in parts] == [False, True]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_disk(cache, monkeypatch):
    cache.put(KEYS[0], EMBEDS)

    def full(**options):
        part = options["dir"] / f"{KEYS[1]}-full.part"
        part.touch()
        return os.open("/dev/full", os.O_WRONLY), str(part)

    monkeypatch.setattr(subject.tempfile, "mkstemp", full)
    cache.put(KEYS[1], EMBEDS)
    assert f"{cache.folder}: cannot be written (No space left on device)" == cache.reason
    assert kept(cache) == {KEYS[0]}
    assert same_bits(cache.get(KEYS[0]), EMBEDS)


def test_a_cache_that_can_only_be_read(cache, monkeypatch):
    cache.put(KEYS[0], EMBEDS)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(subject.tempfile, "mkstemp", refuse)
    monkeypatch.setattr(subject.os, "utime", refuse)
    assert same_bits(cache.get(KEYS[0]), EMBEDS)
    assert cache.reason == ""
    cache.put(KEYS[1], EMBEDS)
    assert "cannot be written (Read-only file system)" in cache.reason
    assert cache.get(KEYS[1]) is None


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    cache = EmbedCache(tmp_path / "file" / "cache", max_bytes=MANY)
    assert cache.get(KEYS[0]) is None
    cache.put(KEYS[0], EMBEDS)
    assert "cache: cannot be written (Not a directory)" in cache.reason


def test_a_file_that_cannot_be_read_is_kept(cache, monkeypatch):
    cache.put(KEYS[0], EMBEDS)

    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(subject, "read_regular", refuse)
    assert cache.get(KEYS[0]) is None
    assert "cannot be read (Input/output error)" in cache.reason
    assert kept(cache) == {KEYS[0]}


HAMMER = """
import os, random, sys
from pathlib import Path
import torch
from zquant.formats.embed_cache import EmbedCache, embed_key
keys = [embed_key(encoder="", ids=[i], template="", compute="") for i in range(4)]
embeds = [torch.full((50, 400), float(i)) for i in range(4)]
def work(seed):
    choose, hits = random.Random(seed), 0
    cache = EmbedCache(Path(sys.argv[1]), max_bytes=260_000)  # three of four fit
    for _ in range(300):
        i = choose.randrange(4)
        found = cache.get(keys[i])
        hits += found is not None
        assert found is None or torch.equal(found, embeds[i])
        cache.put(keys[i], embeds[i])
    assert cache.reason == "", cache.reason
    assert hits > 50
pids = []
for seed in range(3):
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work(seed)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    pids.append(pid)
sys.exit(any([os.waitpid(pid, 0)[1] for pid in pids]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_that_share_a_folder_see_whole_files_only(tmp_path):
    """Three write, read and remove the same four files; a file that is not whole has a reason."""
    command = [sys.executable, "-c", HAMMER, str(tmp_path / "cache")]
    subprocess.run(command, check=True, timeout=300)
    left = [path.name for path in (tmp_path / "cache").iterdir()]
    assert 0 < len(left) <= 4
    assert all(name.endswith(".npy") for name in left)


BASE = {"encoder": "e", "ids": [1, 23], "template": "t", "compute": "c"}


def test_a_key_depends_on_everything_and_tells_nothing():
    others = [
        {},
        {"ids": [12, 3]},
        {"ids": [123]},
        {"ids": [1, 23, 0]},
        {"ids": []},
        {"encoder": "e2"},
        {"encoder": "et", "template": ""},
        {"encoder": "", "template": "et"},
        {"encoder": 'e", [1, 23], "t'},
        {"template": "tc", "compute": ""},
        {"template": "c", "compute": "t"},
        {"compute": "\ud800"},
        {"compute": "\\ud800"},
    ]
    keys = {embed_key(**{**BASE, **other}) for other in others}
    assert len(keys) == len(others)
    assert all(subject._KEY.fullmatch(key) for key in keys)


def test_a_key_is_the_same_in_every_process_and_for_any_integers():
    assert embed_key(**{**BASE, "ids": np.array([1, 23])}) == embed_key(**BASE)
    assert embed_key(**{**BASE, "ids": torch.tensor([1, 23])}) == embed_key(**BASE)
    # written down: another value would make every cache on disk useless
    assert embed_key(**BASE).startswith("245f60f87e6a283cd9e6e2df198a0059")


@pytest.mark.parametrize("note", [b"", b"note"])
def test_a_note_travels_with_the_array(note):
    sealed = seal(EMBEDS, "label", note)
    array, found = unseal(sealed, "label", note_bytes=len(note))
    assert same_bits(array, EMBEDS)
    assert found == note
    assert unseal(sealed, "label", note_bytes=len(note) + 1) is None
    assert unseal(sealed, "other", note_bytes=len(note)) is None
    assert unseal(sealed, "label", note_bytes=10**6) is None


def test_a_file_that_grows_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    assert read_regular(path, 100) == bytes(100)
    assert read_regular(path, 99) is None
    monkeypatch.setattr(Path, "lstat", lambda _: os.stat_result([stat.S_IFREG] + [0] * 9))
    assert read_regular(path, 99) is None
