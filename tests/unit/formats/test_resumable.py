"""A file written in pieces: resumed byte for byte after anything that can happen to it."""

import errno
import hashlib
import json
import os
import zlib
from pathlib import Path

import pytest

from zquant.errors import PlanError, ZQuantError
from zquant.formats.resumable import ResumableFile, bytes_kept, sha256_of

START, HEADER = b"?eader", b"header"  # as it is first, and with what is known at the end
PIECES = [b"a" * 1000, b"", b"b" * 5, b"tail"]
ZEROS = bytes(8)  # after the first piece and at the end
WHOLE = HEADER + PIECES[0] + ZEROS + b"".join(PIECES[1:]) + ZEROS


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.gguf"


def write(path, n=99, *, resume=False, fingerprint="work"):
    """The pieces up to `n` that are not there yet; gives the file and where it went on."""
    file = ResumableFile(path, fingerprint, START, resume=resume)
    start = len(file.notes)
    for i, piece in enumerate(PIECES[start:n], start):
        if i == 1:
            file.pad(len(HEADER + PIECES[0] + ZEROS))
        file.append(piece[:3], None, last=False)
        file.append(piece[3:], {"piece": i})
    if n > len(PIECES):
        file.pad(len(WHOLE))
    return file, start


def finish(path):
    """Resumes, checks that the whole file comes out; gives the piece it went on from."""
    file, start = write(path, resume=True)
    assert file.notes == [{"piece": i} for i in range(len(PIECES))]
    assert file.checksums == [zlib.crc32(piece) for piece in PIECES]
    assert file.size == len(WHOLE)
    file.seal(HEADER)
    assert sha256_of(file.written) == hashlib.sha256(WHOLE).hexdigest()
    file.publish()
    file.clean_up()
    assert path.read_bytes() == WHOLE
    assert list(path.parent.iterdir()) == [path]
    return start


def part_of(path):
    return path.with_name(path.name + ".part"), path.with_name(path.name + ".part.journal")


def test_the_name_is_taken_only_by_publishing(path):
    path.write_bytes(b"old")
    file, _ = write(path)
    file.seal(HEADER)
    assert path.read_bytes() == b"old"
    file.publish()
    assert path.read_bytes() == WHOLE


@pytest.mark.parametrize("n", range(len(PIECES) + 1))
def test_resumed_after_every_piece(n, path):
    write(path, n)[0].close()
    assert finish(path) == n


def test_a_sealed_file_is_resumed_whole(path):
    write(path)[0].seal(HEADER)
    assert finish(path) == len(PIECES)


@pytest.mark.parametrize("garbage", [b"x", b"\0" * 10_000, WHOLE])
def test_garbage_at_the_end_of_the_part_is_cut_off(garbage, path):
    write(path, 3)[0].close()
    with part_of(path)[0].open("ab") as file:
        file.write(garbage)
    assert finish(path) == 3


@pytest.mark.parametrize(
    ("at", "start"), [(0, 3), (5, 3), (6, 0), (1005, 0), (1006, 1), (1013, 1), (1014, 2)]
)
def test_a_flipped_byte_costs_the_pieces_from_there(at, start, path):
    write(path, 3)[0].close()
    data = bytearray(part_of(path)[0].read_bytes())
    data[at] ^= 1
    part_of(path)[0].write_bytes(data)
    assert finish(path) == start


@pytest.mark.parametrize(
    ("size", "start"), [(0, 0), (3, 0), (6, 0), (500, 0), (1006, 1), (1010, 1), (1014, 2)]
)
def test_a_part_that_lost_its_end(size, start, path):
    write(path, 3)[0].close()
    os.truncate(part_of(path)[0], size)
    assert finish(path) == start


def test_a_journal_torn_anywhere(path):
    write(path, 3)[0].close()
    part, journal = part_of(path)
    data, lines = part.read_bytes(), journal.read_bytes()
    for size in range(0, len(lines), 7):
        part.write_bytes(data)
        journal.write_bytes(lines[:size])
        assert finish(path) == max(0, lines[:size].count(b"\n") - 1)


