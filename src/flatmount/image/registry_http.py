"""HTTP as registries need it, over urllib3: redirects that carry no credentials away, proxies, authorities, patience.

urllib3, because it reads a body in pieces without decoding it, can be shut down from another thread, is safe to share
between threads, and needs nothing else. Its own retries and redirects are off: a retry here must be able to stop
when somebody interrupts, and a redirect must not leave TLS.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import ssl
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlencode, urljoin, urlsplit

import urllib3
from urllib3 import exceptions

from flatmount import VERSION
from flatmount.config import MOST_PARALLEL_LAYERS, Config
from flatmount.errors import RegistryError, UsageError

_REDIRECTS: Final = 5
_REDIRECT: Final = frozenset({301, 302, 303, 307, 308})
_TRANSIENT: Final = frozenset({408, 429, 500, 502, 503, 504})
_PIECE: Final = 1 << 18
_SHOWN: Final = 200


@dataclass(frozen=True, slots=True)
class Patience:
    """How often and how long; seconds. `idle_s` is how long a connection may say nothing."""

    retries: int = 5
    unreachable_retries: int = 2
    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0
    connect_s: float = 10.0
    idle_s: float = 60.0

    def pause_s(self, attempt: int, asked_s: float = 0.0) -> float:
        """The pause after failure number `attempt`, from 0, when the registry asked for `asked_s`."""
        grown = self.first_pause_s * float(2**attempt) * random.uniform(0.75, 1.25)
        return min(max(grown, asked_s), self.longest_pause_s)


class Interrupted(RegistryError):
    """The pull was given up from this side."""


class Unanswered(RegistryError):
    """No answer. `passing`: the same may work in a moment; `unreachable`: there is not even a connection."""

    passing = False
    unreachable = False


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port: whom credentials are for."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Origin:
        """The origin of `url`. Raises: RegistryError for one that is not HTTP."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise RegistryError(f"{clean(url)} is not an address", hint="the registry is broken") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise RegistryError(f"{clean(url)} is not an HTTP address", hint="the registry is broken")
        return cls(parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80))


@dataclass(frozen=True, slots=True)
class Response:
    """An answer whose body is still to be read, and the URL it came from in the end."""

    raw: urllib3.BaseHTTPResponse
    url: str

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.raw.status

    def header(self, name: str) -> str | None:
        """One header, or None."""
        return self.raw.headers.get(name)


