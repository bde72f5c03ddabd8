"""`zquant calibrate`: the sums are those of the inputs, for every linear, however it is run."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zquant
from zquant import calibrate as calibrating
from zquant import sampling
from zquant.calibrate import Calibration, calibrate, exact_device
from zquant.cli.main import main
from zquant.formats.imatrix import Imatrix, read_imatrix
from zquant.formats.model_folder import find_model
from zquant.formats.names import dit_file_names, text_encoder_file_names
from zquant.layers.linear import QuantLinear
from zquant.memory.device import Device
from zquant.memory.forecast import Forecast
from zquant.memory.plan import NetworkPlan, spread
from zquant.memory.stream import StreamShape
from zquant.models.checkpoint import Checkpoint
from zquant.models.dit import DiT, patchify
from zquant.painting import Painting

WIDTH, HEIGHT = 48, 64  # 12 patches, padded to 32 tokens
PROMPTS = ("a red fox", "a boat")


@pytest.fixture(scope="module", autouse=True)
def quick(toy_engine: zquant.Engine) -> Iterator[None]:
    """Reading the vocabulary takes a second, and so does measuring which dtype is faster."""
    tokenizer, real = toy_engine.prompts.tokenizer, calibrating.probe

    def probe(device: str, dtype: str = "float32", **fields: Any) -> Device:
        return real(device, dtype, **fields)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "tokenizer", lambda _: tokenizer)
        patch.setattr(calibrating, "probe", probe)
        yield


def request(prompt: str = PROMPTS[0], **fields: Any) -> zquant.RunRequest:
    defaults = {"width": WIDTH, "height": HEIGHT, "steps": 2, "seed": 1}
    return zquant.RunRequest(prompt=prompt, **(defaults | fields))


def measure(folder: Path, *requests: zquant.RunRequest, **fields: Any) -> Imatrix:
    calibration = Calibration(
        files=find_model(folder),
        requests=requests or (request(),),
        dataset="prompts.txt",
        device=exact_device("cpu"),
        **fields,
    )
    return calibrate(calibration)


@pytest.fixture(scope="module")
def one(toy_folder: Path) -> Imatrix:
    """Of one picture of two steps."""
    return measure(toy_folder)


def same(found: Imatrix, expected: Imatrix) -> None:
    assert set(found.entries) == set(expected.entries)
    for name, sums in expected.entries.items():
        assert found.entries[name].count == sums.count
        np.testing.assert_array_equal(found.entries[name].squares, sums.squares, err_msg=name)


def test_every_linear_has_an_entry_of_its_width(one: Imatrix, toy_engine: zquant.Engine) -> None:
    widths = {}
    files = {"dit": dit_file_names, "text_encoder": text_encoder_file_names}
    for component, file_names in files.items():
        network = toy_engine.checkpoint.blank(component)
        linears = {n: m for n, m in network.named_modules() if isinstance(m, QuantLinear)}
        for name, officials in file_names(toy_engine.checkpoint.parts[component]):
            linear = linears.get(officials[0].removesuffix(".weight"))
            if linear is not None and officials[0].endswith(".weight"):
                widths[name] = linear.in_features
    assert {name: len(sums.squares) for name, sums in one.entries.items()} == widths
    assert {"layers.1.attention.qkv.weight", "blk.1.ffn_down.weight"} < set(widths)
    assert {"x_embedder.weight", "cap_embedder.1.weight", "t_embedder.mlp.0.weight"} < set(widths)


def test_tokens_are_counted_as_the_networks_see_them(
    one: Imatrix, toy_engine: zquant.Engine
) -> None:
    n_prompt = len(toy_engine.prompts.ids([PROMPTS[0]])[PROMPTS[0]].ids)
    counts = {name: sums.count for name, sums in one.entries.items()}
    assert n_prompt < 32
    assert counts["blk.0.attn_q.weight"] == counts["cap_embedder.1.weight"] == n_prompt
    assert counts["context_refiner.0.attention.qkv.weight"] == 32
    assert counts["x_embedder.weight"] == counts["final_layer.linear.weight"] == 2 * 12
    assert counts["noise_refiner.0.feed_forward.w2.weight"] == 2 * 32
    assert counts["layers.1.feed_forward.w2.weight"] == 2 * (32 + 32)
    assert counts["layers.0.adaLN_modulation.0.weight"] == 2
    assert (one.datasets, one.n_chunks, one.chunk_size) == (("prompts.txt",), 1, 2 * (32 + 32))


def test_sums_of_the_embedder_are_those_of_the_noise(toy_folder: Path) -> None:
    found = measure(toy_folder, request(steps=1), request(PROMPTS[1], steps=1, seed=9))
    noise = [sampling.initial_noise((1, 16, HEIGHT // 8, WIDTH // 8), seed) for seed in (1, 9)]
    squares = patchify(torch.cat(noise)).double().square().sum((0, 1)).numpy()
    np.testing.assert_allclose(found.entries["x_embedder.weight"].squares, squares, rtol=1e-5)


def test_sums_of_a_block_are_those_of_its_inputs(
    one: Imatrix, toy_folder: Path, toy_engine: zquant.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[torch.Tensor]] = {}
    real = QuantLinear.forward

    def forward(self: QuantLinear, x: torch.Tensor, out: torch.Tensor | None = None) -> Any:
        seen.setdefault(id(self), []).append(x.reshape(-1, x.shape[-1]).double().square().sum(0))
        return real(self, x, out)

    made = []
    build = Checkpoint.dit
    monkeypatch.setattr(QuantLinear, "forward", forward)
    monkeypatch.setattr(Checkpoint, "dit", lambda *args: made.append(build(*args)) or made[-1])
    toy_engine.generate(request())
    block: Any = made[0].get_submodule("layers.1")
    linears = {
        "attention.qkv": block.attention.to_v,
        "attention.out": block.attention.to_out[0],
        "feed_forward.w2": block.feed_forward.w2,
    }
    for name, linear in linears.items():
        expected = torch.stack(seen[id(linear)]).sum(0).numpy()
        found = one.entries[f"layers.1.{name}.weight"].squares
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=name)


def test_pictures_add_up(one: Imatrix, toy_folder: Path) -> None:
    other = measure(toy_folder, request(PROMPTS[1], seed=2))
    both = measure(toy_folder, request(), request(PROMPTS[1], seed=2))
    for name, sums in both.entries.items():
        pair = [each.entries[name] for each in (one, other)]
        assert sums.count == sum(each.count for each in pair)
        expected = sum(each.squares for each in pair)
        np.testing.assert_allclose(sums.squares, expected, rtol=1e-12)
    assert both.n_chunks == 2


def test_guidance_measures_the_negative_prompt_too(one: Imatrix, toy_folder: Path) -> None:
    guided = measure(toy_folder, request(guidance_scale=3.0, negative_prompt="a boat"))
    name = "layers.0.attention.qkv.weight"
    assert guided.entries[name].count == 2 * one.entries[name].count


@pytest.mark.parametrize("kind", ["streamed", "expanded"])
def test_where_the_blocks_are_changes_no_sum(
    one: Imatrix, toy_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    real = Forecast.plan
    every = {kind: spread(3, 3), "shape": None}
    if kind == "streamed":
        every["shape"] = StreamShape(n_slots=2, n_ring=0, kept=frozenset())
    placed = NetworkPlan(**({"streamed": frozenset(), "expanded": frozenset()} | every))
    monkeypatch.setattr(Forecast, "plan", lambda *args: replace(real(*args), dit=placed))
    same(measure(toy_folder), one)


def test_sums_do_not_depend_on_the_chunks(
    one: Imatrix, toy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrating, "CHUNK", 64)
    small = measure(toy_folder)
    for name, sums in one.entries.items():
        np.testing.assert_allclose(small.entries[name].squares, sums.squares, rtol=1e-5)


def test_a_picture_is_what_it_is_without_being_watched(
    toy_folder: Path, toy_engine: zquant.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    real = Painting.denoise

    def denoise(self: Painting, journal: Any) -> None:
        real(self, journal)
        kept.append(self.jobs[0].pictures[0].latents)

    monkeypatch.setattr(Painting, "denoise", denoise)
    measure(toy_folder)
    toy_engine.generate(request())
    assert torch.equal(kept[0], kept[1])


def test_float16_becomes_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    real = calibrating.probe
    monkeypatch.setattr(
        calibrating,
        "probe",
        lambda device, dtype="float16", **fields: real(device, dtype, **fields),
    )
    assert exact_device("cpu").compute_dtype == torch.float32


def test_numbers_that_are_not_finite_are_refused(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DiT.prepare

    def prepare(self: DiT, embeds: torch.Tensor, height: int, width: int) -> Any:
        self.t_embedder(torch.full((1,), torch.inf))
        return real(self, embeds, height, width)

    monkeypatch.setattr(DiT, "prepare", prepare)
    with pytest.raises(zquant.ZQuantError, match=r"inputs of 't_embedder.* are not finite"):
        measure(toy_folder)


@pytest.fixture
def words(toy_folder: Path, tmp_path: Path) -> list[str]:
    """A command line without `--out`."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\n# none\na boat\n")
    command = ["calibrate", "--model", str(toy_folder), "--prompts", str(prompts), "--steps", "2"]
    return [*command, "--width", str(WIDTH), "--height", str(HEIGHT), "--device", "cpu"]


