"""A job that is killed, or whose state is damaged in any way, ends with the same pictures."""

import errno
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch

from zquant.errors import FormatError, PlanError, ZQuantError
from zquant.formats import job_folder as subject
from zquant.formats.job_folder import JobFolder, JobItem, item_id

STEPS = 2
SEEDS = {"a.png": 1, "b.png": 2, "c.png": 1}  # a and c are the same picture
N_STEPS = STEPS * len(set(SEEDS.values()))
WORK = N_STEPS + len(SEEDS)  # of a job that nothing happens to


def items_of(out, seeds):
    return [JobItem(id=item_id({"seed": s}), target=out / name) for name, s in seeds.items()]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def paint(out, *, resume, seeds=SEEDS, moment=lambda: None):
    """A job as the engine does it; gives the number of steps and pictures it had to make."""
    work = 0
    with closing(JobFolder(out, resume=resume)) as job:
        items = items_of(out, seeds)
        job.begin(items)
        moment()
        for item, seed in zip(items, seeds.values(), strict=True):
            step, latents = job.latents(item.id) or (0, torch.full((4, 3, 5), float(seed)))
            while step < STEPS and not job.is_done(item):
                latents, step, work = latents * 0.3 + step, step + 1, work + 1
                job.save_latents(item.id, step, latents)
                moment()
        for item in items:
            if not job.is_done(item):
                item.target.write_bytes(job.latents(item.id)[1].numpy().tobytes())
                moment()
                job.finish(item)
                work += 1
                moment()
        job.end()
    return work


MOMENTS = range(1, 2 + N_STEPS + 2 * len(SEEDS))  # of `paint`


def done_at(moment):  # pictures
    return max(moment - 1 - N_STEPS, 0) // 2


def forked(work):
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def killed(work, folder, moment):
    """Do `work` in a process that is killed before the file operation `moment` in `folder`."""
    count = itertools.count(1)

    def audit(event, args):
        operations = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
        if event in operations and str(args[0]).startswith(str(folder)) and next(count) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    process = forked(lambda: (sys.addaudithook(audit), work()))
    process.join()
    return {0: False, -signal.SIGKILL: True}[process.exitcode]


