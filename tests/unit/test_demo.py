from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from merged import Entry, image_of, merge

from flatmount.errors import MissingFeature, UsageError
from flatmount.image import demo_layers
from flatmount.image.demo import MAX_LAYERS, Source, build_demo, default_cache, spread
from flatmount.image.demo_busybox import needs_libraries
from flatmount.image.demo_packages import PackagesUnavailable, goals, parse_uris

needs_apt = pytest.mark.skipif(
    not all(map(shutil.which, ("apt-get", "dpkg-deb"))),
    reason="machine cannot: there is no apt-get or dpkg-deb",
)


def _check_changes(tree: dict[str, Entry]) -> None:
    assert {path: tree[path].data for path in demo_layers.HOLDS} == dict(demo_layers.HOLDS)
    assert not demo_layers.GONE & tree.keys()
    assert tree["srv/demo/dir-to-link"].info.issym()
    assert tree["srv/demo/kept-dir"].info.mode == 0o2770
    assert (tree["srv/demo/replaced-file"].info.uid, tree["srv/demo/replaced-file"].info.mode) == (1000, 0o600)


def test_changes_come_out_as_they_are_said_to() -> None:
    setup = demo_layers.setup(demo_layers.Setup())
    made = merge([setup]).keys() | merge([demo_layers.replace()]).keys()
    assert demo_layers.GONE - made == {"srv/demo/target/own"}  # what a write through a link of a lower layer would make
    _check_changes(merge([setup, demo_layers.trim(packages=True), demo_layers.replace(), demo_layers.restore()]))


def test_setup_knows_the_users_of_debian() -> None:
    facts = demo_layers.Setup(
        passwd="root:*:0:0:root:/root:/bin/bash\nsys:*:3:3:sys:/dev:/usr/sbin/nologin\n",
        group="root:*:0:\nshadow:*:77:\n",
        files=(("etc/motd", b"hello\n"),),
        links=(("usr/bin/awk", "mawk"),),
    )
    tree = merge([demo_layers.setup(facts)])
    assert tree["etc/passwd"].data.decode().splitlines() == [
        "root:x:0:0:root:/root:/bin/bash",
        "sys:x:3:3:sys:/dev:/usr/sbin/nologin",
        "app:x:1000:1000:demo user:/home/app:/bin/sh",
    ]
    assert tree["etc/group"].data == b"root:x:0:\nshadow:x:77:\napp:x:1000:\n"
    assert (tree["etc/shadow"].info.gid, tree["etc/shadow"].info.mode) == (77, 0o640)
    assert tree["home/app"].info.uid == tree["home/app/.profile"].info.gid == 1000
    assert tree["etc/motd"].data == b"hello\n"
    assert tree["usr/bin/awk"].info.linkname == "mawk"
    assert "SCHILY.xattr.security.capability" in tree["srv/demo/attributes/capable"].info.pax_headers


def test_every_filler_differs_and_each_third_drops_one() -> None:
    archives = [demo_layers.filler(number) for number in range(1, MAX_LAYERS)]
    assert len(set(archives)) == len(archives)
    tree = merge(archives[:12])
    assert tree["srv/demo/fill/latest"].data == b"12\n"
    files = [os.path.basename(path) for path, entry in tree.items() if entry.info.isreg()]
    numbers = sorted(int(name) for name in files if name.isdigit())
    assert numbers == [2, 3, 5, 6, 8, 9, 11, 12]


def test_uris_are_read_for_names_and_digests() -> None:
    digest = "a" * 64
    text = (
        "Some word of apt\n"
        f"'http://host/pool/a/acl/libacl1_1%3a2.3-1_amd64.deb' libacl1_1%3a2.3-1_amd64.deb 100 SHA256:{digest}\n"
        f"'http://host/base-files_12.4%2bdeb12u15_amd64.deb' base-files_12.4+deb12u15_amd64.deb 7 SHA256:{digest}\n"
    )
    base, acl = parse_uris(text)
    assert (base.name, base.version) == ("base-files", "12.4+deb12u15")
    assert (acl.name, acl.version, acl.file) == ("libacl1", "1:2.3-1", "libacl1_1%3a2.3-1_amd64.deb")
    for line in ("'http://host/a_1_all.deb' a_1_all.deb 1 MD5Sum:00", f"'x' ../a_1_all.deb 1 SHA256:{digest}"):
        with pytest.raises(PackagesUnavailable, match="SHA-256"):
            parse_uris(line)


