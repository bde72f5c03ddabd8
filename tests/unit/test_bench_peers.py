"""The comparison with other engines: what is skipped and why, what is read, who may fail."""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.peers_testing import MODEL, job_in, peer_floor, peers, workers

GIB = 2**30
N_WEIGHTS = {"dit": 6_154_908_736, "text_encoder": 4_022_468_096, "vae": 83_819_683}  # Z-Image
Z_IMAGE: Any = {"dim": 3840, "hidden_dim": 10240, "n_layers": 30, "n_refiner_layers": 2}


def bench(tmp_path: Path, **flags: Any) -> Any:
    args = {"device": "cpu", "encode": False, "sdcpp": None, "nunchaku": None, "dtype": "bfloat16"}
    args |= flags
    return peers.Bench(
        args=argparse.Namespace(**args),
        n_weights=N_WEIGHTS,
        dit=SimpleNamespace(**Z_IMAGE),
        shift=3.0,
        gpu=SimpleNamespace(free_bytes=lambda: 8 * GIB) if args["device"] != "cpu" else None,
        work=tmp_path,
    )


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A machine with diffusers, without nunchaku, and with 64 GiB or what is set."""

    def has(ram_bytes: int) -> None:
        monkeypatch.setattr(peers, "ram_available", lambda: ram_bytes)

    monkeypatch.setattr(peers, "find_spec", lambda name: name != "nunchaku" or None)
    has(64 * GIB)
    return has


@pytest.fixture
def job(toy_folder: Path, tmp_path: Path) -> Any:
    """A picture of 64 pixels in two steps by the toy model; its noise and embeddings are there."""
    np.save(tmp_path / "noise.npy", torch.randn(1, 16, 8, 8).numpy())
    np.save(tmp_path / "embeds.npy", torch.randn(9, 32).numpy())
    return job_in(tmp_path, toy_folder)


def test_memory_on_a_cpu_is_everything_at_once(tmp_path: Path) -> None:
    need = peers.need(bench(tmp_path), "diffusers", MODEL, 512)
    decoder = 4 * 3 * 256 * 512**2
    assert need.ram == GIB + 2 * (N_WEIGHTS["dit"] + N_WEIGHTS["vae"]) + decoder
    assert need.vram == 0
    assert need.why_not(21 * GIB, 0) == ""  # a machine of 24 GB, the embeddings given
    encoding = peers.need(bench(tmp_path, encode=True), "diffusers", MODEL, 512)
    assert encoding.ram == need.ram + 2 * N_WEIGHTS["text_encoder"]
    why = encoding.why_not(20 * GIB, 0)
    assert why == "needs about 20.9 GiB of RAM; 20.0 GiB are available"
    larger = peers.need(bench(tmp_path), "diffusers", MODEL, 1024)
    assert larger.ram == need.ram + 3 * decoder
    wide = peers.need(bench(tmp_path, dtype="float32"), "diffusers", MODEL, 512)
    assert wide.ram == GIB + 4 * (N_WEIGHTS["dit"] + N_WEIGHTS["vae"]) + decoder


def test_memory_of_files_that_are_used_as_they_are(tmp_path: Path) -> None:
    sizes = {path.name.split("-")[0]: path.stat().st_size for path in MODEL.glob("*-Q8_0.gguf")}
    vae = (MODEL / "vae.safetensors").stat().st_size
    gguf = peers.need(bench(tmp_path), "diffusers-gguf", MODEL, 16)
    expanded, decoder = 2 * 3840 * 10240, 4 * 3 * 256 * 16**2
    assert gguf.ram == GIB + sizes["dit"] + expanded + 2 * N_WEIGHTS["vae"] + decoder
    sdcpp = peers.need(bench(tmp_path), "sdcpp", MODEL, 16)  # it always encodes
    assert sdcpp.ram == GIB + sizes["dit"] + sizes["text_encoder"] + vae + decoder


def test_memory_on_a_gpu_is_what_lies_there_at_once(tmp_path: Path) -> None:
    on_gpu = bench(tmp_path, device="cuda", encode=True)
    engines = ("diffusers", "diffusers-offload", "diffusers-group")
    resident, offload, group = (peers.need(on_gpu, name, MODEL, 512) for name in engines)
    assert resident.vram > 20 * GIB > 14 * GIB > offload.vram > 12 * GIB > 2 * GIB > group.vram
    assert group.ram > offload.ram > resident.ram
    assert "of VRAM" in resident.why_not(64 * GIB, 8 * GIB)


REASONS: dict[str, Any] = {
    "diffusers-offload": ({}, "needs a CUDA device"),
    "nunchaku": ({"device": "cuda"}, "nunchaku is not installed"),
    "sdcpp": ({}, "no --sdcpp PATH"),
    "sdcpp, absent": ({"sdcpp": Path("/no/sd-cli")}, "/no/sd-cli is not a program"),
    "diffusers-gguf": ({}, ""),
    "zquant": ({}, ""),
}


@pytest.mark.parametrize("case", REASONS)
def test_why_an_engine_does_not_run(case: str, tmp_path: Path, here: Callable[[int], None]) -> None:
    flags, reason = REASONS[case]
    assert peers.why_not(bench(tmp_path, **flags), case.split(",")[0], MODEL, 64) == reason


def test_what_needs_more_memory_or_another_file_does_not_run(
    tmp_path: Path, toy_folder: Path, here: Callable[[int], None]
) -> None:
    why = peers.why_not(bench(tmp_path), "diffusers-gguf", toy_folder, 64)
    assert why == "transformer is not a GGUF file"
    here(GIB)
    for engine in ("diffusers", "diffusers-gguf"):
        assert "1.0 GiB are available" in peers.why_not(bench(tmp_path), engine, MODEL, 64)
    assert peers.why_not(bench(tmp_path), "zquant", MODEL, 64) == ""  # its own plan decides


def test_the_floor_is_a_step_at_the_best_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    def product_s(x: torch.Tensor, weight: torch.Tensor) -> float:
        assert (x.shape, weight.shape) == ((64 + 32, 64), (170, 64))
        flop = 2 * 96 * 64 * 170
        return flop / (2e9 if x.dtype == torch.float32 else 1e9)

    monkeypatch.setattr(peer_floor, "_product_s", product_s)
    small: Any = {"dim": 64, "hidden_dim": 170, "n_layers": 3, "n_refiner_layers": 1}
    found = peer_floor.ceiling(SimpleNamespace(**small), 112, "cpu")  # 49 patches, padded to 64
    block = 4 * 64 * 64 + 3 * 64 * 170
    flop = 3 * (2 * block * 96 + 4 * 64 * 96**2) + 2 * block * 64 + 4 * 64 * 64**2
    assert found["gflop_s"] == {"float32": 2.0, "bfloat16": 1.0}
    assert math.isclose(found["tflop"], flop / 1e12)
    assert math.isclose(found["floor_s"], flop / 2e9)


def test_a_floor_only_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    dit: Any = SimpleNamespace(dim=64, hidden_dim=170, n_layers=3, n_refiner_layers=1)
    seconds = {torch.float32: 2.0, torch.bfloat16: 4.0}
    monkeypatch.setattr(peer_floor, "_product_s", lambda x, _: seconds[x.dtype])
    first = peer_floor.ceiling(dit, 112, "cpu")
    seconds |= {torch.float32: 3.0, torch.bfloat16: 1.0}  # float32 disturbed, bfloat16 not
    later = peer_floor.lowered(first, dit, "cpu")
    assert later["floor_s"] == first["floor_s"] / 2
    assert later["gflop_s"]["float32"] == first["gflop_s"]["float32"]
    seconds[torch.bfloat16] = 9.0
    assert peer_floor.lowered(later, dit, "cpu") == later


def test_steps_are_those_after_the_first(job: Any) -> None:
    document = {"steps_s": [9.0, 1.0, 5.0, 2.0], "sigmas": [1, 0.9, 0.5, 0.2, 0]}
    four = replace(job, steps=4, sigmas=[1, 0.9, 0.5, 0.2, 0.0])
    row = workers.figures(document, four)
    assert (row["step_s"], row["step_min_s"], row["step_max_s"]) == (2.0, 1.0, 5.0)
    assert row["first_step_s"] == 9.0
    with pytest.raises(ValueError, match="made 4 steps; asked for 3"):
        workers.figures(document, replace(four, steps=3))
    for other in ([1, 0.9, 0.5, 0.201, 0], [1, 0.9, 0.5, 0]):
        with pytest.raises(ValueError, match="sampled with sigmas"):
            workers.figures(document, replace(four, sigmas=other))


def painted(job: Any) -> Any:
    document = workers.paint(job)
    assert len(document["steps_s"]) == 2
    assert np.allclose(document["sigmas"], job.sigmas)  # shift 3: 3 u / (1 + 2 u)
    return np.load(job.latents)


def test_zquant_uses_the_noise_and_embeddings_it_is_given(job: Any, tmp_path: Path) -> None:
    first = painted(job)
    np.save(job.noise, np.zeros((1, 16, 8, 8), np.float32))
    assert not np.allclose(first, painted(job))
    file = str(tmp_path / "own.npy")
    own = painted(replace(job, embeds="", keep_embeds=file))
    assert np.array_equal(own, painted(replace(job, embeds=file)))
    assert not np.allclose(own, painted(job))


class Pipeline:
    """Plays diffusers': each step adds what its transformer says, and takes 50 ms."""

    made: "Pipeline"

    def __init__(self, _folder: str, **given: Any) -> None:
        Pipeline.made, self.given = self, given
        self.placed: list[str] = []
        self.transformer = torch.nn.Identity()
        self.scheduler = SimpleNamespace(sigmas=torch.tensor([1.0, 0.75, 0.0]))

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self.placed.append(name)

    def __call__(self, *, latents: Any, callback_on_step_end: Any, **asked: Any) -> Any:
        self.asked = asked
        for step in range(asked["num_inference_steps"]):
            added = self.transformer(latents)
            time.sleep(0.05)
            latents = latents + added
            callback_on_step_end(self, step, None, {"latents": latents})
        picture = latents if asked["output_type"] == "latent" else Image.new("RGB", (64, 64))
        return SimpleNamespace(images=[picture])


