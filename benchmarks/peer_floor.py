"""The least time of a step: its float products at the best rate that torch reaches on a device."""

import math
import time
from typing import Any

import torch

from zquant.models.config import DiTConfig

__all__ = ["ceiling", "lowered"]

CAPTION_TOKENS = 32


def ceiling(dit: DiTConfig, size: int, device: str) -> dict[str, Any]:
    """Products of a step, the rates of torch at the widest of them, and the floor."""
    image = math.ceil((size // 16) ** 2 / 32) * 32
    both = image + CAPTION_TOKENS
    block = 4 * dit.dim**2 + 3 * dit.dim * dit.hidden_dim
    flop = sum(
        n * (2 * block * tokens + 4 * dit.dim * tokens**2)
        for n, tokens in ((dit.n_layers, both), (dit.n_refiner_layers, image))
    )
    rates = {}
    for name in ("float32", "bfloat16", *(() if device == "cpu" else ("float16",))):
        shapes = ((both, dit.dim), (dit.hidden_dim, dit.dim))
        x, weight = (torch.randn(s, device=device).to(getattr(torch, name)) for s in shapes)
        rates[name] = 2 * weight.numel() * both / _product_s(x, weight) / 1e9
    return {
        "size": size,
        "tflop": flop / 1e12,
        "gflop_s": {name: round(rate, 1) for name, rate in rates.items()},
        "floor_s": flop / max(rates.values()) / 1e9,
    }


def _product_s(x: torch.Tensor, weight: torch.Tensor) -> float:
    """Seconds of the fastest product within one: a floor must not be raised by noise."""
    times: list[float] = []
    end = time.perf_counter() + 1
    while len(times) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        x @ weight.t()
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def lowered(floor: dict[str, Any], dit: DiTConfig, device: str) -> dict[str, Any]:
    """The floor with the rates of now where they are better: other programs slow both down."""
    now = ceiling(dit, floor["size"], device)
    rates = {name: max(rate, now["gflop_s"][name]) for name, rate in floor["gflop_s"].items()}
    return {**floor, "gflop_s": rates, "floor_s": min(floor["floor_s"], now["floor_s"])}