@pytest.mark.parametrize(("count", "slots"), [(55, 55), (55, 1), (56, 55), (3, 9), (106, 7)])
def test_packages_are_spread_in_order_and_evenly(count: int, slots: int) -> None:
    parts = spread(count, slots)
    assert [index for part in parts for index in part] == list(range(count))
    assert len(parts) == min(count, slots)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_more_layers_ask_for_more_packages() -> None:
    few, more, most = goals(60), goals(80), goals(1000)
    assert set(few) < set(more) < set(most)


def test_number_of_layers_has_bounds(tmp_path: Path) -> None:
    for layers in (4, 1001):
        with pytest.raises(UsageError, match=f"{layers} layers"):
            build_demo(str(tmp_path / "out"), layers=layers, cache=str(tmp_path / "cache"))
    assert os.listdir(tmp_path) == []


def test_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache() == "/somewhere/flatmount/demo"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/x")
    assert default_cache() == "/home/x/.cache/flatmount/demo"


# Without apt


def _elf(*kinds: int) -> bytes:
    """An ELF64 header, little endian, with program headers of the given kinds."""
    head = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, len(kinds))
    return head.ljust(64, b"\0") + b"".join(struct.pack("<I", kind).ljust(56, b"\0") for kind in kinds)


def test_static_programs_are_told_from_others() -> None:
    assert not needs_libraries(_elf(1, 6))
    assert needs_libraries(_elf(1, 3))
    for broken in (b"", b"#!/bin/sh\n", _elf(1, 3)[:70], b"\x7fELX" + _elf(1)[4:]):
        assert needs_libraries(broken)


