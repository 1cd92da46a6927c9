"""Which snapshotter containerd is told to use, from files of every version, and what that means."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from flatmount.cli.main import main
from flatmount.observe.doctor import snapshotters
from flatmount.observe.doctor.findings import Severity
from flatmount.observe.doctor.snapshotters import Snapshotter, check, find_snapshotter, read_snapshotter
from flatmount.snapshotter import containerd

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
    found = read_snapshotter(path)
    assert found == Snapshotter(name, path, version, address, remap, ours=name == "flatmount")


def test_what_is_imported_lies_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, 'imports = ["conf.d/*.toml", "config.toml"]\n' + VERSION_2)
    (tmp_path / "conf.d").mkdir()
    written(tmp_path / "conf.d", VERSION_2.replace("stargz", "soci"), "a.toml")
    found = read_snapshotter(path)
    assert (found.name, found.address) == ("soci", "/run/soci.sock")


ADDED = VERSION_3.partition("[proxy_plugins")[1:]
RECORDED = {
    # What `flatmount containerd install` of before wrote, with --cri and without.
    "of an older install": (VERSION_3, ()),
    "not for CRI": ("version = 2\n" + "".join(ADDED), ()),
    # As `containerd config default` of 2.1 has the plugin, and with what snapshotters' own pages say to add.
    "default": (
        VERSION_3 + "[plugins.'io.containerd.transfer.v1.local']\n  max_concurrent_downloads = 3\n"
        "  check_platform_supported = false\n  config_path = ''\n",
        (),
    ),
    "empty": (VERSION_3 + "[plugins.'io.containerd.transfer.v1.local']\n  unpack_config = []\n", ()),
    "others": (
        VERSION_3 + "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  platform = 'linux/amd64'\n"
        "  snapshotter = 'erofs'\n  differ = 'erofs'\n[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n"
        "  snapshotter = 'devmapper'\n",
        ("erofs", "devmapper"),
    ),
    "no list": (VERSION_3 + "[plugins.'io.containerd.transfer.v1.local']\n  unpack_config = 7\n", ()),
}


@pytest.mark.parametrize(("text", "told"), RECORDED.values(), ids=RECORDED)
def test_that_containerd_2_pulls_nothing_for_us_is_found(text: str, told: tuple[str, ...], tmp_path: Path) -> None:
    path = written(tmp_path, text)
    found = read_snapshotter(path)
    assert found.unpacked_for == told
    for version in ((2, 1, 0), NEW, (2, 3, 4), None):
        (finding,) = check(found, version)
        assert (finding.id, finding.severity, finding.now) == ("snapshotter-not-unpacked", Severity.WARNING, True)
        assert path in finding.evidence[0]
        assert all(name in finding.evidence[0] for name in told)
        assert ("install --cri --config" in finding.remedy) is (found.name == "flatmount")
    assert [*check(found, OLD), *check(found, (2, 0, 7))] == []


def test_the_remedy_ends_it(tmp_path: Path) -> None:
    for cri, version in itertools.product((False, True), (2, 3)):
        made = containerd.install(f"version = {version}\n", "/run/flatmount/snapshotter.sock", cri=cri)
        file = written(tmp_path, re.sub(r"\n\[\[plugins.*\n(  .*\n)*", "", made))
        (finding,) = check(read_snapshotter(file), NEW)
        command = finding.remedy.split("`")[1].split()
        assert main(command[1:]) == 0
        found = read_snapshotter(file)
        assert (found.unpacked_for, found.name) == (("overlayfs", "flatmount"), "flatmount" if cri else "overlayfs")
        assert list(check(found, NEW)) == []
    (finding,) = check(replace(PROXY, path=containerd.DEFAULT_PATH, name="x", ours=True), NEW)
    assert "`flatmount containerd install`" in finding.remedy


def test_what_is_imported_may_have_the_list(tmp_path: Path) -> None:
    path = written(tmp_path, 'imports = ["unpack.toml"]\n' + VERSION_3)
    entry = "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  snapshotter = 'flatmount'\n"
    written(tmp_path, entry, "unpack.toml")
    assert list(check(read_snapshotter(path), NEW)) == []


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
        (
            replace(PROXY, remap_ids=False, ours=True),
            NEW,
            {"snapshotter-no-remap": Severity.WARNING, "snapshotter-not-unpacked": Severity.WARNING},
        ),
        (replace(PROXY, ours=True, unpacked_for=("overlayfs", "flatmount")), NEW, {}),
        (replace(PROXY, name="other"), NEW, {}),
        (replace(PROXY, remap_ids=False), OLD, {}),
        (replace(PROXY, name="nydus", remap_ids=False), NEW, {"snapshotter-fuse": Severity.NOTE}),
        (Snapshotter("native", "/etc/x", 1, "", False), NEW, {"snapshotter-copies": Severity.WARNING}),
        (Snapshotter("lost", "/etc/x", 3, None, False), NEW, {"snapshotter-missing": Severity.WARNING}),
    ],
)
def test_what_it_means(snapshotter: Snapshotter, containerd: tuple[int, int, int], found: dict[str, Severity]) -> None:
    assert {finding.id: finding.severity for finding in check(snapshotter, containerd)} == found
