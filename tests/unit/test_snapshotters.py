"""Which snapshotter containerd is told to use, from files of every version, and what that means."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from flatmount.observe.doctor import snapshotters
from flatmount.observe.doctor.findings import Severity
from flatmount.observe.doctor.snapshotters import Snapshotter, check, find_snapshotter, read_snapshotter

VERSION_3 = """version = 3
[plugins.'io.containerd.cri.v1.images']
  snapshotter = 'flatmount'
[proxy_plugins.flatmount]
  type = "snapshot"
  address = "/run/flatmount/snapshotter.sock"
  capabilities = ["remap-ids"]
"""
VERSION_2 = """version = 2
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "stargz"
[proxy_plugins.stargz]
  type = "snapshot"
  address = "/run/stargz.sock"
"""
VERSION_1 = """[plugins.cri.containerd]
snapshotter = "native"
"""
NEW, OLD = (2, 2, 0), (1, 7, 23)


def written(directory: Path, text: str, name: str = "config.toml") -> str:
    path = directory / name
    path.write_text(text)
    return str(path)


@contextmanager
def a_containerd(directory: Path, *words: str) -> Iterator[int]:
    """A process with these words behind its program."""
    program = written(directory, "print('there', flush=True)\ninput()\n", "containerd")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, program, *words], stdin=pipe, stdout=pipe) as running:
        assert running.stdout
        running.stdout.readline()
        try:
            yield running.pid
        finally:
            running.kill()


@pytest.mark.parametrize(
    ("text", "version", "name", "address", "remap"),
    [
        (VERSION_3, 3, "flatmount", "/run/flatmount/snapshotter.sock", True),
        (VERSION_2, 2, "stargz", "/run/stargz.sock", False),
        (VERSION_1, 1, "native", "", False),
        ("version = 2\n", 2, "overlayfs", "", False),
        ("", 1, "overlayfs", "", False),
        ("version = 3\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'lost'\n", 3, "lost", None, False),
        ("version = 3\nproxy_plugins = 7\n[plugins]\nx = 1\n", 3, "overlayfs", "", False),
    ],
)
def test_files_of_every_version(
    text: str, version: int, name: str, address: str | None, remap: bool, tmp_path: Path
) -> None:
    path = written(tmp_path, text)
    assert read_snapshotter(path) == Snapshotter(name, path, version, address, remap)


def test_what_is_imported_lies_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, 'imports = ["conf.d/*.toml", "config.toml"]\n' + VERSION_2)
    (tmp_path / "conf.d").mkdir()
    written(tmp_path / "conf.d", VERSION_2.replace("stargz", "soci"), "a.toml")
    found = read_snapshotter(path)
    assert (found.name, found.address) == ("soci", "/run/soci.sock")


@pytest.mark.parametrize("text", ["not = [toml", "version = 'x'\n"])
def test_what_is_no_configuration_is_named_and_not_guessed(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshotters, "DEFAULT_PATH", written(tmp_path, text))
    found, why = find_snapshotter(None)
    assert found is None and why.startswith(f"containerd's snapshotter: {tmp_path}")


def test_the_configuration_of_the_one_that_runs_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshotters, "DEFAULT_PATH", written(tmp_path, VERSION_1))
    other = written(tmp_path, VERSION_3, "other.toml")
    for words in (["--config", other], ["-c", other], [f"--config={other}"]):
        with a_containerd(tmp_path, *words) as pid:
            found, why = find_snapshotter(pid)
        assert found is not None and (found.name, why) == ("flatmount", "")
    found, _ = find_snapshotter(None)
    assert found is not None and found.name == "native"


def test_without_a_file_a_running_containerd_has_its_default_and_none_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshotters, "DEFAULT_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(snapshotters, "_K3S_PATH", str(tmp_path / "none"))
    assert find_snapshotter(None) == (None, "")
    with a_containerd(tmp_path) as pid:
        found, _ = find_snapshotter(pid)
    assert found == Snapshotter("overlayfs", str(tmp_path / "none"), 0, "", False)


PROXY = Snapshotter("flatmount", "/etc/x", 3, "/run/x.sock", True)


@pytest.mark.parametrize(
    ("snapshotter", "containerd", "found"),
    [
        (Snapshotter("overlayfs", "/etc/x", 2, "", False), NEW, {}),
        (Snapshotter("devmapper", "/etc/x", 2, "", False), NEW, {}),
        (PROXY, NEW, {}),
        (replace(PROXY, remap_ids=False), NEW, {"snapshotter-no-remap": Severity.WARNING}),
        (replace(PROXY, remap_ids=False), OLD, {}),
        (replace(PROXY, name="nydus", remap_ids=False), NEW, {"snapshotter-fuse": Severity.NOTE}),
        (Snapshotter("native", "/etc/x", 1, "", False), NEW, {"snapshotter-copies": Severity.WARNING}),
        (Snapshotter("lost", "/etc/x", 3, None, False), NEW, {"snapshotter-missing": Severity.WARNING}),
    ],
)
def test_what_it_means(snapshotter: Snapshotter, containerd: tuple[int, int, int], found: dict[str, Severity]) -> None:
    assert {finding.id: finding.severity for finding in check(snapshotter, containerd)} == found
