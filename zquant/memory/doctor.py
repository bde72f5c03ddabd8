"""What this machine is and which path every kernel family takes on it: `zquant doctor`."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from zquant_kernels import runtime

import zquant
from zquant.memory.device import Device
from zquant.memory.driver import driver_version
from zquant.memory.machine import ram_total
from zquant.models.dit_block import EXACT
from zquant.units import format_bytes

__all__ = ["describe_machine", "diagnose", "diagnosis_text"]


def diagnose(device: Device) -> dict[str, Any]:
    """This machine and what was chosen on it, as a JSON document."""
    return {
        "kind": "doctor",
        "machine": describe_machine(),
        "device": device.name,
        "no_gpu_reason": device.no_gpu,
        "compute_dtype": str(device.compute_dtype).removeprefix("torch."),
        "compute_dtype_reason": device.reason,
        "compute": device.compute.mode,
        "compute_reason": device.paths.reason,
        "paths": [asdict(path) for path in device.paths.families],
        "exact": [{"block": b, "input": i, "reason": reason} for b, i, reason in EXACT],
    }


def diagnosis_text(document: Mapping[str, Any]) -> str:
    """What `diagnose` gave, as aligned text for a terminal."""
    machine = document["machine"]
    ram = format_bytes(machine["ram_bytes"])
    triton = " ".join(filter(None, [machine["triton"] or "", machine["triton_reason"]]))
    pairs = {
        "system": f"{machine['system']}, {machine['cores']} cores, {ram} RAM",
        "python": machine["python"],
        "zquant": machine["zquant"],
        "torch": machine["torch"],
        "triton": triton,
        "driver": machine["driver"] or "no NVIDIA driver found",
    }
    for i, gpu in enumerate(machine["gpus"]):
        free, total = format_bytes(gpu["vram_free_bytes"]), format_bytes(gpu["vram_bytes"])
        pairs[f"gpu {i}"] = f"{gpu['name']}, compute capability {gpu['capability']}, {free} of "
        pairs[f"gpu {i}"] += f"{total} free"
    pairs["device"] = document["device"]
    if document["no_gpu_reason"]:
        pairs["no gpu"] = document["no_gpu_reason"]
    pairs["dtype"] = f"{document['compute_dtype']}: {document['compute_dtype_reason']}"
    pairs["compute"] = f"{document['compute']}: {document['compute_reason']}"
    rows = [("family", "path", "why not faster"), *(tuple(p.values()) for p in document["paths"])]
    exact = [f"{e['block']} {e['input']}: {e['reason']}" for e in document["exact"]]
    return "\n".join(
        [
            *_columns(list(pairs.items())),
            "",
            *_columns(rows),
            "",
            "never int8:",
            *(f"  {line}" for line in exact),
        ]
    )


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def describe_machine() -> dict[str, Any]:
    """One JSON-ready document; what cannot be found out is None."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": os.cpu_count(),
        "ram_bytes": ram_total(),
        "python": platform.python_version(),
        "zquant": zquant.__version__,
        "torch": torch.__version__,
        "triton": getattr(runtime.triton, "__version__", None),
        "triton_reason": runtime.REASON,
        "driver": driver_version(),
        "gpus": [_gpu(i) for i in range(_n_gpus())],
    }


def _n_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpu(index: int) -> dict[str, Any]:
    free, total = torch.cuda.mem_get_info(index)
    return {
        "name": torch.cuda.get_device_name(index),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(index)),
        "vram_bytes": total,
        "vram_free_bytes": free,
    }
