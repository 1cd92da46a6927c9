"""Real images, assembled, against what `umoci unpack` makes of them: path by path, without any difference."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flatmount.image.demo import build_demo, default_cache
from flatmount.kernel.probes import probe
from tests.conftest import CANNOT
from tests.e2e.conftest import CommandLine
from tests.kernel.images import directory, file, layout_of
from tests.kernel.trees import facts

IDENTITY = "0:0:1000000"
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)


def run(*words: str | Path, cwd: Path | None = None) -> None:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Hundreds of megabytes that no other test needs."""
    for program in ("umoci", "mmdebstrap", "setcap"):
        if shutil.which(program) is None:
            pytest.skip(f"{CANNOT}there is no {program} here (tools/setup --tests installs it)")
    path = tmp_path_factory.mktemp("oracle")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def system(place: Path) -> str:
    """A Debian system as one layer, the way mmdebstrap makes it: maintainer scripts run, setuid programs, devices."""
    run("mmdebstrap", "--variant=essential", "--include=iputils-ping", "--mode=root", "bookworm", place / "system.tar")
    run("umoci", "init", "--layout", place / "oci")
    run("umoci", "new", "--image", f"{place}/oci:system")
    run("umoci", "config", "--image", f"{place}/oci:system", "--architecture", ARCHITECTURE, "--os", "linux")
    run("umoci", "raw", "add-layer", "--image", f"{place}/oci:system", place / "system.tar")
    return f"{place}/oci:system"


@pytest.fixture(scope="module")
def changed(place: Path, system: str) -> str:
    """The system after package installs and removals and everything else that a layer can say."""
    bundle = place / "work"
    run("umoci", "unpack", "--image", system, bundle)
    root = bundle / "rootfs"
    packages = Path(default_cache()) / "packages"
    build_demo(str(place / "unused"), layers=5, cache=default_cache())  # fills the cache where there is none
    chosen = [next(packages.glob(f"{name}_*.deb")) for name in ("hostname", "less", "libmnl0", "libattr1")]
    run("dpkg", f"--root={root}", "--force-depends", "--force-script-chrootless", "-i", *chosen)
    run("dpkg", f"--root={root}", "--force-all", "--purge", "hostname")
    special(root)
    run("umoci", "repack", "--image", f"{place}/oci:changed", bundle)
    shutil.rmtree(bundle)
    fresh = place / "fresh"
    (fresh / "deep").mkdir(parents=True)
    (fresh / "only").write_text("after the opaque marker")
    image = f"{place}/oci:changed"
    run("umoci", "insert", "--image", image, "--opaque", fresh, "/usr/share/doc")
    run("umoci", "insert", "--image", image, "--whiteout", "/etc/skel")
    run("umoci", "insert", "--image", image, fresh, "/etc/skel")
    return image


def special(root: Path) -> None:
    place = root / "srv" / "special"
    place.mkdir()
    (place / ("n" * 255)).write_text("a name as long as names can be")
    (place / "ünïcødé-名前-🐧").write_text("unicode")
    (place / os.fsdecode(b"not-\xff-utf8")).write_text("bytes")
    (place / "first").write_text("linked")
    for name in ("second", "third"):
        os.link(place / "first", place / name)
    shutil.copy(root / "bin/true", place / "setuid")
    os.chown(place / "setuid", 1000, 70000)
    os.chmod(place / "setuid", 0o6755)
    shutil.copy(root / "bin/true", place / "capable")
    run("setcap", "cap_net_raw,cap_net_admin=ep", place / "capable")
    os.setxattr(place / "first", "user.comment", b"\x00\x01binary")
    os.mknod(place / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(place / "disk", stat.S_IFBLK | 0o660, os.makedev(8, 17))
    os.mkfifo(place / "pipe", 0o640)
    os.symlink("../../../../outside", place / "dangling")
    os.lchown(place / "dangling", 5, 6)
    (place / "sticky").mkdir()
    os.chmod(place / "sticky", 0o3777)
    with (place / "holes").open("wb") as out:
        out.truncate(8 << 20)
        out.seek(4 << 20)
        out.write(b"island")
    os.utime(place / "first", ns=(1, 1_234_567_890_123_456_789))
    os.utime(place / "sticky", ns=(1, 1_000_000_000_000_000_001))
    shutil.rmtree(root / "usr/share/man", ignore_errors=True)
    shutil.rmtree(root / "usr/share/common-licenses")
    (root / "usr/share/common-licenses").write_text("a file where a directory was")
    (root / "etc/issue").unlink()
    (root / "etc/issue").mkdir()
    os.rename(root / "etc/motd" if (root / "etc/motd").exists() else root / "etc/debian_version", root / "etc/moved")


@pytest.fixture(scope="module")
def demo(place: Path) -> str:
    build_demo(str(place / "demo"), layers=60, cache=default_cache(), name="demo")
    return f"{place}/demo:demo"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["demo", "system", "changed"])
