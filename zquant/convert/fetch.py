"""Slabs of files on a server: their bytes are fetched ahead of the workers, in parallel.

The plan says which bytes will be needed in which order, so exactly those are asked for, in runs of
up to 16 MiB, eight at a time; a bounded number of bytes waits for the workers, whatever the size of
the model. A slab then carries its bytes, so workers (threads or processes) know of no network.
Slabs of local files pass unchanged.
"""

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from zquant.convert.slabs import Slab
from zquant.formats.remote_file import RemoteFile
from zquant.formats.remote_http import MAX_CONNECTIONS
from zquant.formats.source import TensorInfo

__all__ = ["fetched"]

RUN_BYTES = 2**24  # of one request: long enough that waiting for its answer does not count
AHEAD_BYTES = MAX_CONNECTIONS * RUN_BYTES
AHEAD_RUNS = 8 * MAX_CONNECTIONS  # small tensors, each a request of its own


@dataclass(slots=True)
class _Held:
    """A `ByteReader` of some bytes that are in memory; they begin at byte `first` of the file."""

    name: str
    size: int
    stamp: list[str | int]
    first: int
    data: npt.NDArray[np.uint8]

    def read(self, offset: int, size: int) -> npt.NDArray[np.uint8]:
        assert self.first <= offset <= offset + size <= self.first + len(self.data)
        return self.data[offset - self.first :][:size]

    def read_into(self, offset: int, out: npt.NDArray[np.uint8]) -> None:
        out[:] = self.read(offset, len(out))

    def forget(self) -> None:
        """Nothing: the bytes go with their slab."""

    def close(self) -> None:
        """Nothing to give back."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Slabs whose bytes lie one after another in a file."""

    reader: RemoteFile
    slabs: list[Slab]
    first: int
    n_bytes: int


def fetched(slabs: Iterable[Slab]) -> Generator[Slab, None, None]:
    """`slabs` in their order, those of remote files with their bytes.

    Raises:
        FormatError: a file has changed.
        ZQuantError: a server refuses, or does not answer for minutes.
    """
    fetcher = _Fetcher()
    pending: deque[tuple[_Run, Future[npt.NDArray[np.uint8]]]] = deque()
    n_bytes = 0
    try:
        for run in _runs(slabs):
            if isinstance(run, Slab):
                yield run
                continue
            pending.append((run, fetcher.submit(run)))
            n_bytes += run.n_bytes
            while n_bytes > AHEAD_BYTES or len(pending) > AHEAD_RUNS:
                done, future = pending.popleft()
                n_bytes -= done.n_bytes
                yield from _filled(done, future.result())
        while pending:
            done, future = pending.popleft()
            yield from _filled(done, future.result())
    finally:
        fetcher.close()


def _runs(slabs: Iterable[Slab]) -> Iterator[_Run | Slab]:
    """Neighbours as runs; a slab of a local file alone, which ends a run."""
    run: _Run | None = None
    for slab in slabs:
        reader = slab.part.info.reader
        first, n_bytes = _span(slab)
        if run and (
            reader is not run.reader
            or first != run.first + run.n_bytes
            or run.n_bytes + n_bytes > RUN_BYTES
        ):
            yield run
            run = None
        if not isinstance(reader, RemoteFile):
            yield slab
        elif run:
            run = _Run(reader, [*run.slabs, slab], run.first, run.n_bytes + n_bytes)
        else:
            run = _Run(reader, [slab], first, n_bytes)
    if run:
        yield run


def _span(slab: Slab) -> tuple[int, int]:
    """Where the slab's bytes begin in its file, and how many they are."""
    row_bytes = slab.part.qtype.row_bytes(slab.part.shape[-1])
    first, last = slab.rows
    return slab.part.offset + first * row_bytes, (last - first) * row_bytes


def _filled(run: _Run, data: npt.NDArray[np.uint8]) -> Iterator[Slab]:
    """The slabs of a run with their bytes."""
    scale: TensorInfo | None = None
    for slab in run.slabs:
        info = slab.part.info
        first, n_bytes = _span(slab)
        if info.scale and (scale is None or scale.name != info.scale.name):
            held = info.scale.reader.read(info.scale.offset, info.scale.nbytes)
            scale = _held(info.scale, info.scale.offset, held)
        at = first - run.first
        info = replace(_held(info, first, data[at : at + n_bytes]), scale=info.scale and scale)
        yield replace(slab, part=replace(slab.part, info=info))


def _held(info: TensorInfo, first: int, data: npt.NDArray[np.uint8]) -> TensorInfo:
    far = info.reader
    return replace(info, reader=_Held(far.name, far.size, far.stamp, first, data))


class _Fetcher:
    """Threads that end by themselves: a pool's would keep Ctrl-C waiting for a dead network."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[_Run, Future[npt.NDArray[np.uint8]]] | None] = SimpleQueue()
        self._stop = threading.Event()
        self._n_threads = 0

    def submit(self, run: _Run) -> Future[npt.NDArray[np.uint8]]:
        """The bytes of `run`, later."""
        if self._n_threads < MAX_CONNECTIONS:
            self._n_threads += 1
            threading.Thread(target=self._work, daemon=True).start()
        future: Future[npt.NDArray[np.uint8]] = Future()
        self._queue.put((run, future))
        return future

    def close(self) -> None:
        """Nobody wants any more bytes."""
        self._stop.set()
        for _ in range(self._n_threads):
            self._queue.put(None)

    def _work(self) -> None:
        while (job := self._queue.get()) and not self._stop.is_set():
            run, future = job
            try:
                data = np.empty(run.n_bytes, np.uint8)
                run.reader.read_into(run.first, data, self._stop)
                future.set_result(data)
            except BaseException as error:  # goes to who waits for the bytes
                future.set_exception(error)