@pytest.fixture
def only_busybox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH with nothing but a busybox that is static, runs, and has three applets."""
    tools = tmp_path / "tools"
    tools.mkdir()
    source = tmp_path / "busybox.c"
    source.write_text(
        "#include <stdio.h>\n"
        "int main(int argc, char **argv) {\n"
        '\tputs(argc > 1 ? "[\\nbusybox\\nls\\nsh" : "BusyBox v1.0 (x) y");\n'
        "\treturn 0;\n}\n"
    )
    subprocess.run(["cc", "-static", "-o", tools / "busybox", source], check=True)
    monkeypatch.setenv("PATH", str(tools))


@pytest.mark.usefixtures("only_busybox")
@pytest.mark.parametrize("layers", [5, 6, 40])
def test_busybox_stands_in_and_says_so(tmp_path: Path, layers: int) -> None:
    image = build_demo(str(tmp_path / "out"), layers=layers, cache=str(tmp_path / "cache"))
    assert (image.source, image.packages, image.layers) == (Source.BUSYBOX, ("BusyBox v1.0",), layers)
    assert image.why_not_packages == "there is no apt-get on this machine"
    config, archives = image_of(image.path)
    assert len(archives) == len(config["history"]) == layers
    tree = merge(archives)
    _check_changes(tree)
    assert tree["bin/busybox"].data[:4] == b"\x7fELF"
    assert {tree[f"bin/{name}"].info.linkname for name in ("[", "ls", "sh")} == {"busybox"}
    again = build_demo(str(tmp_path / "again"), layers=layers, cache=str(tmp_path / "cache"))
    assert again.manifest_digest == image.manifest_digest


def test_neither_apt_nor_busybox_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingFeature, match="no apt-get on this machine, and there is no busybox") as caught:
        build_demo(str(tmp_path / "out"), layers=5, cache=str(tmp_path / "cache"))
    assert "busybox-static" in caught.value.hint
    assert os.listdir(tmp_path) == []


# With apt, and packages of our own


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with every goal as a tiny package of a system with merged /usr, and apt configured for it alone."""
    pool = tmp_path / "pool"
    pool.mkdir()
    contents = {
        "base-files": {"usr/share/base-files/motd": "hello\n", "usr/share/man/man1/old": "x", "etc/issue": "base\n"},
        "base-passwd": {
            "usr/share/base-passwd/passwd.master": "root:*:0:0:root:/root:/bin/bash\n",
            "usr/share/base-passwd/group.master": "root:*:0:\n",
        },
        "bash": {"bin/bash": "bash", "usr/share/man/man1/bash.1": "x"},
    }
    stanzas = [
        _package(tmp_path, pool, name, contents.get(name, {f"usr/lib/{name}": name}), merged=name == "base-files")
        for name in goals(5)
    ]
    (pool / "Packages").write_text("\n".join(stanzas))
    (tmp_path / "sources.list").write_text(f"deb [trusted=yes] copy:{pool} ./\n")
    (tmp_path / "apt.conf").write_text(
        f'Dir::Etc::SourceList "{tmp_path}/sources.list";\nDir::Etc::SourceParts "/dev/null";\n'
        f'APT::Update::Post-Invoke {{ "touch {tmp_path}/hook-ran"; }};\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    return pool


def _package(base: Path, pool: Path, name: str, files: dict[str, str], *, merged: bool) -> str:
    tree = base / "build" / name
    for path, text in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
    if merged:
        (tree / "usr/bin").mkdir()
        (tree / "bin").symlink_to("usr/bin")
    control = f"Package: {name}\nVersion: 1:1.0\nArchitecture: all\nMaintainer: x <x@x.example>\nDescription: x\n"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(control)
    os.utime(tree, (0, 0))
    made = pool / f"{name}.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, made], check=True, capture_output=True)
    data = made.read_bytes()
    return f"{control}Filename: ./{made.name}\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n"


@needs_apt
def test_packages_become_layers_with_the_links_of_merged_usr(tmp_path: Path, repository: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    cache = str(tmp_path / "cache")
    image = build_demo(
        str(tmp_path / "out"), layers=20, cache=cache, progress=lambda *step: steps.append(step), name="mine"
    )
    assert (image.source, image.why_not_packages, image.generated_layers) == (Source.DEBIAN, "", 20 - len(goals(5)))
    assert image.packages[0] == "base-files 1:1.0" and len(image.packages) == len(goals(5))
    assert steps[-1] == ("layers written", 20, 20)
    assert not (tmp_path / "hook-ran").exists()
    config, archives = image_of(image.path)
    tree = merge(archives)
    _check_changes(tree)
    assert tree["bin"].info.issym() and tree["usr/bin/bash"].data == b"bash"
    assert tree["etc/motd"].data == b"hello\n" and tree["etc/issue"].data == b"flatmount demo image\n"
    assert tree["etc/passwd"].data.startswith(b"root:x:0:0:root:/root:/bin/bash\napp:x:1000:")
    assert "usr/share/man/man1/old" not in tree and "usr/share/man/README" in tree
    titles = [step["created_by"].removeprefix("flatmount image demo: ") for step in config["history"]]
    assert titles[0] == "base-files 1:1.0" and "early trim" in titles
    assert titles[-3:] == ["trim", "replace", "restore"]
    assert config["config"]["Cmd"] == ["/bin/sh"] and config["os"] == "linux"


@needs_apt
def test_cache_is_used_and_checked(tmp_path: Path, repository: Path) -> None:
    cache = tmp_path / "cache"
    first = build_demo(str(tmp_path / "out"), layers=5, cache=str(cache))
    assert sorted(os.listdir(cache)) == ["apt", "lock", "packages"]
    kept = {path.name: path.stat().st_ino for path in (cache / "packages").iterdir()}
    (cache / "packages/bash_1%3a1.0_all.deb").write_bytes(b"tampered")
    (cache / "packages/sed_1%3a1.0_all.deb").unlink()
    again = build_demo(str(tmp_path / "out"), layers=5, cache=str(cache))
    assert again.manifest_digest == first.manifest_digest
    now = {path.name: path.stat().st_ino for path in (cache / "packages").iterdir()}
    assert now.keys() == kept.keys()
    assert {name for name in now if now[name] != kept[name]} <= {"bash_1%3a1.0_all.deb", "sed_1%3a1.0_all.deb"}


@needs_apt
def test_packages_that_cannot_be_fetched_are_told(
    tmp_path: Path, repository: Path, only_busybox: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{os.defpath}")
    (repository / "sed.deb").write_bytes(b"another")
    image = build_demo(str(tmp_path / "out"), layers=5, cache=str(tmp_path / "cache"))
    assert image.source is Source.BUSYBOX
    assert "after apt-get update" in image.why_not_packages
    assert os.listdir(image.path) != []