@pytest.fixture
def diffusers(monkeypatch: pytest.MonkeyPatch) -> type[Pipeline]:
    """The real one is compared by tests/oracle; here is how it is asked and timed."""
    quiet = SimpleNamespace(logging=SimpleNamespace(disable_progress_bar=lambda: None))
    played = SimpleNamespace(from_pretrained=Pipeline)
    module = SimpleNamespace(utils=quiet, ZImagePipeline=played)
    monkeypatch.setitem(sys.modules, "diffusers", module)
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(utils=quiet))
    monkeypatch.setattr(workers, "find_spec", lambda _: None)
    return Pipeline


def test_diffusers_is_asked_for_the_same_and_timed(job: Any, diffusers: type[Pipeline]) -> None:
    document = workers.paint(replace(job, engine="diffusers", dtype="bfloat16"))
    assert 0.09 < sum(document["steps_s"]) < document["work_s"]
    assert document["sigmas"] == [1.0, 0.75, 0.0]
    assert np.array_equal(np.load(job.latents), 4 * np.load(job.noise))
    asked, given = diffusers.made.asked, diffusers.made.given
    assert (asked["guidance_scale"], asked["height"], asked["prompt"]) == (0.0, 64, None)
    assert asked["prompt_embeds"][0].dtype == given["torch_dtype"] == torch.bfloat16
    assert given["text_encoder"] is given["tokenizer"] is None
    assert diffusers.made.placed == ["set_progress_bar_config", "to"]
    workers.paint(replace(job, engine="diffusers-offload", embeds=""))
    assert diffusers.made.placed[-1] == "enable_model_cpu_offload"
    assert diffusers.made.asked["prompt"] == "a fox"
    assert "text_encoder" not in diffusers.made.given


