"""For tests of benchmarks/streaming.py: its modules, and a zquant and a GPU that are played."""

import argparse
import ctypes
import importlib.util
import json
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch


def load_benchmark() -> Any:
    """benchmarks/streaming.py, with its neighbours on the path while it is imported only."""
    folder = Path(__file__).parents[2] / "benchmarks"
    spec = importlib.util.spec_from_file_location("bench_streaming", folder / "streaming.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        spec.loader.exec_module(module)
    return module


streaming = load_benchmark()
runs, watch = sys.modules["streaming_runs"], sys.modules["watch"]
MIB = 2**20
GIB = 2**30

PLAYER = """
import json, os, shutil, sys, time
words = sys.argv[1:]
given = dict(zip(words[2::2], words[3::2]))  # after the prompt and --json
budget = given.get("--budget") or given.get("--max-ram") or "none"
assert os.environ["ZQUANT_CACHE"] == "off"
assert given["--compute"] == "exact"
part = json.load(open(PARTS)).get(budget if given["--steps"] != "1" else "before", {})
print("plan: some of it", file=sys.stderr, flush=True)
shutil.copy(part["saves"], part["saves"] + ".saved") if "saves" in part else None
held = b"x" * part.get("holds", 0)
here = os.path.join(os.path.dirname(PARTS), str(os.getpid()))
open(here + ".here", "w").close()
end = time.time() + 60
while not os.path.exists(here + ".seen") and time.time() < end:
    time.sleep(0.005)
if "dies" in part:
    sys.exit(part["dies"])
shutil.copy(part.get("latents", LATENTS), given["--save-latents"])
memory = dict.fromkeys(("predicted_vram_bytes", "measured_vram_bytes", "vae_rows", "budget_bytes"))
memory |= {"predicted_host_bytes": 2**26, "predicted_step_s": 0.5, "streamed_blocks": 0}
memory |= {"allocations_after_step_1": 0, "streams": {}, **part.get("memory", {})}
steps = part.get("steps", [9.0, 1.0, 3.0, 2.0])
seconds = {"steps": steps, "text_encoder": 0.25, "vae": 0.5, "total": 20.0}
print(json.dumps({"memory": memory, "timings": seconds, "notices": part.get("notices", [])}))
"""


def subject(**changes: Any) -> Any:
    fields: dict[str, Any] = {
        "path": "a model",
        "dtype": "float32",
        "compute": "exact",
        "blocks": (100, 100, 100, 200),
        "passes": 1,
        "encoder_bpw": 4.5,
        "flop_s": 1e12,
        "compute_s": 0.5,
        "link_bytes_s": 0.0,
        "withheld": 10 * watch.PAGE,
    }
    return runs.Subject(**fields | changes)


def gpu_args(**changes: Any) -> argparse.Namespace:
    fields = {"width": 64, "height": 64, "device": "cuda", "max_ram": None, "ballast": True}
    fields["compute"] = "auto"
    return argparse.Namespace(**fields | changes)


def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Let a script play zquant; what it does within a budget in bytes, "none", or "before"."""
    known: dict[str, dict[str, Any]] = {}
    path, latents = tmp_path / "parts.json", tmp_path / "good.npy"
    np.save(latents, np.arange(8, dtype=np.float32))
    np.save(tmp_path / "other.npy", np.arange(8, dtype=np.float32) + 1)
    code = PLAYER.replace("PARTS", repr(str(path))).replace("LATENTS", repr(str(latents)))
    monkeypatch.setattr(runs, "COMMAND", (sys.executable, "-ISc", code))
    monkeypatch.setattr(streaming, "subject_of", lambda *_: subject())
    started = runs._started

    def prepared(words: Any) -> Any:
        path.write_text(json.dumps(known))
        return started(words)

    monkeypatch.setattr(runs, "_started", prepared)
    look = watch.Watch._sample

    def sample(self: Any, pid: int) -> None:
        """The process waits for a look that began when it held what it holds."""
        waits = (tmp_path / f"{pid}.here").exists()
        look(self, pid)
        if waits:
            (tmp_path / f"{pid}.seen").touch()

    monkeypatch.setattr(watch.Watch, "_sample", sample)
    return known


class Card:
    """A GPU of 32 GiB with 1 GiB taken, in place of torch and NVML; `lists` is NVML's answer.

    What `torch.empty` gave is free again when nobody has it. `code` is NVML's for the listing.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lists: list[tuple[int, int]]) -> None:
        self.lists, self.others, self.code = lists, GIB, 0
        self.held: list[weakref.ref[SizeOnly]] = []
        cuda: Any = torch.cuda
        monkeypatch.setattr(cuda, "mem_get_info", lambda _: (self.free, 32 * GIB))
        monkeypatch.setattr(cuda, "empty_cache", lambda: None)
        uuid = SimpleNamespace(uuid="0123")
        monkeypatch.setattr(cuda, "get_device_properties", lambda _: uuid)
        monkeypatch.setattr(torch, "empty", self.allocate)
        nvml = SimpleNamespace(
            nvmlInit_v2=lambda: 0,
            nvmlDeviceGetHandleByUUID=lambda uuid, _: int(uuid != b"GPU-0123"),
            nvmlDeviceGetComputeRunningProcesses_v3=self.listing,
        )
        monkeypatch.setattr(ctypes, "CDLL", lambda _: nvml)

    @property
    def free(self) -> int:
        found = [held() for held in self.held]
        return 32 * GIB - self.others - sum(memory.numel() for memory in found if memory)

    def allocate(self, n: int, **_: Any) -> "SizeOnly":
        if n > self.free:
            raise torch.OutOfMemoryError(f"{n} of {self.free}")
        memory = SizeOnly(n)
        self.held.append(weakref.ref(memory))
        return memory

    def listing(self, _: Any, n: Any, found: Any) -> int:
        n._obj.value = len(self.lists)
        for at, (pid, used) in enumerate(self.lists):
            found._obj[at].pid, found._obj[at].used = pid, used
        return self.code


class SizeOnly:
    """A tensor that takes no memory."""

    def __init__(self, n: int) -> None:
        self.n = n

    def numel(self) -> int:
        return self.n
