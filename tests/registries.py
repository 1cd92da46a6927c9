"""A real registry on loopback, Debian's docker-registry, which skopeo fills."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flatmount.image.layer_tar import LayerTar
from tests.fake_registry import INDEX, FakeRegistry
from tests.waiting import until

# perl -e 'print crypt("secret", q($2y$05$abcdefghijklmnopqrstuu))'
SECRET = "me:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"
CONFIGURATION = """version: 0.1
log: {{level: error}}
storage: {{filesystem: {{rootdirectory: {place}/data}}}}
http: {{addr: "127.0.0.1:{port}"}}
{auth}
"""
AUTH = "auth: {{htpasswd: {{realm: here, path: {place}/htpasswd}}}}"


def layer(number: int) -> bytes:
    made = LayerTar()
    made.file(f"etc/layer{number}", b"%d" % number * 1000)
    return made.finish()


LAYERS = [layer(number) for number in range(6)]


@dataclass(frozen=True)
class Running:
    """A registry, and the layout that it was filled from."""

    host: str
    layout: Path

    def fill(self, tag: str, *options: str) -> None:
        source, target = f"oci:{self.layout}:{tag}", f"docker://{self.host}/team/app:{tag}"
        command = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", *options]
        subprocess.run([*command, source, target], check=True, timeout=60)


def write_layout(path: Path) -> Path:
    """An image `v1`, and `many`, an index for this platform and another one."""
    made = FakeRegistry()
    one = made.put_image(LAYERS)
    mine, foreign = made.put_image(LAYERS[:3]), made.put_image(LAYERS[3:], architecture="s390x")
    platforms = [
        mine | {"platform": {"os": "linux", "architecture": os.uname().machine.replace("x86_64", "amd64")}},
        foreign | {"platform": {"os": "linux", "architecture": "s390x"}},
    ]
    many = made.put_manifest({"schemaVersion": 2, "mediaType": INDEX, "manifests": platforms}, kind=INDEX)
    alone = made.put_manifest({"schemaVersion": 2, "mediaType": INDEX, "manifests": platforms[1:]}, kind=INDEX)
    blobs = path / "blobs/sha256"
    blobs.mkdir(parents=True)
    for name, data in (made.blobs | {name: raw for name, (_, raw) in made.manifests.items()}).items():
        (blobs / name.partition(":")[2]).write_bytes(data)
    named = {"v1": one, "many": many, "alone": alone}
    manifests = [
        descriptor | {"annotations": {"org.opencontainers.image.ref.name": name}} for name, descriptor in named.items()
    ]
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return path


def start(place: Path, auth: str = "") -> tuple[int, str]:
    """A registry that is nobody's child, so that tests may look for theirs; its process id and HOST:PORT."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (place / "htpasswd").write_text(SECRET)
    file = place / "registry.yml"
    file.write_text(CONFIGURATION.format(place=place, port=port, auth=auth.format(place=place)))
    command = ["sh", "-c", 'docker-registry serve "$1" >/dev/null 2>&1 & echo $!', "sh", str(file)]
    pid = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=30).stdout)
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return pid, f"127.0.0.1:{port}"
        except OSError:
            assert not is_over(pid)
            assert time.monotonic() < deadline
            time.sleep(0.05)


def is_over(pid: int) -> bool:
    """Whether it has ended. Not by its name: before it is executed it has its parent's."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@contextmanager
def registry_process(place: Path, auth: str = "") -> Iterator[str]:
    """An empty registry that keeps its things in `place`; its HOST:PORT. It ends with the block."""
    pid, host = start(place, auth)
    try:
        yield host
    finally:
        os.kill(pid, signal.SIGTERM)
        until(lambda: is_over(pid))


@contextmanager
def serving(place: Path, *tags: str, auth: str = "", credentials: str = "") -> Iterator[Running]:
    """The same, filled with these of the layout's images."""
    with registry_process(place, auth) as host:
        running = Running(host, write_layout(place / "layout"))
        for tag in tags:
            running.fill(tag, "--all", *([f"--dest-creds={credentials}"] if credentials else []))
        yield running