def test_latents_need_not_become_a_picture(job: Any, diffusers: type[Pipeline]) -> None:
    Path(job.picture).unlink(missing_ok=True)
    document = workers.paint(replace(job, engine="diffusers", picture=""))
    assert document["vae_s"] is None
    assert np.array_equal(np.load(job.latents), 4 * np.load(job.noise))
    assert not Path(job.picture).exists()
    assert diffusers.made.asked["output_type"] == "latent"


@pytest.fixture
def play(
    here: object, monkeypatch: Any, toy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """Exit code, document and table, with engines that end as told."""
    ends: dict[str, Any] = {}
    jobs: dict[str, Any] = {}

    def measured(job: Any, **_: Any) -> dict[str, Any]:
        name = "reference" if job.keep_embeds else job.engine
        jobs[name] = job
        told = {"shift": 0.0, "status": "ok", "reason": ""} | ends.get(name, {})
        latents = np.ones((1, 16, 8, 8), np.float32) * (1 + told.pop("shift"))
        np.save(job.latents, latents)
        np.save(Path(job.noise).with_name("embeds.npy"), latents)
        if job.picture:
            shade = 100 if name == "reference" else 110
            Image.new("RGB", (64, 64), (shade,) * 3).save(job.picture)
        figures = {f"step{n}_s": 2.0 for n in ("", "_min", "_max")}
        memory = {"peak_rss_bytes": GIB, "peak_private_bytes": GIB, "peak_vram_bytes": None}
        return {"total_s": 9.0, **figures, **memory, "versions": {name: "1"}, **told}

    def go(*words: str, **told: Any) -> tuple[int, Any, str]:
        ends.clear()
        ends.update(told)
        code = peers.main([str(toy_folder), str(MODEL), "--sizes", "64", "--steps", "2", *words])
        printed = capsys.readouterr().out
        return code, json.loads(printed.splitlines()[-1]) | {"jobs": jobs}, printed

    monkeypatch.setattr(peers, "measured", measured)
    monkeypatch.setattr(peer_floor, "_product_s", lambda *_: 1e-3)
    return go


def test_the_document_has_a_row_for_every_engine(play: Any) -> None:
    code, report, printed = play(diffusers={"shift": 0.5})
    assert (code, report["schema"]) == (0, "zquant-peers-1")
    rows = {row["label"]: row for row in report["rows"]}
    ran = [label for label, row in rows.items() if row["status"] == "ok"]
    assert ran == ["reference", "zquant demo", "diffusers", "diffusers-gguf demo"]
    assert {row["engine"] for row in report["rows"]} == {"reference", *peers.ENGINES}
    assert rows["diffusers"]["latents_error"] == 0.5
    assert rows["zquant demo"]["latents_error"] == 0.0
    assert math.isclose(rows["diffusers"]["psnr_db"], 20 * math.log10(255 / 10))
    assert rows["zquant demo"]["ratio"] == 2.0 / report["ceilings"][0]["floor_s"]
    assert report["versions"]["diffusers"] == "1"
    assert "| sdcpp demo | 64 | skipped: no --sdcpp PATH |" in printed
    assert "| 50.00% | 28.1 dB |" in printed
    assert printed.index("floor_s") < printed.index("| diffusers |")  # the ceiling comes first


FAILED = {"status": "failed", "reason": "no luck"}


def test_only_a_failure_of_zquant_fails_the_benchmark(play: Any) -> None:
    code, report, printed = play(diffusers=FAILED)
    assert (code, "| diffusers | 64 | failed: no luck |" in printed) == (0, True)
    code, report, _ = play(zquant=FAILED)
    assert code == 1
    assert report["rows"][2]["status"] == "ok"  # the others still ran
    code, report, _ = play(zquant={"shift": math.nan})
    assert (code, report["rows"][1]["reason"]) == (1, "its latents are not finite")
    code, report, _ = play("--engines", "diffusers", "sdcpp", reference=FAILED)
    assert code == 1
    assert {row["reason"] for row in report["rows"][1:]} == {"the reference failed"}


def test_engines_are_given_the_same(play: Any) -> None:
    seen = play("--compute-dtype", "float16")[1]["jobs"]
    for name in ("noise", "sigmas", "prompt", "seed", "size"):
        assert len({str(getattr(job, name)) for job in seen.values()}) == 1, name
    assert seen["zquant"].embeds == seen["diffusers"].embeds == seen["reference"].keep_embeds
    assert seen["reference"].model == seen["diffusers"].checkpoint
    dtypes = [seen[name].dtype for name in ("reference", "zquant", "diffusers")]
    assert dtypes == ["float32", "float16", "bfloat16"]
    assert seen["diffusers-gguf"].model == str(MODEL / "dit-Q8_0.gguf")
    report = play("--latents-only")[1]
    pictures = {row["engine"] for row in report["rows"] if "psnr_db" in row}
    assert pictures == {"zquant"}
    assert report["jobs"]["diffusers"].picture == ""
    seen = play("--encode")[1]["jobs"]
    assert {job.embeds for job in seen.values()} == {""}


WRONG = {
    "--sizes 100": "--sizes 100: it must be a multiple of 16",
    "--steps 1": "--steps is 1; it must be at least 2",
    "--engines ollama": "invalid choice: 'ollama'",
    "no-such-model": "no-such-model",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_usage(words: str, toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        peers.main([str(toy_folder), str(MODEL), *words.split()])
    assert end.value.code == 2
    assert WRONG[words] in capsys.readouterr().err