class Transport:
    """Connections to all hosts of one pull; any thread may use it. `cancel` wakes and ends all of them."""

    def __init__(self, config: Config, patience: Patience) -> None:
        self.patience = patience
        self._config = config
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._pools: dict[tuple[str | None, str | None], urllib3.PoolManager] = {}
        self._running: set[urllib3.BaseHTTPResponse] = set()

    @contextlib.contextmanager
    def open(
        self, url: str, headers: Mapping[str, str], *, form: Mapping[str, str] | None = None, once: bool = False
    ) -> Iterator[Response]:
        """One answer, whatever its status, with its body not yet read; a GET, or a POST of `form`.

        Tried again, with growing pauses, when the host is too busy or the connection fails, unless `once`.
        `Authorization` goes to the origin of `url` only.

        Raises: Unanswered, Interrupted.
        """
        attempt = 0
        while True:
            try:
                response = self._follow(url, headers, form)
            except Unanswered as error:
                most = self.patience.unreachable_retries if error.unreachable else self.patience.retries
                if once or not error.passing or attempt >= most:
                    raise
                asked_s = 0.0
            else:
                if once or response.status not in _TRANSIENT or attempt >= self.patience.retries:
                    break
                asked_s = _seconds(response.header("Retry-After"))
                response.raw.close()
            self.pause(attempt, asked_s)
            attempt += 1
        with self._lock:
            self._running.add(response.raw)
        try:
            self._go_on()
            yield response
        finally:
            with self._lock:
                self._running.discard(response.raw)
            # What was read to its end has given its connection back already; anything else is not worth reading.
            response.raw.close()

    def pieces(self, response: Response) -> Iterator[bytes]:
        """The body as it comes. Raises: Unanswered when it ends early, Interrupted."""
        while True:
            try:
                piece = response.raw.read1(_PIECE)
            except (exceptions.HTTPError, OSError) as error:
                self._go_on()
                raise _broken_off(error, response.url) from error
            self._go_on()
            if not piece:
                return
            yield piece

    def body(self, response: Response, most_bytes: int) -> bytes | None:
        """A small body as a whole; None when it is longer than `most_bytes`."""
        data = b""
        for piece in self.pieces(response):
            data += piece
            if len(data) > most_bytes:
                return None
        return data

    def pause(self, attempt: int, asked_s: float = 0.0) -> None:
        """Wait before the next attempt. Raises: Interrupted."""
        self._stop.wait(self.patience.pause_s(attempt, asked_s))
        self._go_on()

    def cancel(self) -> None:
        """End every transfer; whoever waits for one gets Interrupted."""
        self._stop.set()
        with self._lock:
            for response in self._running:
                with contextlib.suppress(ValueError, RuntimeError, OSError):
                    response.shutdown()

    def close(self) -> None:
        """Cancel, and close the connections that are kept."""
        self.cancel()
        with self._lock:
            for manager in self._pools.values():
                # `clear` alone leaves open connections to the garbage collector.
                for pool in [manager.pools.get(key) for key in manager.pools.keys()]:  # noqa: SIM118 - no iterator
                    if pool is not None:
                        pool.close()
                manager.clear()

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise Interrupted("interrupted")

    def _follow(self, url: str, headers: Mapping[str, str], form: Mapping[str, str] | None) -> Response:
        first = Origin.of(url)
        sent = dict(headers)
        for _ in range(_REDIRECTS + 1):
            self._go_on()
            response = self._send(url, sent, form)
            target = response.headers.get("Location")
            if response.status not in _REDIRECT or target is None:
                return Response(response, url)
            # Read, so that the connection can be used again; a body that is long is not worth that.
            response.close() if _length(response) > _PIECE else response.drain_conn()
            if form is not None:
                raise RegistryError(f"{first.host} redirects where it should give a token", hint="it is set up wrongly")
            url, there = _absolute(url, target)
            if there.scheme == "http" and first.scheme == "https" and not self._plain(there):
                raise RegistryError(f"{first.host} redirects to {clean(url)}, without TLS", hint="it is set up wrongly")
            if there != first:
                sent.pop("Authorization", None)
        raise RegistryError(f"{first.host} redirects more than {_REDIRECTS} times", hint="it is set up wrongly")

    def _plain(self, origin: Origin) -> bool:
        named = {origin.host, f"{origin.host}:{origin.port}"}
        return any(self._config.registry(host).plain_http for host in named)

    def _send(self, url: str, headers: Mapping[str, str], form: Mapping[str, str] | None) -> urllib3.BaseHTTPResponse:
        sent = {"User-Agent": f"flatmount/{VERSION}", **headers}
        if form is not None:
            sent["Content-Type"] = "application/x-www-form-urlencoded"
        try:
            return self._pool(url).request(
                "GET" if form is None else "POST",
                url,
                headers=sent,
                body=None if form is None else urlencode(form),
                preload_content=False,
                decode_content=False,
                redirect=False,
                retries=False,
            )
        except (exceptions.HTTPError, OSError, ValueError) as error:
            self._go_on()
            raise _explain(error, url) from error

    def _pool(self, url: str) -> urllib3.PoolManager:
        parts = urlsplit(url)
        proxy = None if urllib.request.proxy_bypass(parts.netloc) else _proxies().get(parts.scheme)
        ca_file = self._config.registry(parts.netloc).ca_file if parts.scheme == "https" else None
        with self._lock:
            pool = self._pools.get((proxy, ca_file))
            if pool is None:
                pool = self._pools[proxy, ca_file] = self._make(proxy, ca_file)
            return pool

    def _make(self, proxy: str | None, ca_file: str | None) -> urllib3.PoolManager:
        context = ssl.create_default_context()
        if ca_file is not None:
            try:
                context.load_verify_locations(ca_file)
            except OSError as error:  # SSLError is one
                raise UsageError(f"ca_file {ca_file}: {error}", hint="it holds certificates in PEM form") from error
        timeout = urllib3.Timeout(connect=self.patience.connect_s, read=self.patience.idle_s)
        if proxy is None:
            return urllib3.PoolManager(maxsize=MOST_PARALLEL_LAYERS, timeout=timeout, ssl_context=context)
        user = urllib3.util.parse_url(proxy).auth
        return urllib3.ProxyManager(
            proxy,
            maxsize=MOST_PARALLEL_LAYERS,
            timeout=timeout,
            ssl_context=context,
            proxy_headers=urllib3.make_headers(proxy_basic_auth=user) if user else None,
        )


