"""stable-diffusion.cpp as a peer: its arguments and what its output says, as of commit 487de75."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zquant.models.checkpoint import model_files

if TYPE_CHECKING:
    from peer_workers import Job

__all__ = ["sdcpp_command", "sdcpp_document", "sdcpp_version"]


def sdcpp_version(program: Path | None) -> str | None:
    """The first line of stable-diffusion.cpp about itself; None where it says none."""
    if program is None or shutil.which(program) is None:
        return None
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip().partition("\n")[0] or None


def sdcpp_command(binary: str, job: "Job") -> list[str]:
    """The program and its arguments; its scale of guidance is 1 where ours is 0.

    `--rng cpu` is torch's generator, so that the noise should be that of the seed. Weights are
    mapped, and its flash attention is on for a GPU alone, as its documentation advises.
    """
    files = model_files(job.model, {}, None)
    flags = {
        "--diffusion-model": files.dit,
        "--llm": files.text_encoder,
        "--vae": files.vae,
        "--prompt": job.prompt,
        "--width": job.size,
        "--height": job.size,
        "--steps": job.steps,
        "--sigmas": ",".join(f"{sigma:.8g}" for sigma in job.sigmas),
        "--sampling-method": "euler",
        "--cfg-scale": 1.0,
        "--rng": "cpu",
        "--seed": job.seed,
        "--threads": torch.get_num_threads(),
        "--output": job.picture,
    }
    words = [str(word) for flag in flags.items() for word in flag]
    attention = ["--diffusion-fa"] if job.device.startswith("cuda") else []
    return [binary, *words, *attention, "--mmap", "--verbose"]


def sdcpp_document(heard: Sequence[tuple[float, str]], job: "Job") -> dict[str, Any]:
    """What its output says, as a worker would: `heard` is when each piece came, and the piece.

    A step ends when its progress is printed: the rate beside it is of the step in some versions
    and the mean of all steps in others. The first step is what the others leave of all sampling.

    Raises:
        ValueError: the steps are not in the output.
    """
    mark = re.compile(rf"\b(\d+)/{job.steps} - [\d.]+(?:s/it|it/s)")
    ends: dict[int, float] = {}
    for at, piece in heard:
        for found in mark.finditer(piece):
            ends.setdefault(int(found[1]), at)
    text = "".join(piece for _, piece in heard)
    total = _taking("sampling completed", text)
    if list(ends) != list(range(1, job.steps + 1)) or total is None:
        raise ValueError(
            f"the output shows steps {list(ends)} and a sampling time of {total}; expected "
            f"1 to {job.steps} and 'sampling completed, taking'"
        )
    later = [ends[i + 1] - ends[i] for i in range(1, job.steps)]
    return {
        "steps_s": [max(0.0, total - sum(later)), *later],
        "text_encoder_s": _taking("get_learned_condition completed", text),
        "vae_s": _taking("decode_first_stage completed", text),
        "sigmas": job.sigmas,
    }


def _taking(what: str, text: str) -> float | None:
    """Seconds of a phase; the log gives them as "1.50s" or as "1500 ms"."""
    found = re.search(rf"{what}, taking ([\d.]+) ?(ms|s)", text)
    if found is None:
        return None
    return float(found[1]) / (1000 if found[2] == "ms" else 1)
