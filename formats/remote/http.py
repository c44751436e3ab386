"""HTTP/1.1 for byte ranges: pooled connections, redirects, proxies, and reads into the caller's memory.

Built on the standard library's client. Messages contain no URL, which may hold secrets.
"""

from __future__ import annotations

import base64
import socket
import ssl
import threading
import urllib.request
from collections import defaultdict
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, RemoteDisconnected
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from formats.errors import UserError
from formats.remote.retry import RetryableError, fill, words

type Headers = Mapping[str, str]
type Body = bytes | memoryview | None

_MAX_REDIRECTS = 5
_WORTH_DRAINING = 64 << 10  # reading that much is cheaper than a new connection
PASSING = {408, 425, 429, 500, 502, 503, 504}


class Response:
    """A response whose body has not been read yet. `url` is the final one, after redirects."""

    def __init__(self, response: HTTPResponse, url: str) -> None:
        self._response = response
        self.url = url
        self.status = response.status
        self.headers = response.headers

    @property
    def redirect(self) -> str | None:
        """The target of a redirect, else None."""
        target = self.headers["Location"] if self.status in (301, 302, 303, 307, 308) else None
        return urljoin(self.url, target) if target else None

    def header(self, name: str) -> str:
        return self.headers.get(name, "")

    def read_into(self, out: memoryview) -> None:
        """Read the body into `out`; RetryableError gives the number of bytes received."""
        fill(out, self._response.readinto, (OSError, HTTPException))

    def body(self, limit: int = 64 << 20) -> bytes:
        """Read a small body completely."""
        try:
            data = self._response.read(limit)
        except (OSError, HTTPException) as error:
            raise RetryableError(words(error)) from None
        length = self.header("Content-Length")
        if length.isdigit() and len(data) < min(int(length), limit):
            raise RetryableError(f"the connection ended after {len(data)} of {length} bytes")
        return data

    def check_passing(self) -> None:
        """Raise RetryableError for status codes that may be temporary."""
        if self.status in PASSING:
            raise RetryableError(f"the server answered HTTP {self.status}", wait=seconds(self.header("Retry-After")))

    def drained(self) -> bool:
        """Read a short rest of the body; return whether the connection can be reused."""
        if self._response.will_close:
            return False
        left = self._response.length
        try:
            if left is not None and left < _WORTH_DRAINING:
                self._response.read()
        except (OSError, HTTPException):
            return False
        return self._response.isclosed()


