"""The distribution API of one repository, at its registry and the registry's mirrors.

See: https://github.com/opencontainers/distribution-spec/blob/main/spec.md
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlencode

from flatmount.config import Config
from flatmount.errors import BadImage, RegistryError
from flatmount.image.model import Descriptor
from flatmount.image.registry_auth import Credential, Keychain
from flatmount.image.registry_http import Interrupted, Origin, Response, Transport, Unanswered, clean
from flatmount.image.registry_reference import Reference

_HUB_API: Final = "registry-1.docker.io"
_WORTH_A_RETRY: Final = 1 << 20  # bytes after which a broken transfer has its full number of retries again
_ERROR_BYTES: Final = 1 << 16
_TOKEN_BYTES: Final = 1 << 20
_CHALLENGE = re.compile(r'([A-Za-z]+)[ \t]+((?:[A-Za-z_]+[ \t]*=[ \t]*(?:"(?:[^"\\]|\\.)*"|[^\s,"]+)[ \t]*,?[ \t]*)+)')
_PARAMETER = re.compile(r'([A-Za-z_]+)[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")


@dataclass(frozen=True, slots=True)
class Answer:
    """A document: its bytes, the type and the digest that the registry gave it."""

    raw: bytes
    content_type: str
    digest: str | None


class Refused(RegistryError):
    """An answer that is none: its `status`, and the registry's own `code` if it gave one."""

    status = 0
    code = ""


