"""A file on a server as a `ByteReader`: ranges, tried again until they are here.

What is read at the beginning is kept, so that a header costs one or two requests. A connection
that breaks is resumed at the byte it reached, after 0.5, 1, 2, ... 30 s (halved at random, so that
many do not come back at once) or when the server says; without news for five minutes it is given
up. The file must not change meanwhile: size and ETag are compared with every answer.

What is checked of the content: all of a small file, where the listing has its hash. Ranges of
weights come out of order and in part, so for them there is no hash to compare with: their revision
is pinned, their size and header are checked, and TLS carries them.
"""

import hashlib
import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from zquant.errors import FormatError, ZQuantError
from zquant.formats.remote_http import Answer, Entry, Refused, Transient, request
from zquant.units import format_bytes, format_seconds

__all__ = ["RemoteFile"]

HEAD_BYTES = 2**18  # of the first request; most headers are shorter
SMALL_BYTES = 2**26  # the most that is read whole: a tokenizer has 11 MB
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
OPEN_PATIENCE_S = 30.0  # the address may be wrong
READ_PATIENCE_S = 300.0  # the address was right

_EMPTY = 416  # the answer to the first bytes of a file that has none


class RemoteFile:
    """A file on a server; opening it reads its first bytes.

    Raises:
        Refused: there is no such file, or it is not for us.
        FormatError: the file is empty, or not the one that was listed.
        ZQuantError: the server does not answer, or not as it should.
    """

    def __init__(self, entry: Entry) -> None:
        self.name = entry.name
        self._entry = entry
        self._head = np.empty(0, np.uint8)
        self._url: str | None = None  # where redirects ended, for as long as that works
        self._lock = threading.Lock()
        self._tag = ""
        self.size, self._has_ranges = self._open()
        # the content's hash where there is one: a resumed run may go on from another revision
        self.stamp: list[str | int] = [self.name, self.size, entry.digest or self._tag]

    def __reduce__(self) -> tuple[Callable[[Entry], "RemoteFile"], tuple[Entry]]:
        """Another process opens it anew, once."""
        return _reopened, (self._entry,)

    def read(self, offset: int, size: int) -> npt.NDArray[np.uint8]:
        """`size` bytes from `offset`; kept if they are near the beginning."""
        end = offset + size
        assert 0 <= offset <= end <= self.size
        with self._lock:
            n_kept = len(self._head)
            if end > n_kept and offset <= n_kept:
                more = np.empty(min(self.size, max(end, 2 * n_kept)) - n_kept, np.uint8)
                self.read_into(n_kept, more)
                self._head = np.concatenate([self._head, more])
            if end <= len(self._head):
                return self._head[offset:end]
        out = np.empty(size, np.uint8)
        self.read_into(offset, out)
        return out

    def read_into(
        self, offset: int, out: npt.NDArray[np.uint8], stop: threading.Event | None = None
    ) -> None:
        """Fill `out` from `offset`; once `stop` is set, give up soon."""
        done, patience = 0, _Patience(READ_PATIENCE_S, stop)
        while done < len(out):
            try:
                with ExitStack() as stack:
                    answer = self._ask(stack, offset + done, offset + len(out))
                    self._check_same(answer)
                    for chunk in answer.chunks():
                        chunk = chunk[: len(out) - done]
                        out[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
                        done += len(chunk)
                        patience.renew()
                if done < len(out):
                    raise Transient("the connection ended early")
            except Transient as error:  # noqa: PERF203 # a request costs a thousand times more
                where = f"at byte {offset + done} of {self.size}"
                patience.wait(f"{self.name}: {where}", error)

    def whole(self) -> bytes:
        """All of a small file, its hash checked where the listing has one.

        Raises:
            FormatError: the file is too large, or is not what the listing says.
        """
        if self.size > SMALL_BYTES:
            raise FormatError(
                f"{self.name}: has {format_bytes(self.size)}; expected a small text file of "
                f"{format_bytes(SMALL_BYTES)} at most. Check the address."
            )
        if self._has_ranges or len(self._head) == self.size:
            data = self.read(0, self.size).tobytes()
        else:
            data = self._in_one_go()
        self._check_digest(data)
        return data

    def forget(self) -> None:
        """Drop the beginning, which is small; later reads fetch it again."""
        with self._lock:
            self._head = np.empty(0, np.uint8)

    def close(self) -> None:
        """Nothing to give back: connections are shared by all files, and close when idle."""

    def _open(self) -> tuple[int, bool]:
        """Size, and whether there are ranges; keeps the first bytes."""
        patience = _Patience(OPEN_PATIENCE_S, None)
        while True:
            try:
                with request(self._entry, 0, HEAD_BYTES) as answer:
                    return self._opened(answer)
            except Transient as error:  # noqa: PERF203 # a request costs a thousand times more
                patience.wait(self.name, error)
            except Refused as error:
                if error.status != _EMPTY:
                    raise
                raise FormatError(
                    f"{self.name}: the file is empty. Give another, or ask its publisher."
                ) from error

    def _opened(self, answer: Answer) -> tuple[int, bool]:
        self._url = answer.url if answer.url != self._entry.url else None
        self._tag = answer.tag
        kept = bytearray()
        for chunk in answer.chunks():
            kept += chunk
            if len(kept) >= HEAD_BYTES:
                break
        if len(kept) < min(HEAD_BYTES, answer.n_bytes or 0):
            raise Transient("the connection ended early")
        self._head = np.frombuffer(bytes(kept[:HEAD_BYTES]), np.uint8)
        size = len(kept) if answer.total is None and len(kept) < HEAD_BYTES else answer.total
        if size is None:
            raise ZQuantError(
                f"{self.name}: the server does not say how large the file is. Download it and give "
                f"its path."
            )
        if size == 0:
            raise FormatError(f"{self.name}: the file is empty. Give another.")
        if self._entry.size not in (None, size):
            self._refuse_change(f"listed with {self._entry.size} bytes, it has {size}")
        return size, answer.has_ranges

    def _ask(self, stack: ExitStack, first: int, end: int) -> Answer:
        """An answer that `stack` closes, from where redirects led last time or from the start."""
        if self._url:
            try:
                return stack.enter_context(request(self._entry, first, end, self._url))
            except (Refused, Transient):  # addresses that redirects lead to expire
                self._url = None
        answer = stack.enter_context(request(self._entry, first, end))
        self._url = answer.url if answer.url != self._entry.url else None
        return answer

    def _in_one_go(self) -> bytes:
        """The whole file from a server without ranges."""
        patience = _Patience(OPEN_PATIENCE_S, None)
        while True:
            try:
                with request(self._entry, 0, None) as answer:
                    self._check_same(answer)
                    data = bytearray()
                    for chunk in answer.chunks():
                        data += chunk
                        if len(data) > self.size:
                            break
                if len(data) != self.size:
                    raise Transient(f"{len(data)} of {self.size} bytes came")
                return bytes(data)
            except Transient as error:
                patience.wait(self.name, error)

    def _check_same(self, answer: Answer) -> None:
        """The answer is about the file that was opened."""
        if answer.total not in (None, self.size):
            self._refuse_change(f"it had {self.size} bytes and has {answer.total}")
        if not self._entry.pinned and answer.tag != self._tag:
            self._refuse_change(f"its tag was {self._tag[:80]!r} and is {answer.tag[:80]!r}")

    def _check_digest(self, data: bytes) -> None:
        kind, _, expected = (self._entry.digest or "").partition(":")
        if kind == "sha256":
            found = hashlib.sha256(data).hexdigest()
        elif kind == "git":
            blob = b"blob %d\0" % len(data) + data
            found = hashlib.sha1(blob, usedforsecurity=False).hexdigest()
        else:
            return
        if found != expected:
            raise FormatError(
                f"{self.name}: has the {kind} hash {found}; its listing says {expected}. Try "
                f"again; if it stays so, the server is broken."
            )

    def _refuse_change(self, what: str) -> NoReturn:
        raise FormatError(
            f"{self.name}: the file has changed on the server: {what}. Start again; "
            f"what was converted of the old file cannot be resumed."
        )


_REOPENED: dict[str, RemoteFile] = {}


def _reopened(entry: Entry) -> RemoteFile:
    if entry.url not in _REOPENED:
        _REOPENED[entry.url] = RemoteFile(entry)
    return _REOPENED[entry.url]


class _Patience:
    """How long a lost server is waited for: `limit_s` since the last bytes."""

    def __init__(self, limit_s: float, stop: threading.Event | None) -> None:
        self._limit_s = limit_s
        self._stop = stop or threading.Event()
        self._last = time.monotonic()
        self._wait_s = FIRST_WAIT_S

    def renew(self) -> None:
        """Bytes have come.

        Raises:
            ZQuantError: nobody wants them any more.
        """
        if self._stop.is_set():
            raise ZQuantError("reading was stopped")
        self._last = time.monotonic()
        self._wait_s = FIRST_WAIT_S

    def wait(self, where: str, error: Transient) -> None:
        """Sleep before the next attempt.

        Raises:
            ZQuantError: it would be too long, or nobody waits any more.
        """
        wait_s = self._wait_s * random.uniform(0.5, 1.0)
        wait_s = max(wait_s, error.wait_s or 0.0)
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
        waited_s = time.monotonic() - self._last
        if waited_s + wait_s > self._limit_s:
            asked = f", it asks to wait {format_seconds(error.wait_s)}" if error.wait_s else ""
            raise ZQuantError(
                f"{where}: no bytes from the server for {format_seconds(waited_s)} ({error}"
                f"{asked}). Check the connection and run again with --resume, which goes on from "
                f"what is done."
            ) from error
        if self._stop.wait(wait_s):
            raise ZQuantError("reading was stopped")
