"""`zquant run --count`: every picture is one of its own, saved as soon as it is there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from zquant.image import read_recipe

Run = Callable[..., tuple[int, str, str]]


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_every_picture_is_saved_as_it_comes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from zquant.phases import Phases

    real = Phases._decoded
    decoded = []

    def decode(self: Phases, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        decoded.append(1)
        if len(decoded) == 3:
            raise KeyboardInterrupt
        return real(self, vae, latents)

    monkeypatch.setattr(Phases, "_decoded", decode)
    code, out, _ = run("a fox", "--count", "3", "--seed", "7")
    assert code == 130
    assert out == "zquant-1.png  seed 7\nzquant-2.png  seed 8\n"
    assert read_recipe("zquant-2.png")["seed"] == 8
    assert not Path("zquant-3.png").exists()


def test_pictures_without_a_seed_get_one_that_counts_up(run: Run) -> None:
    _, out, _ = run("a fox", "--count", "2", "--json")
    first, second = (recipe["seed"] for recipe in json.loads(out)["recipes"])
    assert second == first + 1
    run("a fox", "--seed", str(second), "--out", "again.png")
    assert pixels(Path("again.png")) == pixels(Path("zquant-2.png"))


def test_every_picture_of_several_has_its_own_initial_latents(run: Run) -> None:
    noise = np.random.default_rng(5).standard_normal((2, 16, 4, 4), np.float32)
    np.save("both.npy", noise)
    np.save("second.npy", noise[1:])
    assert run("a fox", "--initial-latents", "both.npy", "--count", "2")[0] == 0
    assert run("a fox", "--initial-latents", "second.npy", "--out", "again.png")[0] == 0
    assert pixels(Path("again.png")) == pixels(Path("zquant-2.png"))
    assert pixels(Path("again.png")) != pixels(Path("zquant-1.png"))
    code, _, err = run("a fox", "--initial-latents", "both.npy", "--count", "3")
    assert code == 2
    assert "initial_latents are torch.float32 [2, 16, 4, 4]; expected floats [3, 16, 4, 4]" in err
