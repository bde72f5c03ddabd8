"""For tests of zquant bench: a measuring process that is played, and a document it gives."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from zquant.bench import measure

PLAYER = """
import json, os, sys
job = json.loads(sys.argv[1])
part = json.load(open({script!r}))
with open({log!r}, "a") as log:
    log.write(json.dumps(job) + "\\n")
n_surveys = open({log!r}).read().count('"survey"')
if job["kind"] == "survey":
    said = part.get("survey again", part["survey"]) if n_surveys == 2 else part["survey"]
else:
    said = part[f"{{job['width']}}x{{job['height']}}"]
print("a library says hello", flush=True)
for line in said:
    if "exit" in line:
        os._exit(line["exit"])
    print(json.dumps(line), flush=True)
"""

MEMORY = {
    "predicted_vram_bytes": None,
    "predicted_host_bytes": 500,
    "predicted_step_s": 1.5,
    "streamed_blocks": 0,
    "streams": {},
}
CEILING = {
    "streamed_blocks": 0,
    "product_rows": 64,
    "product_flop_s": 1e11,
    "product_int8_op_s": None,
    "product_int8_reason": "",
    "step_flop": 1e11,
    "products_s": 1.0,
    "weights_s": 0.5,
    "moving_s": 0.0,
    "roofline_s": 1.0,
    "bound": "products",
    "expand_s": 0.25,
}
SURVEY = {
    "event": "survey",
    "machine": {
        "system": "Linux",
        "cores": 2,
        "ram_bytes": 2**30,
        "python": "3.11",
        "zquant": "0.1.0",
        "torch": "2.6",
        "triton": None,
        "driver": None,
        "plan": {"is_gpu": False},
    },
    "device": {
        "name": "a CPU",
        "uuid": None,
        "compute_dtype": "float32",
        "compute": "exact",
        "attention": "sdpa",
    },
    "model": {
        "name": "a",
        "steps": 8,
        "files": {
            "dit": {"name": "dit.gguf", "sha256": "00"},
            "text_encoder": {"name": "text_encoder.gguf", "sha256": None},
            "vae": {"name": "vae.safetensors", "sha256": None},
        },
    },
    "rates": {"memory_bytes_s": 1e10, "link_bytes_s": 0.0, "file_bytes_s": 1e9},
    "sizes": [{"n_tokens": 64, "ceiling": CEILING}],
}
READY = {"event": "ready"}
PROGRESS = {"event": "progress", "phase": "denoise", "done": 1, "total": 3}


def painted(total_s: float, steps_s: list[float], **fields: Any) -> dict[str, Any]:
    """The event of one picture."""
    return {
        "event": "run",
        "plan_s": 0.1,
        "text_encoder_s": 0.2,
        "first_step_s": 9.0,
        "steps_s": steps_s,
        "vae_s": 0.4,
        "save_s": 0.01,
        "total_s": total_s,
        "memory": MEMORY,
        "peak_ram_bytes": 600,
        "peak_allocator_bytes": None,
        "storage_read_bytes": 7,
        "notices": [],
        **fields,
    }


class Play:
    """What the workers say, by kind of job or size, and the jobs they were given."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._script, self._log = folder / "script.json", folder / "log"
        player = PLAYER.format(script=str(self._script), log=str(self._log))
        monkeypatch.setattr(measure, "WORKER", (sys.executable, "-S", "-c", player))
        self.parts: dict[str, Any] = {
            "survey": [SURVEY],
            "64x64": [
                READY,
                PROGRESS,
                painted(20.0, [8.0, 6.0]),
                painted(12.0, [2.0, 2.5], peak_ram_bytes=900),
                painted(10.0, [2.0, 4.0]),
            ],
        }
        self.said: list[str] = []
        self.seen: list[tuple[str, int, int]] = []

    def bench(self, **fields: Any) -> dict[str, Any]:
        """The document, of one size and two warm pictures unless told otherwise."""
        self._script.write_text(json.dumps(self.parts))
        self._log.unlink(missing_ok=True)
        what = measure.Bench(**{"model": "a", "sizes": [(64, 64)], "repeat": 2} | fields)
        return measure.bench(what, "a command", self.said.append, lambda *a: self.seen.append(a))

    @property
    def jobs(self) -> list[dict[str, Any]]:
        """In the order they were given."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]
