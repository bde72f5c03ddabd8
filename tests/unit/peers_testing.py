"""The benchmark of engines side by side, imported, and a job for one of them."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

import zquant

with pytest.MonkeyPatch.context() as patch:  # its neighbours are on the path for the import only
    patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    peers: Any = importlib.import_module("peers")
workers: Any = sys.modules["peer_workers"]
peer_floor: Any = sys.modules["peer_floor"]
sdcpp: Any = sys.modules["sdcpp"]
MODEL = Path(zquant.__file__).parent / "demo"  # its DiT is a GGUF file


def job_in(folder: Path, model: Path) -> Any:
    """A picture of 64 pixels in two steps by `model`; its files are in `folder`."""
    return workers.Job(
        engine="zquant",
        checkpoint=str(model),
        model=str(model),
        prompt="a fox",
        size=64,
        steps=2,
        sigmas=[1.0, 0.75, 0.0],
        seed=0,
        device="cpu",
        dtype="float32",
        compute="exact",
        noise=str(folder / "noise.npy"),
        embeds=str(folder / "embeds.npy"),
        latents=str(folder / "latents.npy"),
        picture=str(folder / "picture.png"),
    )
