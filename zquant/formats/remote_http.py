"""One request for a range of a file over HTTP, and what its answer means.

    GET url, Range: bytes=first-(end - 1)
    206      the range, checked against Content-Range
    200      the whole file: there are no ranges here
    3xx      followed, never from https to http
    401 403  a login is needed       404 410  no such file
    408 425 429 5xx, a lost connection: try again        anything else: refused

A login goes to the host it is for and to no other, wherever a redirect leads. Proxies and
certificates are those of the environment, as `requests` reads them. Nothing is tried twice here:
`remote_file.py` does that.
"""

import functools
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

import zquant
from zquant.errors import ZQuantError

if TYPE_CHECKING:
    import requests

__all__ = ["MAX_CONNECTIONS", "Answer", "Entry", "Refused", "Transient", "request"]

MAX_CONNECTIONS = 8
CONNECT_TIMEOUT_S = 15
READ_TIMEOUT_S = 30  # without a single byte
CHUNK_BYTES = 2**17
MAX_SIZE = 2**50  # bytes of a file, as a server may claim
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}


class Refused(ZQuantError):  # noqa: N818 # reads as what happened, like Transient
    """The server does not give the file; `status` is its answer."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class Transient(Exception):  # noqa: N818 # a state of the network, not an error yet
    """The same request may succeed later; after `wait_s` if the server says so."""

    def __init__(self, text: str, wait_s: float | None = None) -> None:
        super().__init__(text)
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A file somewhere else.

    Attributes:
        name: for people, without passwords.
        url: http or https.
        login: headers for the host of `url` alone.
        size: bytes, where a listing says so; None: the server is asked.
        digest: "sha256:..." or "git:..." (sha1 of the git blob), where a listing says so.
        pinned: `url` means the same content forever, so that other servers may name it differently.
    """

    name: str
    url: str = field(repr=False)
    login: Mapping[str, str] = field(default_factory=dict, repr=False)
    size: int | None = None
    digest: str | None = None
    pinned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The beginning of an answer.

    `n_bytes` are said to follow; `total` is the size of the file; both None if the server does not
    say. `tag` changes with the content: ETag, or else the time of change, or else nothing.
    """

    url: str = field(repr=False)  # that gave it, after redirects
    has_ranges: bool
    n_bytes: int | None
    total: int | None
    tag: str
    response: "requests.Response" = field(repr=False)

    def chunks(self) -> Iterator[bytes]:
        """The body as it arrives.

        Raises:
            Transient: the connection is lost.
        """
        try:
            yield from self.response.iter_content(CHUNK_BYTES)
        except OSError as error:
            raise Transient(_reason(error)) from error


@contextmanager
def request(entry: Entry, first: int, end: int | None, url: str | None = None) -> Iterator[Answer]:
    """Ask for bytes from `first` up to, not including, `end`; None: for the whole file.

    Args:
        entry: the file.
        first: 0 if `end` is None.
        end: at most so many bytes are sent; a server without ranges sends all from 0.
        url: where an earlier request ended; None: `entry.url`.

    Raises:
        Refused: no such file, or no permission, or no ranges where `first` is not 0.
        Transient: worth trying again.
        ZQuantError: an answer against the rules.
    """
    response, final = _followed(entry, url or entry.url, first, end)
    with closing(response):
        yield _understood(entry, response, final, first, end)


def _followed(
    entry: Entry, url: str, first: int, end: int | None
) -> tuple["requests.Response", str]:
    """The first answer that is no redirect, and who gave it."""
    headers = {"Accept-Encoding": "identity", "User-Agent": f"zquant/{zquant.__version__}"}
    if end is not None:
        headers["Range"] = f"bytes={first}-{end - 1}"
    for _ in range(_MAX_REDIRECTS + 1):
        try:
            login = entry.login if _host(url) == _host(entry.url) else {}
            response = _session().get(
                url,
                headers={**headers, **login},
                stream=True,
                allow_redirects=False,
                timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S),
            )
        except ValueError as error:
            raise ZQuantError(f"{entry.name}: not an address of a file. Check the URL.") from error
        except OSError as error:  # the base of all errors of requests
            if "CERTIFICATE_VERIFY_FAILED" in repr(error):
                raise ZQuantError(
                    f"{entry.name}: the certificate of the server is not accepted. If it is your "
                    f"own, name its authority in REQUESTS_CA_BUNDLE."
                ) from error
            raise Transient(_reason(error)) from error
        if response.status_code not in _REDIRECTS:
            return response, url
        response.close()
        url = _redirected(entry, url, response.headers.get("Location", ""))
    raise ZQuantError(f"{entry.name}: redirected more than {_MAX_REDIRECTS} times. Check the URL.")


def _redirected(entry: Entry, url: str, location: str) -> str:
    target = urljoin(url, location)
    scheme = urlsplit(target).scheme
    if not location or scheme not in _PORTS:
        raise ZQuantError(f"{entry.name}: redirected to nowhere ({scheme!r}). Check the URL.")
    if url.startswith("https:") and scheme == "http":
        raise ZQuantError(
            f"{entry.name}: redirected from https to http, which anyone on the way can change. "
            f"Download the file and give its path."
        )
    return target


def _understood(
    entry: Entry, response: "requests.Response", url: str, first: int, end: int | None
) -> Answer:
    """The answer, if it is one to what was asked."""
    status, headers = response.status_code, response.headers
    _check_status(entry, status, headers)
    if headers.get("Content-Encoding", "identity") != "identity":
        raise ZQuantError(
            f"{entry.name}: comes as {headers['Content-Encoding']!r}, which was not asked for; "
            f"expected the file as it is. Download it and give its path."
        )
    n_bytes = _number(headers.get("Content-Length"))
    total = n_bytes
    if status == 206:
        begin, stop, total = _content_range(headers.get("Content-Range", ""))
        n_bytes = stop - begin
        if end is None or begin != first or not begin < stop <= end:
            raise ZQuantError(
                f"{entry.name}: asked for bytes {first} to {end}, the server sends {begin} to "
                f"{stop}. Download the file and give its path."
            )
    elif first:
        raise Refused(
            f"{entry.name}: the server sends no ranges (HTTP {status}; expected 206), so the file "
            f"cannot be read in parts. Download it and give its path.",
            status,
        )
    if total is not None and total > MAX_SIZE:
        raise ZQuantError(f"{entry.name}: the server claims {total} bytes, which cannot be.")
    tag = headers.get("ETag") or headers.get("Last-Modified") or ""
    return Answer(
        url=url,
        has_ranges=status == 206,
        n_bytes=n_bytes,
        total=total,
        tag=tag,
        response=response,
    )


def _check_status(entry: Entry, status: int, headers: Mapping[str, str]) -> None:
    """Raise unless the file, or some of it, follows."""
    if status in (200, 206):
        return
    if status in (408, 425, 429) or status >= 500:
        raise Transient(f"HTTP {status}", _retry_after(headers.get("Retry-After", "")))
    text = f"the server answers HTTP {status}; expected 200 or 206. Check the URL"
    if status in (401, 403):
        text = (
            f"not permitted (HTTP {status}). A gated or private model needs its terms accepted on "
            f"its page and a login: hf auth login. Other links may have expired: get a new one"
        )
    elif status in (404, 410):
        text = f"no such file (HTTP {status}). Check the address and the revision"
    raise Refused(f"{entry.name}: {text}.", status)


def _content_range(text: str) -> tuple[int, int, int | None]:
    """Begin, end (not included) and size of "bytes 0-99/1000"; zeros for anything else."""
    unit, _, rest = text.partition(" ")
    span, _, total = rest.partition("/")
    begin, _, last = span.partition("-")
    first, stop = _number(begin), _number(last)
    if unit.lower() != "bytes" or first is None or stop is None:
        return 0, 0, None
    return first, stop + 1, _number(total)


def _number(text: str | None) -> int | None:
    """A count of up to 20 digits; None for anything else."""
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 20 else None


def _retry_after(text: str) -> float | None:
    """Seconds to wait, from seconds or a date."""
    seconds = _number(text)
    if seconds is not None or not text:
        return seconds
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def _host(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or _PORTS.get(parts.scheme)


def _reason(error: OSError) -> str:
    """A lost connection in a few words; the texts of requests are nested and hold the URL."""
    import requests

    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if "NameResolution" in repr(error):
        return "the name of the server is not known"
    if "refused" in repr(error):
        return "the server refuses the connection"
    return "the connection was lost"


@functools.cache
def _session() -> "requests.Session":
    """Connections of this process, kept open for the next request; no cookies, no ~/.netrc."""
    from http.cookiejar import DefaultCookiePolicy

    import requests  # slow to import, needed only here

    session = requests.Session()
    session.mount("https://", adapter := requests.adapters.HTTPAdapter(pool_maxsize=16))
    session.mount("http://", adapter)
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    session.auth = lambda prepared: prepared
    return session