class Endpoint:
    """One place that has the repository: where it is, and how one proves there who one is."""

    def __init__(
        self,
        host: str,
        repository: str,
        *,
        plain_http: bool,
        mirror: bool,
        transport: Transport,
        keychain: Keychain,
    ) -> None:
        self.host = host
        self.repository = repository
        scheme = "http" if plain_http else "https"
        self.base = f"{scheme}://{_HUB_API if host == 'docker.io' else host}/v2/{repository}"
        self.mirror = mirror
        self.dropped = False
        self._transport = transport
        self._keychain = keychain
        self._lock = threading.Lock()
        self._authorization: str | None = None
        self._credential: tuple[Credential | None] | None = None

    @contextlib.contextmanager
    def open(self, path: str, headers: dict[str, str]) -> Iterator[Response]:
        """A good answer to GET `path`. Raises: Refused, Unanswered."""
        url = f"{self.base}/{path}"
        authorization = self._authorization
        for first in (True, False):
            sent = headers if authorization is None else {**headers, "Authorization": authorization}
            with self._transport.open(url, sent, once=self.mirror) as response:
                if response.status in (200, 206):
                    yield response
                    return
                # A challenge from where a redirect led is not this registry's, and gets no credentials.
                own = Origin.of(response.url) == Origin.of(url)
                if response.status != 401 or not own or not first:
                    raise self._refused(response)
                challenges = response.raw.headers.getlist("WWW-Authenticate")
                refusal = self._refused(response)
            with self._lock:
                # Another thread may have answered the same challenge meanwhile.
                if self._authorization == authorization:
                    self._authorization = self._answer(challenges, authorization, refusal)
                authorization = self._authorization

    def _answer(self, challenges: list[str], used: str | None, refusal: RegistryError) -> str:
        offered = {
            scheme.lower(): {name.lower(): quoted or bare for name, quoted, bare in _PARAMETER.findall(parameters)}
            for scheme, parameters in _CHALLENGE.findall(", ".join(challenges))
        }
        credential = self._own_credential()
        if "bearer" in offered:
            return f"Bearer {self._token(offered['bearer'], credential)}"
        if "basic" in offered and credential is not None and credential.basic != used:
            return credential.basic
        raise refusal

    def _token(self, offered: dict[str, str], credential: Credential | None) -> str:
        realm = offered.get("realm", "")
        origin = Origin.of(realm)
        if origin.scheme != "https" and self.base.startswith("https:"):
            raise RegistryError(
                f"{self.host} sends for a token to {clean(realm)}, without TLS", hint="it is set up wrongly"
            )
        scope = offered.get("scope") or f"repository:{self.repository}:pull"
        asked = {"scope": scope} | ({"service": offered["service"]} if "service" in offered else {})
        headers, form, url = {}, None, realm
        if credential is not None and credential.identity_token:
            form = {
                "grant_type": "refresh_token",
                "client_id": "flatmount",
                "refresh_token": credential.secret,
                **asked,
            }
        else:
            url = f"{realm}{'&' if '?' in realm else '?'}{urlencode(asked)}"
            if credential is not None:
                headers["Authorization"] = credential.basic
        with self._transport.open(url, headers, form=form) as response:
            if response.status != 200:
                raise self._refused(response)
            raw = self._transport.body(response, _TOKEN_BYTES) or b""
        try:
            value = json.loads(raw)
            token = value.get("token") or value["access_token"]
        except (ValueError, KeyError, AttributeError, RecursionError) as error:
            raise RegistryError(f"{origin.host} gave no token for {self.host}", hint="it is set up wrongly") from error
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
            raise RegistryError(f"{origin.host} gave no token for {self.host}", hint="it is set up wrongly")
        return token

    def _own_credential(self) -> Credential | None:
        # Looked for once, because a helper may ask the person.
        if self._credential is None:
            self._credential = (self._keychain.find(self.host, self.repository),)
        return self._credential[0]

    def _refused(self, response: Response) -> Refused:
        """An answer that is none as one line, with what the registry says."""
        code, said = self._said(response)
        what = f"{self.host}/{self.repository}"
        told = f" ({said})" if said else ""
        if response.status in (401, 403):
            known = self._own_credential()
            if known is None:
                places = ", ".join(self._keychain.places)
                hint = f"it may not exist, or log in (`docker login`, `podman login`): no credentials in {places}"
            else:
                hint = f"the credentials from {known.source} are wrong, or not enough for this image"
            error = Refused(f"{what}: access denied{told}", hint=hint)
        elif response.status == 404:
            error = Refused(f"{what}: {said or 'not found'}", hint="look at the name")
        else:
            error = Refused(f"{self.host} answers {response.status} for {what}{told}", hint="try again later")
        error.status, error.code = response.status, code
        return error

    def _said(self, response: Response) -> tuple[str, str]:
        """The registry's code and message; nothing where it gives another kind of page."""
        try:
            raw = self._transport.body(response, _ERROR_BYTES)
            first = json.loads(raw or b"")["errors"][0]
            return str(first["code"])[:40], clean(str(first.get("message") or first["code"]))
        except (Unanswered, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            return "", ""


class Client:
    """Reads one repository; any thread may. Mirrors are asked first, and one that fails is not asked again."""

    def __init__(self, reference: Reference, config: Config, keychain: Keychain, transport: Transport) -> None:
        self.reference = reference
        self._transport = transport
        self._endpoints: list[Endpoint] = []
        for mirror in (*config.registry(reference.host).mirrors, reference.host):
            host, slash, prefix = mirror.partition("/")
            self._endpoints.append(
                Endpoint(
                    host,
                    f"{prefix}{slash}{reference.repository}",
                    plain_http=config.registry(host).plain_http,
                    mirror=len(self._endpoints) < len(config.registry(reference.host).mirrors),
                    transport=transport,
                    keychain=keychain,
                )
            )

    def document(self, path: str, accept: str, most_bytes: int) -> Answer:
        """GET a manifest or a small blob as a whole. Raises: RegistryError, BadImage past `most_bytes`."""
        for endpoint in self._asked():
            with self._or_the_next(endpoint):
                return self._whole(endpoint, path, accept, most_bytes)
        raise AssertionError("the registry itself is always asked last")

    def _whole(self, endpoint: Endpoint, path: str, accept: str, most_bytes: int) -> Answer:
        with endpoint.open(path, {"Accept": accept}) as response:
            raw = self._transport.body(response, most_bytes)
            if raw is None:
                raise BadImage(f"{self.reference.name}: {path} has more than {most_bytes} bytes", hint="no image")
            content_type = (response.header("Content-Type") or "").partition(";")[0].strip().lower()
            return Answer(raw, content_type, response.header("Docker-Content-Digest"))

    def blob(self, wanted: Descriptor, start: int = 0) -> Iterator[bytes]:
        """The bytes of a blob in their order from `start` on, gone on with where a connection broke; not verified.

        Raises: RegistryError when the registry does not go on, BadImage when it has another size.
        """
        at, breaks, marked = start, 0, start
        while True:
            try:
                for piece in self._from(wanted, at):
                    at += len(piece)
                    yield piece
                return
            except Unanswered as error:
                if at - marked >= _WORTH_A_RETRY:
                    breaks, marked = 0, at
                if not error.passing or breaks == self._transport.patience.retries:
                    raise RegistryError(
                        f"{self.reference.name}: {at} of {wanted.size} bytes of {wanted.digest} came: {error}",
                        hint=error.hint,
                    ) from error
                self._transport.pause(breaks)
                breaks += 1

    def tags(self, most: int) -> list[str]:
        """Some tags of the repository, for a hint; none where the registry does not tell."""
        try:
            answer = self._whole(self._endpoints[-1], f"tags/list?n={most}", "application/json", 1 << 22)
            tags = json.loads(answer.raw)["tags"]
            return sorted(clean(str(tag)) for tag in tags[:most])
        except (RegistryError, BadImage, ValueError, KeyError, TypeError, RecursionError):
            return []

    def _asked(self) -> Iterator[Endpoint]:
        return (endpoint for endpoint in self._endpoints if not endpoint.dropped)

    @contextlib.contextmanager
    def _or_the_next(self, endpoint: Endpoint) -> Iterator[None]:
        """What a mirror cannot do is left to the next place; only the registry's own failure is an error."""
        try:
            yield
        except Interrupted:
            raise
        except (RegistryError, BadImage) as error:
            if not endpoint.mirror:
                raise
            endpoint.dropped = not (isinstance(error, Refused) and error.status == 404)

    def _from(self, wanted: Descriptor, start: int) -> Iterator[bytes]:
        """The blob from `start`, out of one answer of the first place that has it."""
        at = start
        for endpoint in self._asked():
            with self._or_the_next(endpoint), self._open_from(endpoint, wanted, start) as response:
                # A registry that knows no ranges begins at the beginning.
                skip = start - self._begins(response, wanted, start)
                for piece in self._transport.pieces(response):
                    if len(piece) > skip:
                        at += len(piece) - skip
                        yield piece[skip:]
                    skip = max(0, skip - len(piece))
                if at >= wanted.size:
                    return
                raise _broken("the answer ended")
            if at > start:
                raise _broken(f"the mirror {endpoint.host} stopped")

    @contextlib.contextmanager
    def _open_from(self, endpoint: Endpoint, wanted: Descriptor, start: int) -> Iterator[Response]:
        """The answer of one place, from `start` if it can; as a whole from one that refuses ranges (416)."""
        path = f"blobs/{wanted.digest}"
        with contextlib.ExitStack() as stack:
            try:
                response = stack.enter_context(endpoint.open(path, {"Range": f"bytes={start}-"} if start else {}))
            except Refused as error:
                if error.status != 416 or not start:
                    raise
                response = stack.enter_context(endpoint.open(path, {}))
            yield response

    def _begins(self, response: Response, wanted: Descriptor, start: int) -> int:
        """Where in the blob this answer begins, once it is clear that it is of the size that was promised."""
        begin, size = 0, response.header("Content-Length")
        if response.status == 206:
            found = _RANGE.fullmatch(response.header("Content-Range") or "")
            if found is None or int(found[1]) > start:
                raise RegistryError(f"{self.reference.name}: an answer to another range", hint="the registry is broken")
            begin, size = int(found[1]), found[3] if found[3] != "*" else str(wanted.size)
        if size is not None and size != str(wanted.size):
            raise BadImage(
                f"{self.reference.name}: blob {wanted.digest} has {clean(size)} bytes instead of {wanted.size}",
                hint="the registry's copy is damaged; push the image again",
            )
        return begin


def _broken(why: str) -> Unanswered:
    error = Unanswered(why, hint="try again: the next pull goes on from there; nothing was stored")
    error.passing = True
    return error
