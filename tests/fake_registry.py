"""A registry in this process that does what it is told, also what no registry should."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from flatmount.image.model import host

OCI = "application/vnd.oci.image"
MANIFEST = f"{OCI}.manifest.v1+json"
INDEX = f"{OCI}.index.v1+json"
ARCHITECTURE = host().architecture


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Seen:
    """One request."""

    method: str
    path: str
    headers: dict[str, str]
    form: dict[str, list[str]]


Fault = Callable[["Handler", bytes | None], None]


@dataclass
class FakeRegistry:
    """What it holds and how it behaves; `faults` are answers for paths that match, used up one by one."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)  # reference -> type, bytes
    faults: list[tuple[str, Fault]] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    ranges: bool = True
    digest_header: str | None = ""  # "" is the right one, None is none
    users: dict[str, str] = field(default_factory=dict)
    challenge: str = ""
    valid: set[str] = field(default_factory=set)  # Authorization headers that are let in
    host: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
        self.blobs[digest(data)] = data
        return {"mediaType": media_type, "digest": digest(data), "size": len(data), **more}

    def put_manifest(self, value: dict[str, Any] | bytes, *references: str, kind: str = MANIFEST) -> dict[str, Any]:
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        for reference in (*references, digest(raw)):
            self.manifests[reference] = (kind, raw)
        return {"mediaType": kind, "digest": digest(raw), "size": len(raw)}

    def put_image(
        self, layers: Sequence[bytes], *references: str, architecture: str = ARCHITECTURE, **more: Any
    ) -> dict[str, Any]:
        """An image of these archives, gzipped; its manifest's descriptor."""
        diff_ids = [digest(layer) for layer in layers]
        value = {
            "architecture": architecture,
            "os": "linux",
            "config": {"Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }
        config = self.put(json.dumps(value).encode(), f"{OCI}.config.v1+json")
        blobs = [self.put(gzip.compress(layer, 1, mtime=0), f"{OCI}.layer.v1.tar+gzip") for layer in layers]
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": blobs, **more}
        return self.put_manifest(manifest, *references)

    def fault(self, pattern: str, *faults: Fault) -> None:
        self.faults += [(pattern, fault) for fault in faults]

    def asked(self, pattern: str) -> list[Seen]:
        with self.lock:
            return [seen for seen in self.seen if re.search(pattern, seen.path)]

    def let_in(self, user: str, password: str) -> None:
        """Basic authentication."""
        self.challenge = 'Basic realm="here"'
        self.valid = {basic(user, password)}

    def next_fault(self, path: str) -> Fault | None:
        with self.lock:
            for position, (pattern, fault) in enumerate(self.faults):
                if re.search(pattern, path):
                    del self.faults[position]
                    return fault
        return None

    def find(self, path: str) -> tuple[str, bytes] | None:
        kind, _, reference = path.rpartition("/")
        if kind.endswith("/manifests"):
            return self.manifests.get(reference)
        if kind.endswith("/blobs") and reference in self.blobs:
            return "application/octet-stream", self.blobs[reference]
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 20
    registry: FakeRegistry

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def _handle(self) -> None:
        registry = self.registry
        length = int(self.headers.get("Content-Length", "0"))
        form = parse_qs(self.rfile.read(length).decode())
        with registry.lock:
            registry.seen.append(Seen(self.command, self.path, dict(self.headers), form))
        path = urlsplit(self.path).path
        found = registry.find(path)
        fault = registry.next_fault(self.path)
        if fault is not None:
            fault(self, found[1] if found else None)
        elif registry.challenge and self.headers.get("Authorization") not in registry.valid:
            self.answer(401, error("UNAUTHORIZED", "who are you?"), {"WWW-Authenticate": registry.challenge})
        elif path.endswith("/tags/list"):
            tags = [name for name in registry.manifests if ":" not in name]
            self.answer(200, json.dumps({"name": "x", "tags": tags}).encode())
        elif found is None:
            self.answer(404, error("MANIFEST_UNKNOWN" if "manifests" in path else "BLOB_UNKNOWN", "unknown"))
        else:
            self._content(*found)

    def _content(self, kind: str, body: bytes) -> None:
        headers = {"Content-Type": kind}
        if self.registry.digest_header is not None and kind != "application/octet-stream":
            headers["Docker-Content-Digest"] = self.registry.digest_header or digest(body)
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and self.registry.ranges:
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self.answer(206, body[start:], headers)
        else:
            self.answer(200, body, headers)

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, cut: int = 0) -> None:
        """`cut`: so many bytes of the body are promised and not sent."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) - cut])
        if cut:
            self.close_connection = True


def error(code: str, message: str) -> bytes:
    return json.dumps({"errors": [{"code": code, "message": message}]}).encode()


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def status(code: int, body: bytes = b"", **headers: str) -> Fault:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, _: handler.answer(code, body, named)


def redirect(url: str, code: int = 307) -> Fault:
    return status(code, Location=url)


def half(handler: Handler, body: bytes | None) -> None:
    """The first half of what is left, then the connection ends."""
    start = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    rest = (body or b"")[int(start[1]) if start else 0 :]
    headers = {}
    if start:
        headers["Content-Range"] = f"bytes {start[1]}-{len(body or b'') - 1}/{len(body or b'')}"
    handler.answer(206 if start else 200, rest, headers, cut=len(rest) - len(rest) // 2)


def tampered(handler: Handler, body: bytes | None) -> None:
    """As long as it should be, and something else."""
    changed = bytearray(body or b"")
    changed[len(changed) // 2] ^= 0xFF
    handler.answer(200, bytes(changed))


@contextmanager
def serve(registry: FakeRegistry | None = None, tls: tuple[str, str] | None = None) -> Iterator[FakeRegistry]:
    """Serve on loopback; `tls` is a certificate's and a key's file. Every connection is closed afterwards."""
    registry = registry or FakeRegistry()
    handler = type("OwnHandler", (Handler,), {"registry": registry})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = False
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    registry.host = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield registry
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
