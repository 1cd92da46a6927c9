"""`flatmount image pull` from a real registry that skopeo has filled."""

from __future__ import annotations

import base64
import json
import os
import pty
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flatmount.image.layer_tar import LayerTar
from tests.e2e.conftest import CommandLine
from tests.fake_registry import INDEX, FakeRegistry

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


def start(place: Path, auth: str = "") -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (place / "htpasswd").write_text(SECRET)
    file = place / "registry.yml"
    file.write_text(CONFIGURATION.format(place=place, port=port, auth=auth.format(place=place)))
    process = subprocess.Popen(["docker-registry", "serve", file], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return process, f"127.0.0.1:{port}"
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    place = tmp_path_factory.mktemp("registry")
    process, host = start(place)
    try:
        running = Running(host, write_layout(place / "layout"))
        running.fill("v1")
        running.fill("many", "--all")
        running.fill("alone", "--all")
        yield running
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The same behind a password."""
    place = tmp_path_factory.mktemp("guarded")
    process, host = start(place, AUTH)
    try:
        running = Running(host, write_layout(place / "layout"))
        running.fill("v1", "--dest-creds=me:secret")
        yield running
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def line(tmp_path: Path) -> CommandLine:
    home = {"HOME": str(tmp_path), "FLATMOUNT_CONFIG": str(tmp_path / "config.toml")}
    (tmp_path / "config.toml").write_text("version = 1\n")
    return CommandLine(tmp_path / "root", tmp_path / "run", home)


def test_pull(line: CommandLine, registry: Running, tmp_path: Path) -> None:
    name = f"{registry.host}/team/app:v1"
    facts = line.json("image", "pull", name, "--plain-http")
    assert facts["schema"] == "flatmount.image-pull/1"
    assert (facts["name"], facts["layers"], facts["fetched_layers"]) == (name, 6, 6)
    again = line.json("image", "pull", f"{name}@{facts['digest']}", "--plain-http", "--name", "mine")
    assert (again["name"], again["fetched_layers"], again["digest"]) == ("mine", 0, facts["digest"])
    imported = CommandLine(tmp_path / "other", tmp_path / "run").json("image", "import", f"{registry.layout}:v1")
    assert imported["chain_id"] == facts["chain_id"]
    assert imported["digest"] == facts["digest"]
    assert {image["name"] for image in line.json("image", "list")["images"]} == {name, "mine"}
    assert "0 of 6 layers fetched" in line("image", "pull", name, "--plain-http")


def test_an_image_for_several_platforms(line: CommandLine, registry: Running) -> None:
    assert line.json("image", "pull", f"{registry.host}/team/app:many", "--plain-http")["layers"] == 3
    said = line.refused("image", "pull", f"{registry.host}/team/app:alone", "--plain-http", code=1)
    assert "it has linux/s390x" in said


def test_what_is_not_there(line: CommandLine, registry: Running) -> None:
    said = line.refused("image", "pull", f"{registry.host}/team/app:v2", "--plain-http", code=2)
    assert "has no v2; it has alone, many, v1" in said
    said = line.refused("image", "pull", f"{registry.host}/team/none:v2", "--plain-http", code=2)
    assert "team/none" in said
    said = line.refused("image", "pull", f"{registry.host}/team/app:v1", code=1)
    assert "--plain-http" in said
    assert "names no registry" in line.refused("image", "pull", "app", code=2)
    assert not line.json("image", "list")["images"]


def test_a_password(line: CommandLine, guarded: Running, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f'version = 1\n[registries."{guarded.host}"]\nplain_http = true\n')
    name = f"{guarded.host}/team/app:v1"
    assert "access denied" in line.refused("image", "pull", name, code=1)
    file = tmp_path / ".docker/config.json"
    file.parent.mkdir()
    for password in ("guess", "secret"):
        packed = base64.b64encode(f"me:{password}".encode()).decode()
        file.write_text(json.dumps({"auths": {guarded.host: {"auth": packed}}}))
        if password == "guess":
            assert str(file) in line.refused("image", "pull", name, code=1)
    assert line.json("image", "pull", name)["fetched_layers"] == 6


def test_a_mirror(line: CommandLine, registry: Running, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        f'version = 1\n[registries."registry.invalid"]\nmirrors = ["{registry.host}"]\n'
        f'[registries."{registry.host}"]\nplain_http = true\n'
    )
    assert line.json("image", "pull", "registry.invalid/team/app:v1")["name"] == "registry.invalid/team/app:v1"
    said = line.refused("image", "pull", "registry.invalid/team/app:v9", code=1)
    assert "there is no host registry.invalid" in said


def test_bars_on_a_terminal(line: CommandLine, registry: Running) -> None:
    ours, theirs = pty.openpty()
    try:
        with line.start(
            "image", "pull", f"{registry.host}/team/app:v1", "--plain-http", stdout=subprocess.PIPE, stderr=theirs
        ) as running:
            out, _ = running.communicate(timeout=60)
        assert running.returncode == 0
        assert "6 of 6 layers fetched" in out
        shown = os.read(ours, 1 << 16).decode()
        # Whatever was drawn is taken away in the end.
        assert shown.endswith("\x1b[J")
    finally:
        os.close(ours)
        os.close(theirs)