def test_the_command_writes_the_file_and_prints_its_path(
    words: list[str], one: Imatrix, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fox.gguf"
    assert main([*words, "--out", str(out), "--limit", "1", "--seed", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n"
    assert "from 1 pictures" in captured.err
    assert f"zquant convert SOURCE OUT --imatrix {out}" in captured.err
    found = read_imatrix(out)
    assert found.datasets == ("prompts.txt",)
    for name, sums in one.entries.items():
        np.testing.assert_allclose(found.entries[name].squares, sums.squares, rtol=1e-6)
    assert main([*words, "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["pictures"], document["matrices"]) == (2, len(one.entries))
    assert document["tokens_per_picture"] == 2 * (32 + 32)


def test_interrupted_it_leaves_nothing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = set(tmp_path.iterdir())
    for name in ("zquant.painting.Painting.denoise", "zquant.formats.part_file.os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(name, interrupt)
            assert main([*words, "--out", str(tmp_path / "a.gguf")]) == 130
        assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        (["--limit", "0"], 2, "--limit is 0; it must be at least 1"),
        (["--out", "nowhere/a.gguf"], 1, "folder 'nowhere' does not exist"),
        (["--prompts", "nothing.txt"], 1, "nothing.txt: cannot be read"),
        (["--device", "cuda:9"], 1, "'cuda:9' is not there"),
        (["--width", "40"], 1, "width is 40"),
    ],
)
def test_what_cannot_work_is_one_message(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: list[str],
    code: int,
    message: str,
) -> None:
    assert main([*words, "--out", str(tmp_path / "a.gguf"), *changed]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.gguf").exists()
