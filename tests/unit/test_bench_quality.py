"""The comparison of policies: its measures by hand, whom it judges, what it finds unchanged."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

with pytest.MonkeyPatch.context() as patch:  # its neighbours are on the path for the import only
    patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    quality: Any = importlib.import_module("quality")
C1, C2 = 6.5025, 58.5225


def picture(values: np.ndarray[Any, Any]) -> Image.Image:
    """Of `[H, W]` or `[H, W, 3]` levels."""
    levels = values if values.ndim == 3 else np.repeat(values[..., None], 3, -1)
    return Image.fromarray(levels.astype(np.uint8))


def flat(level: int, side: int = 16) -> Image.Image:
    return picture(np.full((side, side), level))


def test_ssim_of_equal_pictures_is_one() -> None:
    noise = picture(np.random.default_rng(0).integers(0, 256, (24, 17, 3)))
    assert quality.ssim(noise, noise) == pytest.approx(1, abs=1e-12)


def test_ssim_of_flat_pictures_is_that_of_their_means() -> None:
    wanted = (2 * 100 * 50 + C1) / (100**2 + 50**2 + C1)
    assert quality.ssim(flat(100), flat(50)) == pytest.approx(wanted, abs=1e-9)
    assert quality.ssim(flat(0), flat(255)) == pytest.approx(C1 / (255**2 + C1), abs=1e-9)


def test_ssim_of_one_window_is_the_formula() -> None:
    """Sums over an 11 x 11 Gaussian, written out."""
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 256, (2, 11, 11)).astype(np.float64)
    at = np.arange(-5, 6)
    window = np.exp(-(at[:, None] ** 2 + at[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    mean_a, mean_b = (window * a).sum(), (window * b).sum()
    var_a = (window * (a - mean_a) ** 2).sum()
    var_b = (window * (b - mean_b) ** 2).sum()
    both = (window * (a - mean_a) * (b - mean_b)).sum()
    wanted = (2 * mean_a * mean_b + C1) * (2 * both + C2)
    wanted /= (mean_a**2 + mean_b**2 + C1) * (var_a + var_b + C2)
    assert quality.ssim(picture(a), picture(b)) == pytest.approx(wanted, abs=1e-9)


def test_ssim_is_the_mean_over_windows_and_channels() -> None:
    side = np.full((11, 24, 3), 100)
    other = side.copy()
    other[:, :, 2] = 50  # one channel of three, flat
    third = (2 * 100 * 50 + C1) / (100**2 + 50**2 + C1)
    assert quality.ssim(picture(side), picture(other)) == pytest.approx((2 + third) / 3, abs=1e-9)
    far = side.copy()
    far[:, 23] = 255  # within the last of 14 windows only
    found = quality.ssim(picture(side), picture(far))
    assert 13 / 14 < found < 1
    assert quality.ssim(picture(far), picture(side)) == pytest.approx(found, abs=1e-12)


def test_ssim_of_a_negative_is_negative() -> None:
    noise = np.random.default_rng(2).integers(-100, 101, (32, 32))
    assert quality.ssim(picture(128 + noise), picture(128 - noise)) < -0.9


@pytest.mark.parametrize(("a", "b"), [(flat(1, 16), flat(1, 12)), (flat(1, 10), flat(1, 10))])
def test_ssim_needs_two_pictures_with_a_window(a: Image.Image, b: Image.Image) -> None:
    with pytest.raises(ValueError, match="needs one size, 11 or more"):
        quality.ssim(a, b)


def painted(
    latents: list[float], level: int = 100, *, right: bool | None = None, embeds: float = 1.0
) -> Any:
    return quality.Painted(
        embeds=torch.full((3, 4), embeds),
        latents=torch.tensor(latents).reshape(-1, 1, 1, 1) * torch.ones(16, 2, 2),
        image=flat(level),
        right=right,
    )


def test_errors_are_medians_per_step_and_the_worst_is_kept() -> None:
    exact = [painted([1.0, 2.0]) for _ in range(3)]
    found = quality.compare(
        [
            painted([1.1, 2.0], embeds=1.2),
            painted([1.2, 2.2], 90, embeds=1.1),
            painted([1.5, 3.0]),
        ],
        exact,
    )
    assert found["latents_error"] == pytest.approx([0.2, 0.1])
    assert found["latents_error_worst"] == pytest.approx(0.5)
    assert found["prompt_embeds_error"] == pytest.approx(0.1)
    assert found["psnr_db_lowest"] == pytest.approx(20 * np.log10(255 / 10))
    assert found["psnr_db_lowest"] < found["psnr_db_mean"] < 58.93
    lowest = (2 * 100 * 90 + C1) / (100**2 + 90**2 + C1)
    assert found["ssim_lowest"] == pytest.approx(lowest)
    assert found["ssim_mean"] == pytest.approx((2 + lowest) / 3)


def test_the_share_of_right_pictures_counts_judged_ones() -> None:
    verdicts = [painted([1.0], right=right) for right in (True, False, True, None)]
    assert quality.share_right(verdicts) == pytest.approx(2 / 3)
    assert quality.share_right(verdicts[3:]) is None


def test_the_demo_is_known_by_its_size(toy_folder: Path, tmp_path: Path) -> None:
    assert quality.is_demo(quality.DEMO)
    assert not quality.is_demo(toy_folder)
    assert not quality.is_demo(tmp_path)
    assert all(case.scene for case in quality.cases_of(3, 0, demo=True))
    plain = quality.cases_of(2, 5, demo=False)
    assert [(c.prompt, c.seed, c.scene) for c in plain] == [
        (quality.PROMPTS[0], 5, None),
        (quality.PROMPTS[1], 6, None),
    ]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[dict[str, Any], str]]:
    """Document and table, with the checkpoint itself in the place of what is converted."""
    monkeypatch.setattr(quality, "convert", lambda checkpoint, *_: checkpoint)

    def go(checkpoint: Path, *words: str) -> tuple[dict[str, Any], str]:
        words = ("--qtypes", "Q8_0", "--steps", "2", *words)
        assert quality.main([str(checkpoint), str(tmp_path), *words]) == 0
        printed = capsys.readouterr().out
        return json.loads(printed.splitlines()[-1]), printed

    return go


def test_nothing_is_lost_where_nothing_is_converted(run: Any, toy_folder: Path) -> None:
    report, printed = run(toy_folder, "--size", "32", "--prompts", "2")
    assert report["schema"] == "zquant-quality-1"
    first, exact, int8 = report["rows"]
    assert (first["qtype"], first["right"]) == ("checkpoint", None)
    assert exact["prompt_embeds_error"] == 0
    assert exact["latents_error"] == [0, 0]
    assert (exact["ssim_lowest"], round(exact["psnr_db_mean"], 1)) == (pytest.approx(1), 58.9)
    assert int8["prompt_embeds_error"] == 0  # int8 is of the DiT
    assert 0 < int8["latents_error"][0] < int8["latents_error"][1] < 0.5
    assert "| Q8_0 | int8 |" in printed


def test_every_prompt_is_painted_from_its_own_noise(toy_folder: Path) -> None:
    args = SimpleNamespace(size=32, steps=1, device="cpu", judged=False)
    cases = quality.cases_of(2, 0, demo=False)
    first, second = quality.paint(toy_folder, cases, "exact", args)
    assert len(first.embeds) != len(second.embeds)
    (again,) = quality.paint(toy_folder, cases[1:], "exact", args)
    assert torch.equal(second.latents, again.latents)
    assert first.latents.shape == (1, 16, 4, 4)


def test_the_demo_is_judged_at_sizes_that_the_judge_can_see(run: Any) -> None:
    words = ("--prompts", "1", "--computes", "exact", "--steps", "8")
    report, _ = run(quality.DEMO, *words)
    assert report["settings"]["size"] == 128
    assert [row["right"] for row in report["rows"]] == [1.0, 1.0]
    report, _ = run(quality.DEMO, *words, "--size", "64")
    assert [row["right"] for row in report["rows"]] == [None, None]


WRONG = {
    "--prompts 0": "it must be from 1 to 8",
    "--prompts 9": "it must be from 1 to 8",
    "--size 100": "it must be a multiple of 16",
    "--computes fp8": "invalid choice: 'fp8'",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_usage(
    words: str, toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        quality.main([str(toy_folder), str(tmp_path), *words.split()])
    assert end.value.code == 2
    assert WRONG[words] in capsys.readouterr().err


def test_a_converted_folder_is_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        quality.main([str(tmp_path), str(tmp_path)])
    assert end.value.code == 2
    assert "is not an official checkpoint folder" in capsys.readouterr().err