def test_the_assembled_root_is_what_umoci_unpacks(
    flatmount: CommandLine, place: Path, tmp_path: Path, target: Path, name: str, request: pytest.FixtureRequest
) -> None:
    image = request.getfixturevalue(name)
    bundle = place / "bundle"
    run("umoci", "unpack", "--image", image, bundle)
    expected = facts(str(bundle / "rootfs"))
    links = link_counts(bundle / "rootfs")
    shutil.rmtree(bundle)
    line = CommandLine(place / "store", flatmount.run_directory)
    line("image", "import", image, "--name", name)
    for strategy, changes in (("flat", "--read-only"), ("flat", "--ephemeral"), ("detached", "--ephemeral")):
        line("mount", name, str(target), "--map", IDENTITY, changes, "--strategy", strategy)
        found = facts(str(target))
        line("umount", str(target))
        assert len(found) > 1000
        assert differences(expected, found) == []
    if not probe(str(place)).facts.erofs:
        pytest.skip(f"{CANNOT}the kernel mounts no EROFS images")
    line("image", "flatten", name, "--flat-format", "erofs")
    for changes in ("--read-only", "--ephemeral"):
        line("mount", name, str(target), "--map", IDENTITY, changes)
        found, found_links = facts(str(target)), link_counts(target)
        line("umount", str(target))
        # Nothing excepted: counts of links, which those of the hard-link form are not, as well.
        assert differences(expected, found) == []
        assert found_links == links
    line("fsck")
    if name == "changed":
        told = {key: found["srv/special/" + key] for key in ("capable", "first", "setuid", "n" * 255)}
        assert "security.capability" in told["capable"]["xattrs"]
        assert len(told["first"]["links"]) == 3
        assert told["setuid"]["owner"] == (1000, 70000)
        assert sorted(path for path in found if path.startswith("usr/share/doc/")) == [
            "usr/share/doc/deep",
            "usr/share/doc/only",
        ]


def link_counts(root: Path) -> dict[str, int]:
    """Of everything but directories, whose count is the file system's own business."""
    return {
        os.path.relpath(os.path.join(here, name), root): os.lstat(os.path.join(here, name)).st_nlink
        for here, _, names in os.walk(root)
        for name in names
    }


def test_the_root_is_what_umoci_makes_where_the_topmost_layers_say_nothing_of_it(
    flatmount: CommandLine, place: Path, tmp_path: Path, target: Path
) -> None:
    base = [directory("./", mode=0o710, uid=11, gid=12, mtime=1_500_000_000), directory("etc"), file("etc/a", "a")]
    # umoci sets the time of a directory for what later layers change in it: only names below /etc come on top.
    layout = layout_of(str(tmp_path / "layout"), [base, [file("etc/b", "b")], [file("etc/c", "c")]])
    with open(f"{layout}/index.json", encoding="ascii") as opened:
        index = json.load(opened)
    index["manifests"][0]["annotations"] = {"org.opencontainers.image.ref.name": "rootless"}
    Path(layout, "index.json").write_text(json.dumps(index))
    run("umoci", "unpack", "--image", f"{layout}:rootless", tmp_path / "bundle")
    expected = facts(str(tmp_path / "bundle/rootfs"))
    assert expected["."]["owner"] == (11, 12)
    line = CommandLine(tmp_path / "store", flatmount.run_directory)
    line("image", "import", layout, "--name", "rootless", "--flatten", "first-use")
    for strategy, changes in (("detached", "--read-only"), ("detached", "--ephemeral"), ("flat", "--read-only")):
        line("mount", "rootless", str(target), "--map", IDENTITY, changes, "--strategy", strategy)
        found = facts(str(target))
        line("umount", str(target))
        assert differences(expected, found) == [], (strategy, changes)
    line("fsck")


def differences(expected: dict[str, dict[str, object]], found: dict[str, dict[str, object]]) -> list[str]:
    told = [f"{path}: only umoci has it" for path in expected.keys() - found.keys()]
    told += [f"{path}: umoci does not have it" for path in found.keys() - expected.keys()]
    for path in expected.keys() & found.keys():
        for key in expected[path].keys() | found[path].keys():
            ours, theirs = found[path].get(key), expected[path].get(key)
            if ours != theirs:
                told.append(f"{path}: {key} {ours!r}, umoci has {theirs!r}")
    return sorted(told)[:50]
