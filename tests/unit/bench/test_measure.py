"""What becomes of the figures of measuring processes, which are played here."""

from pathlib import Path
from typing import Any

import pytest

from tests.unit.bench.bench_testing import CEILING, MEMORY, READY, SURVEY, Play, painted
from zquant.bench import measure
from zquant.bench.measure import Bench
from zquant.bench.schema import SCHEMA
from zquant.bench.table import bench_text
from zquant.errors import FormatError, ZQuantError


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    return Play(tmp_path, monkeypatch)


def test_the_ceiling_comes_first_then_one_process_per_size(play: Play) -> None:
    play.parts["survey"] = [SURVEY | {"sizes": SURVEY["sizes"] * 2}]
    play.parts["128x64"] = play.parts["64x64"]
    document = play.bench(sizes=[(64, 64), (128, 64)], machine={"compute_dtype": "auto"})
    assert document["schema"] == SCHEMA
    survey, *painters, again = play.jobs
    assert (survey["kind"], survey["sizes"]) == ("survey", [[64, 64], [128, 64]])
    assert (again["kind"], again["sizes"]) == ("survey", survey["sizes"])
    assert again["machine"]["compute_dtype"] == "float32"
    assert survey["machine"]["compute_dtype"] == "auto"
    assert [(job["width"], job["height"], job["repeat"]) for job in painters] == [
        (64, 64, 2),
        (128, 64, 2),
    ]
    # found once, so that no size computes in another dtype
    assert {job["machine"]["compute_dtype"] for job in painters} == {"float32"}
    ceiling = play.said.index("64x64: ceiling 1.00 s a step, bound by products (100.00 GFLOP/s)")
    assert ceiling < play.said.index("64x64: cold, 20.0 s")
    assert play.seen[0] == ("64x64 cold, denoise", 1, 3)


def test_cold_is_the_first_picture_and_warm_the_median_of_the_others(play: Play) -> None:
    (row,) = play.bench()["sizes"]
    assert row["cold"]["total_s"] == {"median": 20.0, "min": 20.0, "max": 20.0, "n": 1}
    assert row["cold"]["step_s"] == {"median": 7.0, "min": 6.0, "max": 8.0, "n": 2}
    assert row["warm"]["total_s"] == {"median": 11.0, "min": 10.0, "max": 12.0, "n": 2}
    # all steps but the first of both pictures
    assert row["warm"]["step_s"] == {"median": 2.25, "min": 2.0, "max": 4.0, "n": 4}
    assert row["times_ceiling"] == 2.25
    assert row["peaks"]["ram_bytes"] == 900
    assert row["peaks"]["vram_process_bytes"] is None
    assert row["predicted"]["step_s"] == 1.5
    assert row["moved"]["storage_read_bytes"] == 7
    assert row["startup_s"] > 0


def test_the_better_ceiling_counts(play: Play) -> None:
    low, high = ([{"n_tokens": 64, "ceiling": CEILING | {"roofline_s": s}}] for s in (0.5, 4.0))
    for first, again in ((low, high), (high, low)):
        play.parts["survey"] = [SURVEY | {"sizes": first}]
        play.parts["survey again"] = [SURVEY | {"sizes": again}]
        (row,) = play.bench()["sizes"]
        assert (row["ceiling"]["roofline_s"], row["times_ceiling"]) == (0.5, 4.5)
    other = CEILING | {"roofline_s": 0.1, "streamed_blocks": 3}  # a plan that the picture had not
    play.parts["survey again"] = [SURVEY | {"sizes": [{"n_tokens": 64, "ceiling": other}]}]
    assert play.bench()["sizes"][0]["times_ceiling"] == 2.25 / 4
    play.parts["survey again"] = [{"event": "error", "message": "no memory"}, {"exit": 1}]
    assert play.bench()["sizes"][0]["times_ceiling"] == 2.25 / 4


STREAM = {"bytes_read": 4 * 10**8, "bytes_copied": 5, "waited_s": 0.1}


def streaming(play: Play, *, is_gpu: bool) -> dict[str, Any]:
    """The row of a picture that streams three blocks."""
    memory = MEMORY | {"streamed_blocks": 3, "streams": {"dit": STREAM, "text_encoder": STREAM}}
    ceiling = CEILING | {"streamed_blocks": 3, "moving_s": 2.0}
    machine = SURVEY["machine"] | {"plan": {"is_gpu": is_gpu}}
    survey = {"sizes": [{"n_tokens": 64, "ceiling": ceiling}], "machine": machine}
    play.parts["survey"] = [SURVEY | survey]
    play.parts["64x64"] = [READY, *[painted(9.0, [2.5, 2.5], memory=memory)] * 2]
    (row,) = play.bench(repeat=1)["sizes"]
    assert row["notices"] == []
    return dict(row["moved"])


def test_a_cpu_reads_blocks_and_says_how_much_it_waited(play: Play) -> None:
    moved = streaming(play, is_gpu=False)
    assert (moved["read_bytes"], moved["copied_bytes"]) == (8 * 10**8, 10)
    # 0.4 s of reading at 1 GB/s, 0.1 s of it waited for
    assert moved["overlap_at_least"] == pytest.approx(0.75)


