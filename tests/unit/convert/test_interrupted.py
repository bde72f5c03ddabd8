"""A conversion that is killed or interrupted at any moment leaves the old output or what `--resume`
finishes to the same bytes; a half file never looks valid."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.http_server import serve
from zquant.cli.main import main
from zquant.quant.qtypes import QTYPES

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

PUBLISHING = 13  # moments from the first look at model.json.part on


@pytest.fixture(scope="module")
def interrupted():
    """Runs the command in a child of another process; see killable.py."""
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("killable.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:

        def interrupted(argv, out, number=signal.SIGKILL, moment=0):
            request = {"argv": argv, "out": str(out), "signal": int(number), "moment": moment}
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield interrupted
        process.stdin.close()


@pytest.fixture(scope="module")
def command(official):
    """The command under test for an OUT: the fastest policy, in threads that fork well."""
    options = ["--qtype", "BF16", "--threads", "1"]
    return lambda out, *more, source=official: ["convert", str(source), str(out), *options, *more]


@pytest.fixture(scope="module")
def n_moments(interrupted, command, bf16, look, tmp_path_factory):
    """Moments of a run that is not interrupted and replaces an older output."""
    out = tmp_path_factory.mktemp("whole")
    assert interrupted(command(out), out)["code"] == 0
    done = interrupted(command(out), out)
    assert done["code"] == 0
    assert done["stderr"] == ""
    assert look.contents(out) == look.contents(bf16)
    return done["moments"]


def old_output(run, official, out):
    """Another good conversion under the same names."""
    types = (("attn_q|attention.out", QTYPES["F16"]),)
    run(source=str(official), out=out, qtype="BF16", tensor_types=types, variant="base")


def test_kill_at_any_moment(
    interrupted, command, n_moments, official, bf16, run, look, tmp_path, capsys
):
    old_output(run, official, tmp_path / "old")
    old = look.contents(tmp_path / "old")
    last = n_moments - PUBLISHING
    moments = sorted(random.Random(5).sample(range(1, last), 2)) + list(range(last, n_moments + 1))
    for moment in moments:
        out = tmp_path / str(moment)
        out.mkdir()
        for name, data in old.items():
            (out / name).write_bytes(data)
        assert interrupted(command(out), out, moment=moment)["code"] == -signal.SIGKILL
        left = look.contents(out)
        if look.is_whole(out):
            new = {name: left[name] for name in left if ".part" not in name}
            assert new in (old, look.contents(bf16)), moment
        assert main(command(out, "--resume")) == 0, moment
        assert look.contents(out) == look.contents(bf16), moment


def test_kill_twice(interrupted, command, n_moments, bf16, look, tmp_path, capsys):
    for moment in (n_moments // 3, n_moments // 3):
        done = interrupted(command(tmp_path, "--resume"), tmp_path, moment=moment)
        assert done["code"] == -signal.SIGKILL
        assert not look.is_whole(tmp_path)
    assert main(command(tmp_path, "--resume")) == 0
    assert look.contents(tmp_path) == look.contents(bf16)


@pytest.mark.parametrize("share", [0.0, 0.7])
def test_interrupt(share, interrupted, command, n_moments, bf16, look, tmp_path, capsys):
    moment = 2 + int(share * (n_moments - PUBLISHING))
    done = interrupted(command(tmp_path), tmp_path, signal.SIGINT, moment)
    assert done["code"] == 130
    assert done["stderr"] == f"{tmp_path}: not complete; go on with --resume\nzquant: interrupted\n"
    assert not look.is_whole(tmp_path)
    assert main(command(tmp_path, "--resume")) == 0
    assert look.contents(tmp_path) == look.contents(bf16)


def test_a_part_that_was_damaged_meanwhile(
    interrupted, command, n_moments, bf16, look, tmp_path, capsys
):
    out = tmp_path / "out"
    assert interrupted(command(out), out, moment=n_moments // 2)["code"] < 0
    left = look.contents(out)
    (part,) = [name for name in left if name.endswith("encoder-BF16.gguf.part")]
    flipped = bytearray(left[part])
    flipped[len(flipped) // 2] ^= 1
    journal = left[f"{part}.journal"]
    damages = {
        part: [bytes(flipped), left[part] + b"garbage"],
        f"{part}.journal": [journal[:-7], b""],
    }
    for name, variants in damages.items():
        for data in variants:
            for file, whole in left.items():
                (out / file).write_bytes(whole)
            (out / name).write_bytes(data)
            assert main(command(out, "--resume")) == 0
            assert look.contents(out) == look.contents(bf16)


def test_kill_while_reading_from_a_server(
    interrupted, command, n_moments, official, bf16, look, tmp_path, capsys
):
    with serve(official.parent) as server:
        far = f"{server.url}/{official.name}"
        killed = interrupted(command(tmp_path, source=far), tmp_path, moment=n_moments // 2)
        assert killed["code"] == -signal.SIGKILL
        assert main(command(tmp_path, "--resume", source=far)) == 0
        n_bytes = sum(asked.n_bytes for asked in server.asked)
    resumed, whole = look.contents(tmp_path), look.contents(bf16)
    for contents in (resumed, whole):
        del contents["model.json"]  # it names the source
    assert resumed == whole
    assert n_bytes < 1.9 * sum(map(len, whole.values()))  # what was done is not read again


def test_resume_without_anything_to_resume(command, bf16, look, tmp_path, capsys):
    assert main(command(tmp_path, "--resume")) == 0
    assert look.contents(tmp_path) == look.contents(bf16)


def test_a_changed_source_is_not_resumed(
    command, interrupted, official, n_moments, tmp_path, capsys
):
    source = shutil.copytree(official, tmp_path / "source")
    out = tmp_path / "out"
    assert interrupted(command(out, source=source), out, moment=n_moments // 3)["code"] < 0
    for shard in source.glob("transformer/*.safetensors"):
        os.utime(shard, ns=(1, 1))
    assert main(command(out, "--resume", source=source)) == 1
    assert "it cannot be resumed. To start anew, remove it and dit-" in capsys.readouterr().err
