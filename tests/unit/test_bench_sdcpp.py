"""stable-diffusion.cpp as a peer: how it is asked, read, watched, and how it fails."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.peers_testing import MODEL, job_in, sdcpp, workers


@pytest.fixture
def job(tmp_path: Path) -> Any:
    return job_in(tmp_path, MODEL)


SAID = [
    (0.0, "[INFO ] loading\n  |=====| 686/686 - 6.66GB/s\n  |=| 3/3 - 9.00GB/s\n"),
    (1.0, "[INFO ] get_learned_condition completed, taking 1500 ms\n"),
    (5.0, "\r  |=>   | 1/3 - 3.00s/it\033[K"),
    (7.0, "\r  |==>  | 2/3 - 2.50s/it\033[K"),  # a mean: the step took 2 s
    (7.5, "\r  |=====| 3/3 - 1.83it/s\033[K\n"),
    (7.6, "[INFO ] sampling completed, taking 5.50s\n[INFO ] decode_first_"),
    (9.9, "stage completed, taking 2.25s\n  |=====| 3/3 - 4.00it/s\n"),  # tiles of the decoder
]


def test_stable_diffusion_cpp_is_read_by_when_it_speaks(job: Any) -> None:
    three = replace(job, steps=3, sigmas=[1.0, 0.9, 0.6, 0.0])
    found = sdcpp.sdcpp_document(SAID, three)
    assert found["steps_s"] == [3.0, 2.0, 0.5]
    assert (found["text_encoder_s"], found["vae_s"]) == (1.5, 2.25)
    with pytest.raises(ValueError, match=r"shows steps \[1, 2\] and a sampling time of None"):
        sdcpp.sdcpp_document(SAID[:4], three)


def player(tmp_path: Path, body: str, shebang: str = f"#!{sys.executable}\n") -> Path:
    """A program that is not stable-diffusion.cpp."""
    path = tmp_path / "sd-cli"
    path.write_text(f"{shebang}import json, sys, time\n{body}")
    path.chmod(0o755)
    return path


PLAYED = """
words = sys.argv[1:-2]
given = dict(zip(words[::2], words[1::2]))
open(given["--output"] + ".json", "w").write(json.dumps(given))
for i in (1, 2):
    time.sleep(0.2 if i == 1 else 1.5)
    print(f"\\r  |=>  | {i}/2 - 5.00it/s", end="", flush=True)
print("\\n[INFO ] sampling completed, taking 0.50s")
"""


def test_a_program_is_run_watched_and_read(job: Any, tmp_path: Path) -> None:
    mine = replace(job, engine="sdcpp", model=str(MODEL))
    program = player(tmp_path, PLAYED)
    row = workers.measured(mine, sdcpp=program, gpu=None, limit_s=20)
    assert (row["status"], row["reason"]) == ("ok", "")
    assert 0.1 < row["step_s"] < row["total_s"]  # slept 1.5 s
    assert math.isclose(row["first_step_s"], max(0, 0.5 - row["step_s"]), abs_tol=1e-9)
    assert row["peak_rss_bytes"] > row["peak_private_bytes"] > 2**20
    assert row["peak_vram_bytes"] is None
    given = json.loads(Path(job.picture + ".json").read_text())
    assert given["--diffusion-model"] == str(MODEL / "dit-Q8_0.gguf")
    assert given["--llm"] == str(MODEL / "text_encoder-Q8_0.gguf")
    assert (given["--sigmas"], given["--cfg-scale"]) == ("1,0.75,0", "1.0")
    assert (given["--steps"], given["--width"], given["--height"]) == ("2", "64", "64")


def test_a_program_that_fails_says_why(job: Any, tmp_path: Path) -> None:
    def reason(body: str, limit_s: float = 20, **how: str) -> str:
        mine = replace(job, engine="sdcpp", model=str(MODEL))
        program = player(tmp_path, body, **how)
        row = workers.measured(mine, sdcpp=program, gpu=None, limit_s=limit_s)
        assert row["status"] == "failed"
        return str(row["reason"])

    assert reason("sys.exit('out of luck')") == "exit code 1: out of luck"
    assert reason("time.sleep(20)", 0.2) == "stopped after 0.2 s"
    kill = "import os; os.kill(os.getpid(), 9)"
    assert reason(kill) == "killed by the system, as for want of memory"
    assert "shows steps []" in reason("print('done')")
    assert "Exec format error" in reason("", shebang="\0")