def test_a_gpu_s_overlap_follows_from_its_step(play: Play) -> None:
    moved = streaming(play, is_gpu=True)
    # 1 s of products, 2 s of copies: a step of 2.5 s hides half of the products
    assert moved["overlap_at_least"] == pytest.approx(0.5)


def test_another_plan_than_the_ceiling_s_is_a_notice(play: Play) -> None:
    memory = MEMORY | {"streamed_blocks": 3}
    play.parts["64x64"] = [READY, *[painted(9.0, [2.0], memory=memory)] * 2]
    document = play.bench(repeat=1)
    (notice,) = document["sizes"][0]["notices"]
    assert notice.startswith("3 blocks were streamed, but the ceiling is for 0")
    assert notice in bench_text(document)


def test_a_size_that_fails_is_told_and_the_others_go_on(play: Play) -> None:
    fails = {"failure": "96x96: too large"}
    play.parts["survey"] = [SURVEY | {"sizes": [fails, *SURVEY["sizes"] * 3]}]
    play.parts["32x32"] = [READY, {"event": "error", "message": "numbers ran away"}, {"exit": 1}]
    play.parts["48x48"] = [READY, painted(9.0, [2.0]), {"exit": 9}]
    document = play.bench(sizes=[(96, 96), (32, 32), (48, 48), (64, 64)])
    failures = [row["failure"] for row in document["sizes"]]
    assert failures[:2] == ["96x96: too large", "numbers ran away"]
    assert failures[2].startswith("the measuring process ended with exit code 9; ")
    assert failures[3] is None
    assert len(play.jobs) == 5  # two surveys; what has no plan is not started
    text = bench_text(document)
    for failed in ("96x96: FAILED: too large", "32x32: FAILED: numbers ran away"):
        assert failed in text
        assert failed in play.said


def test_without_a_model_nothing_is_measured(play: Play) -> None:
    play.parts["survey"] = [{"event": "error", "message": "a: not a model folder"}, {"exit": 1}]
    with pytest.raises(ZQuantError, match=r"^a: not a model folder$"):
        play.bench()
    assert len(play.jobs) == 1


def test_a_document_that_is_not_of_its_schema_is_not_given_out(play: Play) -> None:
    play.parts["survey"] = [SURVEY | {"rates": {"file_bytes_s": 1.0, "link_bytes_s": 0.0}}]
    with pytest.raises(FormatError, match=r"rates\.memory_bytes_s is missing"):
        play.bench()


def test_an_interrupted_process_interrupts(play: Play) -> None:
    play.parts["64x64"] = [READY, {"exit": 130}]
    with pytest.raises(KeyboardInterrupt):
        play.bench()


def test_the_text_has_ceiling_measurement_and_meaning(play: Play) -> None:
    lines = bench_text(play.bench()).splitlines()
    starts = [
        "a on a CPU: float32, exact, attention sdpa, 8 steps",
        "rates: memory 9.3 GiB/s, file ",
        "ceiling of a step ",
        "measured ",
        "predicted / measured ",
        "cold: the first picture of a fresh process",
        "warm: ",
        "startup: ",
    ]
    found = [next(i for i, each in enumerate(lines) if each.startswith(s)) for s in starts]
    assert found == sorted(found)
    warm = next(line for line in lines if "warm, median" in line)
    assert warm.split()[-3:] == ["11.0", "s", "2.25"]


def test_a_gpu_s_vram_stands_beside_the_allocator_s(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gpu:
        reason = ""

        def __init__(self, uuid: str) -> None:
            assert uuid == "GPU-1"

        def used_bytes(self) -> int:
            return 5000

        def process_bytes(self, _: int) -> int:
            return 4000

    monkeypatch.setattr(measure, "Nvml", Gpu)
    play.parts["survey"] = [SURVEY | {"device": SURVEY["device"] | {"uuid": "GPU-1"}}]
    runs = [painted(9.0, [2.0], peak_allocator_bytes=n) for n in (3000, 3500)]
    play.parts["64x64"] = [READY, *runs]
    document = play.bench(repeat=1)
    peaks = document["sizes"][0]["peaks"]
    assert (peaks["vram_process_bytes"], peaks["vram_allocator_bytes"]) == (4000, 3500)
    assert peaks["vram_witness"] == "NVML, of the process"
    assert "VRAM: NVML, of the process (" in bench_text(document)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steps": 1}, "steps is 1; it must be 2 or more"),
        ({"repeat": 0}, "repeat is 0; it must be from 1 to 99"),
        ({"repeat": 100}, "repeat is 100"),
        ({"sizes": [(512, 500)]}, "height is 500; it must be a multiple of 16"),
    ],
)
def test_what_cannot_be_measured_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Bench(**{"model": "a"} | fields)


def test_an_installed_zquant_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.zquant, "__file__", str(tmp_path / "zquant" / "__init__.py"))
    assert measure._commit() is None
