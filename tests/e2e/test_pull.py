"""`flatmount image pull` from a real registry that skopeo has filled."""

from __future__ import annotations

import base64
import errno
import json
import os
import pty
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import CommandLine
from tests.registries import AUTH, Running, serving


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("registry"), "v1", "many", "alone") as running:
        yield running


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The same behind a password."""
    with serving(tmp_path_factory.mktemp("guarded"), "v1", auth=AUTH, credentials="me:secret") as running:
        yield running


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
    deadline = time.monotonic() + 60
    while not line.json("image", "show", name)["flat_tree"]:
        assert time.monotonic() < deadline, "nobody builds the flat tree"
        time.sleep(0.1)
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
            os.close(theirs)
            shown = b"".join(iter(lambda: read_on(ours), b"")).decode()
            out, _ = running.communicate(timeout=60)
        assert running.returncode == 0
        assert "6 of 6 layers fetched" in out
        # Whatever was drawn is taken away in the end.
        assert shown.endswith("\x1b[J")
    finally:
        os.close(ours)


def read_on(terminal: int) -> bytes:
    """What was written since: a page at most, whatever is there; nothing when nobody has its other side any more."""
    try:
        return os.read(terminal, 1 << 16)
    except OSError as error:
        assert error.errno == errno.EIO
        return b""
