"""Decoders of K types as compiled loops, for where numba is installed: same bits, one pass.

Torch needs five to twelve passes, most of them in runs of 32 numbers. The layouts are described in
`q4_k.py`, `q5_k.py`, `q6_k.py` and `kscales.py`.

Two levels of a byte are made in one loop: with a loop for each, the compiler finds no vectors.
"""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

__all__ = ["UNITS", "decode"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Loop = Callable[[Bytes, Floats, Floats], None]

F = np.float32
UNITS = {"Q4_K": slice(0, 4), "Q5_K": slice(0, 4), "Q6_K": slice(208, 210)}  # where halves are
MIN_QBLOCKS = 512  # of a thread: a tenth of a millisecond of work is worth waking it

compiled = njit(nogil=True, cache=True, error_model="numpy")


def decode(qtype: str, qblocks: torch.Tensor, out: torch.Tensor) -> None:
    """Decode qblocks on the CPU, on as many threads as torch uses.

    Args:
        qtype: one of `UNITS`.
        qblocks: uint8 `[n, qblock_bytes]`, contiguous.
        out: float32 `[n, 256]`, contiguous, written.
    """
    loop = _LOOPS[qtype]
    units = qblocks[:, UNITS[qtype]].contiguous().view(torch.float16).float()
    arrays = (qblocks.numpy(), units.numpy(), out.numpy())
    n = len(qblocks)
    n_threads = max(1, min(torch.get_num_threads(), n // MIN_QBLOCKS))
    bounds = [n * i // n_threads for i in range(n_threads + 1)]
    parts = [[a[i:j] for a in arrays] for i, j in itertools.pairwise(bounds)]
    others = [_threads().submit(loop, *part) for part in parts[1:]]
    loop(*parts[0])
    for other in others:
        other.result()


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="decode")


@compiled
def _q4_k(qblocks: Bytes, units: Floats, out: Floats) -> None:
    """Decode `[n, 144]` into `out [n, 256]`; `units [n, 2]` are d and dmin."""
    scale, minimum = np.empty((2, 8), F)
    for i in range(len(qblocks)):
        _read_scales(qblocks[i], units[i], scale, minimum)
        for j in range(4):
            scale_a, scale_b = scale[2 * j], scale[2 * j + 1]
            minimum_a, minimum_b = minimum[2 * j], minimum[2 * j + 1]
            for k in range(32):
                q = qblocks[i, 16 + 32 * j + k]
                out[i, 64 * j + k] = scale_a * F(q & 15) - minimum_a
                out[i, 64 * j + 32 + k] = scale_b * F(q >> 4) - minimum_b


@compiled
def _q5_k(qblocks: Bytes, units: Floats, out: Floats) -> None:
    """Decode `[n, 176]` into `out [n, 256]`; `units [n, 2]` are d and dmin."""
    scale, minimum = np.empty((2, 8), F)
    for i in range(len(qblocks)):
        _read_scales(qblocks[i], units[i], scale, minimum)
        for j in range(4):
            scale_a, scale_b = scale[2 * j], scale[2 * j + 1]
            minimum_a, minimum_b = minimum[2 * j], minimum[2 * j + 1]
            for k in range(32):
                q, high = qblocks[i, 48 + 32 * j + k], qblocks[i, 16 + k] >> (2 * j)
                out[i, 64 * j + k] = scale_a * F((q & 15) | ((high & 1) << 4)) - minimum_a
                out[i, 64 * j + 32 + k] = scale_b * F((q >> 4) | ((high & 2) << 3)) - minimum_b


@compiled
def _read_scales(qblock: Bytes, units: Floats, scale: Floats, minimum: Floats) -> None:
    """Scales and minimums of eight sub-blocks, multiplied out."""
    for s in range(4):
        a, b, c = qblock[4 + s], qblock[8 + s], qblock[12 + s]
        scale[s], minimum[s] = units[0] * F(a & 63), units[1] * F(b & 63)
        scale[s + 4] = units[0] * F((c & 15) | ((a >> 6) << 4))
        minimum[s + 4] = units[1] * F((c >> 4) | ((b >> 6) << 4))


@compiled
def _q6_k(qblocks: Bytes, units: Floats, out: Floats) -> None:
    """Decode `[n, 210]` into `out [n, 256]`; `units [n, 1]` are d."""
    for i in range(len(qblocks)):
        for part in range(4):  # 16 of the 32 bytes of a half
            half, at = part // 2, 16 * (part % 2)
            s = 192 + 8 * half + part % 2
            a = units[i, 0] * F(np.int8(qblocks[i, s]))
            b = units[i, 0] * F(np.int8(qblocks[i, s + 2]))
            c = units[i, 0] * F(np.int8(qblocks[i, s + 4]))
            d = units[i, 0] * F(np.int8(qblocks[i, s + 6]))
            for k in range(16):
                first = qblocks[i, 64 * half + at + k]
                second = qblocks[i, 64 * half + 32 + at + k]
                high = qblocks[i, 128 + 32 * half + at + k]
                w = 128 * half + at + k
                out[i, w] = a * F(np.int64((first & 15) | ((high & 3) << 4)) - 32)
                out[i, w + 32] = b * F(np.int64((second & 15) | ((high & 12) << 2)) - 32)
                out[i, w + 64] = c * F(np.int64((first >> 4) | (high & 48)) - 32)
                out[i, w + 96] = d * F(np.int64((second >> 4) | ((high & 192) >> 2)) - 32)


_LOOPS: dict[str, Loop] = {"Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}