@pytest.mark.parametrize(
    "line",
    [
        *(b"5", b"null", b'{"size": "1"}', b"\0\0\0", b"[]"),
        b'{"start": 1, "size": 9, "crc32": 0, "note": 0}',
    ],
)
def test_lines_that_are_no_pieces_count_for_nothing(line, path):
    write(path, 2)[0].close()
    with part_of(path)[1].open("ab") as journal:
        journal.write(line + b"\n")
    assert finish(path) == 2


def test_other_work_is_refused(path):
    write(path, 2)[0].close()
    before = [p.read_bytes() for p in part_of(path)]
    message = (
        r"a\.gguf\.part: made from another source, with other options or by another version; .* "
    )
    with pytest.raises(ZQuantError, match=message + "To start anew, remove it and a.gguf.part.jou"):
        ResumableFile(path, "other work", START, resume=True)
    assert [p.read_bytes() for p in part_of(path)] == before


def test_without_resume_everything_starts_over(path):
    write(path, 2)[0].close()
    file, start = write(path, fingerprint="other work")
    file.close()
    assert start == 0
    assert json.loads(part_of(path)[1].read_text().splitlines()[0]) == "other work"


def test_what_is_kept_is_what_the_journal_vouches_for(path):
    assert bytes_kept(path) == 0
    write(path, 0)[0].close()
    assert bytes_kept(path) == 0  # a header is no work
    write(path, 3)[0].close()
    assert bytes_kept(path) == len(HEADER + PIECES[0] + ZEROS + PIECES[2])
    os.truncate(part_of(path)[0], 500)
    assert bytes_kept(path) == 500
    part_of(path)[0].unlink()
    path.write_bytes(WHOLE)  # an older file, not what the journal is about
    assert bytes_kept(path) == 0
    file, _ = write(path)
    file.seal(HEADER)
    file.publish()
    assert bytes_kept(path) == len(HEADER + PIECES[0] + ZEROS + b"".join(PIECES[1:]))


def test_killed_after_taking_the_name(path):
    file, _ = write(path)
    file.seal(HEADER)
    file.publish()
    assert finish(path) == len(PIECES)


def test_killed_between_the_final_header_and_the_journals_last_line(path):
    write(path)[0].seal(HEADER)
    part, journal = part_of(path)
    assert part.read_bytes() == WHOLE
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    assert finish(path) == len(PIECES)


def test_an_older_file_under_the_name_is_no_part(path):
    path.write_bytes(WHOLE)  # the same work done before, complete
    write(path, 3)[0].close()
    part_of(path)[0].unlink()
    assert finish(path) == 0


@pytest.mark.parametrize("damage", [0, -1], ids=["header", "last piece"])
def test_a_published_file_that_was_damaged_is_written_again(damage, path):
    file, _ = write(path)
    file.seal(HEADER)
    file.publish()
    at = damage if damage >= 0 else len(WHOLE) - len(ZEROS) + damage
    path.write_bytes(WHOLE[:at] + b"?" + WHOLE[at + 1 :])
    assert finish(path) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_disk(path):
    part_of(path)[0].symlink_to("/dev/full")
    file = ResumableFile(path, "work", START, resume=False)
    message = r"a\.gguf\.part: the disk is full\. Free some space and run again with --resume"
    with pytest.raises(PlanError, match=message):
        file.append(b"x", None)
    file.close()
    part_of(path)[0].unlink()
    assert finish(path) == 0


@pytest.mark.parametrize("step", ["append", "seal"])
def test_other_failures_name_the_file_and_the_reason(step, path, monkeypatch):
    file, _ = write(path, 1)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(file, "_write_line", fail)
    message = r"a\.gguf\.part: cannot be written \(Input/output error\)\. Choose a folder"
    with pytest.raises(ZQuantError, match=message):
        file.append(b"x", None) if step == "append" else file.seal(HEADER)
    file.close()
    monkeypatch.undo()
    assert finish(path) == 1


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ZQuantError, match=r"cannot be written \(No such file or directory\)"):
        ResumableFile(tmp_path / "no" / "a.gguf", "work", START, resume=False)