class Client:
    """A pool of connections to any number of servers, shared by threads; each request uses one exclusively."""

    def __init__(self, *, silence: float) -> None:
        self._silence = silence
        self._idle: dict[tuple[str, str], list[HTTPConnection]] = defaultdict(list)
        self._lock = threading.Lock()
        self._proxies = urllib.request.getproxies()
        self._tls: ssl.SSLContext | None = None

    @contextmanager
    def request(
        self,
        method: str,
        url: str,
        headers: Headers,
        *,
        credentials: Headers | None = None,
        body: Body = None,
        stay: bool = False,
    ) -> Generator[Response]:
        """Send one request and follow redirects. `credentials` are headers for the first server only.

        With `stay`, a redirect to another server is returned. Raises RetryableError for dropped connections and temporary status
        codes, UserError where a retry cannot help.
        """
        first = urlsplit(url)
        for _ in range(_MAX_REDIRECTS):
            is_first = urlsplit(url)[:2] == first[:2]
            with self._exchange(method, url, {**headers, **((credentials or {}) if is_first else {})}, body) as response:
                target = response.redirect
                if not target or (stay and urlsplit(target)[:2] != first[:2]):
                    response.check_passing()
                    yield response
                    return
            url = target
        raise UserError("the server redirects in circles", hint="check the URL")

    def close(self) -> None:
        """Close idle connections; a later request opens new ones."""
        with self._lock:
            for connection in [connection for idle in self._idle.values() for connection in idle]:
                connection.close()
            self._idle.clear()

    @contextmanager
    def _exchange(self, method: str, url: str, headers: Headers, body: Body) -> Generator[Response]:
        parts = split_url(url)
        connection, raw = self._send(method, parts, headers, body)
        response, fit = Response(raw, url), False
        try:
            yield response
            fit = response.drained()
        finally:
            if fit:
                with self._lock:
                    self._idle[parts.scheme, parts.netloc].append(connection)
            else:
                raw.close()
                connection.close()

    def _send(self, method: str, parts: SplitResult, headers: Headers, body: Body) -> tuple[HTTPConnection, HTTPResponse]:
        """Send a request on an idle connection, or on a new one if there is none or the server had closed it."""
        while True:
            with self._lock:
                idle = self._idle[parts.scheme, parts.netloc]
                used = idle.pop() if idle else None
            connection = used or self._connect(parts)
            try:
                connection.request(method, self._target(parts), body, {**headers, **self._proxy_headers(parts)})
                return connection, connection.getresponse()
            except (OSError, HTTPException) as error:
                connection.close()
                if not (used and isinstance(error, (ConnectionError, RemoteDisconnected))):
                    raise _final(error, parts.hostname or "") or RetryableError(words(error)) from None

    def _connect(self, parts: SplitResult) -> HTTPConnection:
        proxy = self._proxy(parts)
        host, port = parts.hostname or "", parts.port
        if proxy and parts.scheme == "https":
            tunnel = HTTPSConnection(proxy.hostname or "", proxy.port, timeout=self._silence, context=self._context())
            tunnel.set_tunnel(host, port or 443, headers=_proxy_authorization(proxy))
            return tunnel
        if parts.scheme == "https":
            return HTTPSConnection(host, port, timeout=self._silence, context=self._context())
        return HTTPConnection(*((proxy.hostname or "", proxy.port) if proxy else (host, port)), timeout=self._silence)

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls

    def _proxy(self, parts: SplitResult) -> SplitResult | None:
        proxy = self._proxies.get(parts.scheme, "")
        if not proxy or urllib.request.proxy_bypass(parts.hostname or ""):
            return None
        return urlsplit(proxy if "://" in proxy else f"http://{proxy}")

    def _target(self, parts: SplitResult) -> str:
        """Return the request target: the path, or for a proxy of plain HTTP the full URL without its user."""
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return f"http://{_host(parts)}{path}" if parts.scheme == "http" and self._proxy(parts) else path

    def _proxy_headers(self, parts: SplitResult) -> dict[str, str]:
        proxy = self._proxy(parts) if parts.scheme == "http" else None
        host = {"Host": _host(parts)}
        return host | _proxy_authorization(proxy) if proxy else host


def split_url(url: str) -> SplitResult:
    """Split an http(s) URL. Raises UserError, without the URL, if it is invalid."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port)
    except ValueError:
        usable = False
    if not usable:
        raise UserError("that is not a URL of a web server", hint="it should look like `https://host/path`")
    return parts  # pyright: ignore[reportPossiblyUnboundVariable] - unusable if unbound


def basic(user: str, password: str) -> str:
    """Return the value of an Authorization header."""
    return "Basic " + base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()


def _host(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2]


def _proxy_authorization(proxy: SplitResult) -> dict[str, str]:
    return {"Proxy-Authorization": basic(proxy.username, proxy.password or "")} if proxy.username else {}


def _final(error: Exception, host: str) -> UserError | None:
    """Return the error for a failure that a retry cannot help, else None."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return UserError(f"certificate verification failed for `{host}`: {_unverified(error)}", hint="see SSL_CERT_FILE")
    if isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME:
        return UserError(f"there is no server `{host}`", hint="check the URL and the network")
    return None


_CERTIFICATE_FAULTS = {
    10: "it has expired",
    18: "it is signed by itself",
    19: "an authority above it is signed by itself, and not known here",
    20: "the authority that signed it is not known here",
    62: "it is for another host",
}
"""Meanings of OpenSSL's `X509_V_ERR_*` numbers."""


def _unverified(error: ssl.SSLCertVerificationError) -> str:
    return _CERTIFICATE_FAULTS.get(error.verify_code, f"OpenSSL's error {error.verify_code}")


def seconds(retry_after: str) -> float | None:
    """Return the seconds of a Retry-After header, which holds seconds or a date; None if it is invalid."""
    if retry_after.isdigit():
        return float(retry_after)
    try:
        then = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (then - then.now(then.tzinfo)).total_seconds())