def _absolute(base: str, target: str) -> tuple[str, Origin]:
    try:
        url = urljoin(base, target)
    except ValueError as error:
        raise RegistryError(f"{clean(target)} is not an address", hint="the registry is broken") from error
    return url, Origin.of(url)


def clean(text: str) -> str:
    """What a registry said, fit for one line on a terminal."""
    return re.sub(r"[^\x20-\x7e]+", " ", text)[:_SHOWN]


def _proxies() -> dict[str, str]:
    found: dict[str, str] = urllib.request.getproxies()
    return {scheme: url if "://" in url else f"http://{url}" for scheme, url in found.items()}


def _length(response: urllib3.BaseHTTPResponse) -> int:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() else _PIECE + 1


def _seconds(text: str | None) -> float:
    """Retry-After in seconds; a date is not worth its clock."""
    return float(text) if text is not None and re.fullmatch(r"[0-9]{1,6}", text) else 0.0


def _explain(error: Exception, url: str) -> Unanswered:
    """The library's word as ours: what host, what is wrong, what to do."""
    host, reasons = urlsplit(url).netloc, _reasons(error)
    own = _broken_off(error, url)
    lookup = next((reason for reason in reasons if isinstance(reason, socket.gaierror)), None)
    if isinstance(error, exceptions.ProxyError):
        own = Unanswered(f"the proxy for {host}: {clean(str(reasons[-1]))}", hint="look at HTTPS_PROXY and NO_PROXY")
    elif lookup is not None:
        own = Unanswered(
            f"there is no host {host}: {lookup.strerror}", hint="correct the name, or look at the resolver"
        )
        own.passing = lookup.errno == socket.EAI_AGAIN
        own.unreachable = True
    elif any(isinstance(reason, (ssl.SSLError, exceptions.SSLError)) for reason in reasons):
        said = clean(str(reasons[-1]))
        table = f'the configuration\'s [registries."{host}"]'
        own = Unanswered(f"no TLS with {host}: {said}", hint="try again")
        own.passing = True
        if isinstance(reasons[-1], ssl.SSLCertVerificationError):
            own = Unanswered(f"no TLS with {host}: {said}", hint=f"name its authority as ca_file in {table}")
        elif "WRONG_VERSION_NUMBER" in said or "RECORD_LAYER" in said:
            hint = f"if you trust the network, say --plain-http, or plain_http = true in {table}"
            own = Unanswered(f"{host} does not speak TLS: {said}", hint=hint)
    elif isinstance(error, exceptions.ConnectTimeoutError | exceptions.NewConnectionError):
        own = Unanswered(f"{host} cannot be reached: {_kernel_word(reasons)}", hint="is it up, and the port right?")
        own.passing = own.unreachable = True
    elif isinstance(error, exceptions.LocationValueError | exceptions.InvalidHeader | UnicodeError):
        own = Unanswered(f"{clean(url)}: {clean(str(error))}", hint="correct the name")
    return own


def _broken_off(error: Exception, url: str) -> Unanswered:
    own = Unanswered(f"{urlsplit(url).netloc}: {clean(str(error) or type(error).__name__)}", hint="try again")
    own.passing = True
    return own


def _reasons(error: Exception) -> list[BaseException]:
    """The library wraps the system's errors, and what a person can act on is the innermost."""
    cause: BaseException | None = error
    reasons: list[BaseException] = []
    while cause is not None and len(reasons) < 10:
        reasons.append(cause)
        cause = getattr(cause, "original_error", None) or cause.__cause__ or cause.__context__
    return reasons


def _kernel_word(reasons: list[BaseException]) -> str:
    found = next((reason for reason in reasons if isinstance(reason, OSError) and reason.strerror), None)
    return "it does not answer" if found is None else str(found.strerror)
