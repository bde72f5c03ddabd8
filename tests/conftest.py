"""Fixtures shared by all tests: generated checkpoints, and `tools/` on the import path."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# how long an example takes says how busy the machine is
settings.register_profile("zquant", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("zquant")
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
# set before torch is imported: on a shared machine the barriers of tiny operations cost 20 times
# what their arithmetic does, because a thread that waits for a busy core makes all others wait
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # servers of tests are here
os.environ["ZQUANT_CACHE"] = "off"  # tests leave nothing in the home folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official-layout checkpoint of 31 M DiT weights, BF16; read-only, one for all tests."""
    from make_checkpoint import Spec, make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("tiny"), Spec(preset="tiny"))


@pytest.fixture(scope="session")
def tiny_comfy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of `tiny_folder` as ComfyUI's three single files."""
    from make_checkpoint import Spec, make_comfy

    return make_comfy(tmp_path_factory.mktemp("tiny_comfy"), Spec(preset="tiny"))
