"""A local HTTP server of some files that can be told to fail, and a hub API in front of them.

server.url + "/a/b"                                  a file, by ranges
server.url + "/api/models/owner/name"                its listing, as the hub gives it
server.url + "/owner/name/resolve/<commit>/a/b"      a file of it
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
LFS_BYTES = 4096  # larger files have a sha256 in the listing

Fault = Callable[["Handler"], bool]  # whether it has answered


@dataclass
class Asked:
    """A request that came."""

    path: str
    range: str | None
    authorization: str | None
    status: int = 0
    n_bytes: int = 0


@dataclass
class HttpServer:
    """What is served, and what was asked for; `faults` are tried in turn on each request of a file.

    `ranges` off: files are always sent whole. `tag` is the ETag of everything.
    """

    folder: Path
    url: str = ""
    ranges: bool = True
    tag: str = '"one"'
    token: str | None = None  # that the repository needs
    cdn: str | None = None  # where files of the repository are redirected to
    faults: list[Fault] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def weights(self) -> list[Asked]:
        """Requests that a file answered, not at its beginning."""
        return [
            a for a in self.asked if a.status == 206 and not str(a.range).startswith("bytes=0-")
        ]


class Handler(BaseHTTPRequestHandler):
    """Answers for the server that its class attribute holds."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 2**16  # head and body in one packet
    state: HttpServer
    target: str  # the file below the folder

    def do_GET(self) -> None:
        state = self.state
        path = unquote(urlsplit(self.path).path)
        self.asked = Asked(path, self.headers.get("Range"), self.headers.get("Authorization"))
        with state.lock:
            state.asked.append(self.asked)
        if path.startswith("/api/models/"):
            self.listing()
            return
        if repository := re.fullmatch(rf"/[^/]+/[^/]+/resolve/{COMMIT}/(.*)", path):
            if state.token and self.headers.get("Authorization") != f"Bearer {state.token}":
                self.answer(403)
                return
            path = f"/{repository[1]}"
            if state.cdn:
                self.answer(302, Location=f"{state.cdn}{path}?signature=secret")
                return
        self.target = path
        with state.lock:
            fault = state.faults.pop(0) if state.faults else None
        if not (fault and fault(self)):
            self.file(path)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """An answer in one piece."""
        self.asked.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def listing(self) -> None:
        """Every file with its size and hash."""
        siblings = []
        for path in sorted(p for p in self.state.folder.rglob("*") if p.is_file()):
            data = path.read_bytes()
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            file: dict[str, Any] = {"blobId": blob, "size": len(data)}
            file["rfilename"] = path.relative_to(self.state.folder).as_posix()
            if len(data) > LFS_BYTES:
                sha256 = hashlib.sha256(data).hexdigest()
                file["lfs"] = {"size": len(data), "sha256": sha256, "pointerSize": 130}
            siblings.append(file)
        document = {"id": "owner/name", "sha": COMMIT, "siblings": siblings}
        self.answer(200, json.dumps(document).encode(), Content_Type="application/json")

    def file(self, path: str, *, cut: int | None = None) -> None:
        """The range that was asked for; `cut` ends the connection after so many bytes."""
        where = self.state.folder / path.strip("/")
        if not where.is_file():
            self.answer(404, b"no")
            return
        size, status, first, last = where.stat().st_size, 200, 0, None
        headers = {"ETag": self.state.tag}
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if found and self.state.ranges:
            first, last = int(found[1]), min(int(found[2]), size - 1)
            if first > last:
                self.answer(416, Content_Range=f"bytes */{size}")
                return
            status = 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        with where.open("rb") as file:
            file.seek(first)
            body = file.read(None if last is None else last + 1 - first)
        if cut is None:
            self.asked.n_bytes = len(body)
            self.answer(status, body, **headers)
            return
        self.asked.status, self.asked.n_bytes = status, cut
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Quiet."""


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that went away is not an error of the test."""


@contextmanager
def serve(folder: Path) -> Iterator[HttpServer]:
    """A server of `folder` for as long as the `with` block lasts."""
    state = HttpServer(folder)
    handler = type("Bound", (Handler,), {"state": state})
    with _Quiet(("127.0.0.1", 0), handler) as server:
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()


def status(code: int, **headers: str) -> Fault:
    """Answers `code` instead of the file."""

    def fault(handler: Handler) -> bool:
        handler.answer(code, b"no", **headers)
        return True

    return fault


def drop(after: int) -> Fault:
    """Ends the connection after so many bytes of the body."""

    def fault(handler: Handler) -> bool:
        handler.file(handler.target, cut=after)
        return True

    return fault


def fine(_: Handler) -> bool:
    """No fault."""
    return False


def fails_but_at(first: int) -> Fault:
    """Answers 500 to all but the range that begins at byte `first`."""

    def fault(handler: Handler) -> bool:
        if str(handler.asked.range).startswith(f"bytes={first}-"):
            return False
        handler.answer(500, b"no")
        return True

    return fault
