"""What an earlier run left in OUT: parts are not lost by accident, work is not done twice, and two
conversions do not write into each other's parts."""

import errno
import json
import os
import shutil
from collections import namedtuple

import pytest

from zquant.cli.main import main
from zquant.convert.earlier import alone_in
from zquant.convert.execute import convert
from zquant.convert.plan import ConvertRequest, plan_conversion
from zquant.errors import ZQuantError
from zquant.formats.locked import take_lock, unlock

LOCK = ".part.lock"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def interrupted(official, tmp_path):
    """OUT after Ctrl-C in the text encoder of a conversion to Q8_0; gives its path."""
    out = tmp_path / "out"
    plan = plan_conversion(ConvertRequest(source=str(official), out=out, qtype="Q8_0"))

    def stop(name, n_weights):
        if name.startswith("text_encoder") and n_weights:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan, stop)
    return out


@pytest.mark.parametrize("qtype", ["Q8_0", "BF16"], ids=["the same", "another"])
def test_without_resume_interrupted_work_is_not_lost(qtype, interrupted, official, look, capsys):
    before = look.contents(interrupted)
    command = ["convert", str(official), str(interrupted), "--qtype", qtype]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert f"error: {interrupted}: an interrupted conversion is here (done: dit-Q8_0.gguf " in err
    assert "Go on with --resume" in err
    assert err.endswith("to start anew, remove the .part and .part.journal files.\n")
    assert look.contents(interrupted) == before
    for path in interrupted.glob("*.part*"):
        path.unlink()
    assert main(command) == 0


def test_parts_that_hold_nothing_are_in_nobodys_way(official, bf16, run, look, tmp_path):
    part = tmp_path / "dit-Q4_K_M.gguf.part"
    part.write_bytes(b"a header")
    part.with_name(part.name + ".journal").write_text('"of a run killed at its start"\n')
    # nor what its journal does not know, or what is not there any more
    (tmp_path / "dit-BF16.gguf.part").write_bytes(b"of another program")
    journal = '"x"\n{"start": 8, "size": 9, "crc32": 1, "note": null}\n'
    (tmp_path / "text_encoder-BF16.gguf.part.journal").write_text(journal)
    run(source=str(official), out=tmp_path, qtype="BF16")
    assert look.contents(tmp_path) == look.contents(bf16)


def test_a_second_conversion_into_the_same_folder_is_refused(official, look, tmp_path, capsys):
    with alone_in(tmp_path):
        before = look.contents(tmp_path)
        assert main(["convert", str(official), str(tmp_path), "--qtype", "BF16"]) == 1
        err = capsys.readouterr().err
        assert f"{tmp_path}: process {os.getpid()} works in this folder. Wait until it has" in err
        assert "or choose another OUT." in err
        assert look.contents(tmp_path) == before
    assert look.contents(tmp_path) == {}


def test_a_lock_file_of_a_dead_process_means_nothing(official, bf16, run, look, tmp_path):
    (tmp_path / LOCK).write_text("999999999\n")
    run(source=str(official), out=tmp_path, qtype="BF16")
    assert look.contents(tmp_path) == look.contents(bf16)


def test_a_folder_without_a_place_for_the_lock(official, run, tmp_path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(ZQuantError, match=r"cannot be written \(Is a directory\)\. Choose a fol"):
        run(source=str(official), out=tmp_path, qtype="BF16")


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    unlock(take_lock(tmp_path / LOCK, "choose another OUT"), tmp_path / LOCK)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def whole(bf16, tmp_path):
    """A finished conversion to BF16; gives its folder."""
    return shutil.copytree(bf16, tmp_path / "whole")


def test_resuming_what_is_complete_writes_nothing(official, whole, look, capsys, monkeypatch):
    monkeypatch.setattr("zquant.convert.execute.convert", None)  # not called
    command = ["convert", str(official), str(whole), "--qtype", "BF16", "--resume"]
    before = look.contents(whole)
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"{whole}: complete; without --resume it is written anew\n"
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(before["model.json"])
    assert look.contents(whole) == before


def cut_off(whole):
    os.truncate(whole / "dit-BF16.gguf", 5000)


def other_header(whole):
    with (whole / "vae.safetensors").open("r+b") as file:
        file.seek(20)
        file.write(b"?")


def no_manifest(whole):
    (whole / "model.json").unlink()


@pytest.mark.parametrize("damage", [cut_off, other_header, no_manifest], ids=lambda d: d.__name__)
def test_what_is_not_complete_is_converted_with_resume(damage, official, bf16, whole, look, capsys):
    damage(whole)
    assert main(["convert", str(official), str(whole), "--qtype", "BF16", "--resume"]) == 0
    assert "done in " in capsys.readouterr().out
    assert look.contents(whole) == look.contents(bf16)


@pytest.mark.parametrize("words", [["--variant", "base"], ["--tensor-type", "qkv=F16"]], ids=str)
def test_what_was_made_with_other_options_is_not_complete(words, official, whole, look, capsys):
    before = look.contents(whole)
    command = ["convert", str(official), str(whole), "--qtype", "BF16", "--resume", *words]
    assert main(command) == 0
    assert "done in " in capsys.readouterr().out
    assert look.contents(whole) != before
    assert look.is_whole(whole)


def test_a_dry_run_notes_that_the_disk_is_too_small(official, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 10**6))
    assert main(["convert", str(official), str(tmp_path / "out"), "--dry-run"]) == 0
    printed, err = capsys.readouterr()
    assert " in all, variant turbo" in printed
    assert "MiB are needed, 976.6 KiB are free" in err


def test_the_disk_and_the_parts_are_looked_at_before_measuring_for_a_size(
    official, tmp_path, interrupted, capsys, monkeypatch
):
    def measured(*_):
        raise AssertionError

    monkeypatch.setattr("zquant.convert.target_size.measure_losses", measured)
    command = ["convert", str(official), str(interrupted), "--target-size", "1GiB"]
    assert main(command) == 1
    assert "an interrupted conversion is here" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 10**3))
    assert main([*command[:2], str(tmp_path / "other"), *command[3:]]) == 1
    assert "are needed, 1000 B are free" in capsys.readouterr().err
