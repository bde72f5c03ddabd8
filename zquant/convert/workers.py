"""Who quantizes: threads of this process, or processes of their own.

A search for scales that is not compiled is hundreds of short array operations, between which
threads wait for the interpreter lock: two threads quantize Q4_K at hardly more than the rate of
one, two processes at twice. A process takes about two seconds to start and its results have to be
copied, so small conversions stay with threads, and so do types without a search (Q8_0), compiled
searches, and all that a GPU quantizes. Bytes are the same either way.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

import torch

from zquant.errors import ZQuantError

__all__ = ["cores", "run_in_order", "workers"]

T = TypeVar("T")
R = TypeVar("R")

WORTH_PROCESSES = 2**28  # weights
MAX_PROCESSES = 61 if sys.platform == "win32" else 2**10  # Windows waits for no more at a time


@contextmanager
def workers(count: int, n_locked: int) -> Iterator[Executor]:
    """A pool of `count` workers, each with one torch thread.

    Args:
        count: how many; of processes there are at most 61 on Windows.
        n_locked: weights that threads would quantize one after the other.

    Raises:
        ZQuantError: a worker process was killed.
    """
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the pool is the parallelism
    try:
        with _pool(count, n_locked) as pool:
            yield pool
    except BrokenProcessPool as error:
        raise ZQuantError(
            "a worker process ended unexpectedly, most likely for want of memory. "
            "Run again with --resume and fewer --threads."
        ) from error
    finally:
        torch.set_num_threads(torch_threads)


def run_in_order(
    pool: Executor, work: Callable[[T], R], items: Iterable[T], window: int
) -> Generator[tuple[T, R], None, None]:
    """Every item with what `work` gives for it, in order, at most `window` under way.

    Raises:
        Exception: what `work` raised for an item, when its turn comes.
    """
    pending: deque[tuple[T, Future[R]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(work, item)))
            if len(pending) >= window:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        for _, future in pending:
            future.cancel()


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _pool(count: int, n_locked: int) -> Executor:
    if count == 1 or n_locked < WORTH_PROCESSES:
        return ThreadPoolExecutor(count)
    context = multiprocessing.get_context("spawn")
    count = min(count, MAX_PROCESSES)
    return ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when it does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