def kill_at_every_moment(folder):
    """Every file operation of a job is its last one once, and then one of the resumed job."""
    paint(folder / "whole", resume=False)
    for moment in itertools.count(1):
        out = folder / str(moment)
        if not killed(lambda out=out: paint(out, resume=False), out, moment):
            break
        killed(lambda out=out: paint(out, resume=True), out, moment // 2 + 1)
        paint(out, resume=True)
        assert contents(out) == contents(folder / "whole"), moment
    assert moment > 30


def kill_while_saving(folder):
    """At random times; what was reported as saved is there."""
    id_, choose = item_id({}), random.Random(2)

    def work():
        job = JobFolder(folder, resume=True)
        for step in itertools.count((job.latents(id_) or (0,))[0] + 1):
            job.save_latents(id_, step, torch.full((16, 64, 64), float(step)))
            os.write(write, b"%d\n" % step)

    for _ in range(20):
        read, write = os.pipe()
        process = forked(work)
        os.close(write)
        with os.fdopen(read, "rb") as reports:
            reported = [reports.readline()]
            time.sleep(choose.uniform(0, 0.02))
            process.kill()
            reported += reports.readlines()
        process.join()
        with closing(JobFolder(folder, resume=True)) as job:
            steps, latents = job.latents(id_)
        assert steps - int(reported[-1]) in (0, 1)
        assert (latents == steps).all()


def work_in_turns(folder):
    """Three processes come and go until each has had the folder 50 times, alone."""
    counter = folder / "counter"
    counter.write_text("0")

    def work():
        n = 0
        while n < 50:
            with suppress(ZQuantError), closing(JobFolder(folder / "out", resume=False)) as job:
                value, n = int(counter.read_text()), n + 1
                job.begin([])
                counter.write_text(str(value + 1))
                job.end()

    for process in [forked(work) for _ in range(3)]:
        process.join()
    assert int(counter.read_text()) == 3 * 50
    assert not state_of(folder / "out").exists()


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A folder for every moment at which the job may have been stopped, and 0 for its end."""
    folder, count = tmp_path_factory.mktemp("stages"), itertools.count(1)

    def moment():
        shutil.copytree(folder / "0", folder / str(next(count)))

    with pytest.MonkeyPatch.context() as patch:
        # being killed is no power cut: what was written is there without being forced to the disk
        patch.setattr(os, "fsync", lambda _: None)
        assert paint(folder / "0", resume=False, moment=moment) == WORK
        assert next(count) == len(MOMENTS) + 1
        assert set(contents(folder / "0")) == set(SEEDS)
        assert not list(state_of(folder / str(MOMENTS[-1])).glob("*.latents"))
        yield {moment: folder / str(moment) for moment in (0, *MOMENTS)}


@pytest.fixture
def pictures(stages):
    """What the job leaves when nothing happens to it."""
    return contents(stages[0])


@pytest.fixture
def job(tmp_path):
    with closing(JobFolder(tmp_path / "out", resume=False)) as job:
        yield job


def state_of(out):
    return out / subject.STATE_FOLDER


def test_a_stopped_job_repeats_nothing(stages, pictures, tmp_path):
    for moment in MOMENTS:
        out = shutil.copytree(stages[moment], tmp_path / str(moment))
        assert paint(out, resume=True) == WORK - min(moment - 1, N_STEPS) - done_at(moment)
        assert contents(out) == pictures


DAMAGES = {
    "empty": lambda data: data[:0],
    "cut in half": lambda data: data[: len(data) // 2],
    "cut at the last byte": lambda data: data[:-1],
    "flipped bit": lambda data: bytes([data[0] ^ 4]) + data[1:] if data else b"\1",
    "zeros": lambda data: bytes(len(data)),
    "hostile": lambda data: b"[" * 99_999 + b"\n{}\n[1, 2]\n" + b"9" * 9999 + b"\n\xff" + data,
    "names": lambda data: b'\n["%b", "../../a.png"]' % (b"a" * 64) + data,
    "deleted": None,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_to_any_file_at_any_stage_costs_work_only(damage, stages, pictures, tmp_path):
    for moment in MOMENTS:
        for name in [path.name for path in state_of(stages[moment]).iterdir()]:
            out = shutil.copytree(stages[moment], tmp_path / str(moment) / name)
            data = (state_of(out) / name).read_bytes()
            (state_of(out) / name).unlink()
            if damage:
                (state_of(out) / name).write_bytes(damage(data))
            paint(out, resume=True)
            assert contents(out) == pictures, (moment, name)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_processes_and_processes_that_want_the_same_folder(tmp_path):
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, timeout=300)


def test_damaged_latents_are_none_and_sound_ones_exact(job):
    latents = torch.tensor([[[0.1, float("nan")], [-0.0, 1e-45]]])
    one, other = "1" * 64, "2" * 64
    assert job.latents(one) is None
    job.save_latents(one, 7, latents)
    steps, found = job.latents(one)
    assert steps == 7
    assert torch.equal(found.view(torch.int32), latents.view(torch.int32))
    path = state_of(job.out) / f"{one}.latents"
    whole = path.read_bytes()
    for at in range(len(whole)):
        for data in (whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :], whole[:at]):
            path.write_bytes(data)
            assert job.latents(one) is None, at
    path.with_name(f"{other}.latents").write_bytes(whole)
    assert job.latents(other) is None  # they are another picture's
    path.write_bytes(subject.seal(latents[0], one, bytes(4)))
    assert job.latents(one) is None


def test_wrong_arguments(job):
    latents = torch.zeros(1, 1, 1)
    for id_, steps, wrong, message in (
        ("../a", 1, latents, "item id '../a' is not one that item_id makes"),
        ("a" * 64, -1, latents, "steps_done is -1; it is from 0 to"),
        ("a" * 64, 1, latents[None].half(), r"are float32 \[C, H, W\]; got .*16 \[1, 1, 1, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            job.save_latents(id_, steps, wrong)
    for names in (["a.png", "a.png"], ["../a.png"]):
        with pytest.raises(ValueError, match=r"every target is a file of its own in '.*'; one is"):
            job.begin([JobItem(id="a" * 64, target=job.out / name) for name in names])
    assert [path.name for path in state_of(job.out).iterdir()] == ["lock"]


def test_an_unfinished_job_is_not_overwritten(stages, tmp_path):
    for moment in MOMENTS[1:]:  # at the first, nothing was done
        out = shutil.copytree(stages[moment], tmp_path / str(moment))
        message = rf"\({done_at(moment)} pictures done\)\. Go on with --resume; to start anew, rem"
        with pytest.raises(ZQuantError, match=message):
            JobFolder(out, resume=False)
        assert contents(out) == contents(stages[moment])
        JobFolder(out, resume=True).close()


def test_nothing_done_is_no_job(stages, pictures, tmp_path):
    out = shutil.copytree(stages[1], tmp_path / "out")
    (state_of(out) / "notes.txt").write_text("mine")  # stays in the folder of ours
    for resume in (False, False, True):  # each after one that has ended, or not begun
        assert paint(out, resume=resume) == WORK
        assert contents(out) == {**pictures, ".zquant-job/notes.txt": b"mine"}


def test_changed_settings_and_removed_pictures_are_work_to_do(stages, pictures, tmp_path):
    out, fresh = shutil.copytree(stages[MOMENTS[-1]], tmp_path / "out"), tmp_path / "fresh"
    (out / "a.png").unlink()
    changed = {**SEEDS, "b.png": 3, "d.png": 4}
    assert paint(out, resume=True, seeds=changed) == 3 * (STEPS + 1)
    paint(fresh, resume=False, seeds=changed)
    assert contents(out) == contents(fresh)


def test_first_settings_again_after_being_killed_with_others(stages, pictures, tmp_path):
    out = shutil.copytree(stages[MOMENTS[-1]], tmp_path / "out")

    def moment():
        if (out / "b.png").read_bytes() != pictures["b.png"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        paint(out, resume=True, seeds={**SEEDS, "b.png": 3}, moment=moment)
    assert paint(out, resume=True) == STEPS + 1
    assert contents(out) == pictures


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_anywhere_leaves_a_job_to_resume(error, pictures, tmp_path, monkeypatch):
    kind = PlanError if error == errno.ENOSPC else FormatError
    reason = "the disk is full" if error == errno.ENOSPC else r"cannot be written \(Input/output"
    count = []

    def fsync(_):
        count.append(1)
        if len(count) == fail_at:
            raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fsync)
    for fail_at in range(1, 2 + WORK):
        out = tmp_path / str(fail_at)
        count.clear()
        with pytest.raises(kind, match=reason + r".* What is done is kept; go on with --resume\."):
            paint(out, resume=False)
        # a line of done.jsonl is there, though forcing it to the disk failed
        kept = fail_at - 1 if fail_at > 1 + N_STEPS else max(fail_at - 2, 0)
        assert paint(out, resume=True) == WORK - kept
        assert contents(out) == pictures


def test_a_line_that_was_cut_short_spoils_no_other(job):
    items = items_of(job.out, SEEDS)
    job.begin(items)
    done = state_of(job.out) / subject.DONE_FILE
    for item in items:
        item.target.touch()
        job.finish(item)
        if item is items[1]:
            os.truncate(done, done.stat().st_size - 3)  # as a full disk does
            item.target.unlink()
    job.end()  # keeps the state, because not everything is done
    items[1].target.touch()
    with closing(JobFolder(job.out, resume=True)) as again:
        again.begin(items)
        assert [again.is_done(item) for item in items] == [True, False, True]


@pytest.mark.skipif(os.name != "posix", reason="needs links")
@pytest.mark.parametrize("name", ["", "lock", "done.jsonl", "done.jsonl.part"])
def test_links_lead_nowhere(name, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    (state_of(out) if name else out).mkdir(parents=True)
    (other.touch if name else other.mkdir)()
    (state_of(out) / name).symlink_to(other)
    with suppress(ZQuantError):
        paint(out, resume=True)
    assert not (other.read_bytes() if name else list(other.iterdir()))
    assert (contents(out).keys() >= set(SEEDS)) == (name not in ("", "lock"))


def test_a_second_job_in_the_same_folder_is_refused(job):
    message = rf"job: process {os.getpid()} works in this folder\. Wait until it has ended, or ch"
    with pytest.raises(ZQuantError, match=message):
        JobFolder(job.out, resume=False)
    job.close()
    for text in ("", str(os.getpid()), "999999999", "x" * 9999):  # of processes that died
        (state_of(job.out) / "lock").write_text(text)
        with closing(JobFolder(job.out, resume=True)):
            assert (state_of(job.out) / "lock").read_text() == f"{os.getpid()}\n"


def test_a_folder_that_is_removed_meanwhile(tmp_path, monkeypatch):
    state_of(tmp_path).mkdir()
    real = os.mkdir

    def mkdir(path, *mode):
        try:
            real(path, *mode)
        finally:
            if path == state_of(tmp_path):  # its owner has just ended its job
                monkeypatch.undo()
                path.rmdir()

    monkeypatch.setattr(os, "mkdir", mkdir)
    JobFolder(tmp_path, resume=False).close()


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(ZQuantError, match=r"no' does not exist; create it first"):
        JobFolder(tmp_path / "no" / "out", resume=False)
    with pytest.raises(ZQuantError, match=r"\.py: cannot be used \(File exists\)\. Choose another"):
        JobFolder(Path(__file__), resume=False)


def test_an_id_depends_on_every_value_and_on_no_order():
    recipe = {"prompt": "狐", "scale": 0.1, "model": {"dit": "a", "vae": "b"}, "seed": 1}
    other = {**dict(reversed(recipe.items())), "model": {"vae": "b", "dit": "a"}}
    assert item_id(other) == item_id(recipe)
    changes = [{"scale": 0.1 + 2**-56}, {"model": {"dit": "b"}}, {"seed": "1"}, {"more": None}]
    assert len({item_id({**recipe, **change}) for change in ({}, *changes)}) == 1 + len(changes)
    # written down: another value would make every job on disk useless
    assert item_id({"b": 0.1, "a": "é"}).startswith("09f2e5840646abe0a040432d9e8c3a70")
    for value in (float("nan"), Path("a"), torch.zeros(1), {1: 2, "a": 3}):
        with pytest.raises(ValueError, match="a recipe is made of JSON values"):
            item_id({"value": value})


if __name__ == "__main__":
    os.fsync = lambda _: None  # as in `stages`
    for experiment in (kill_at_every_moment, kill_while_saving, work_in_turns):
        folder = Path(sys.argv[1]) / experiment.__name__
        folder.mkdir()
        experiment(folder)
