"""Whole trees: merging, removing without leaving, copying with other owners."""

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from images import directory, file, layout_of, symlink
from own_namespace import MS_BIND, in_own_namespace, mount, umount
from trees import facts, listing

from flatmount.errors import MappingError
from flatmount.kernel.tree import copy_tree, create_file, flatten, remove_tree
from flatmount.plan.mapping import Mapping
from flatmount.store import Store


@pytest.fixture
def base(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def fill(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)
    return path


@pytest.mark.parametrize("size", [0, 1, 4097, 1 << 20])
def test_a_file_is_made_in_one_go(tmp_path: Path, base: int, size: int) -> None:
    data = os.urandom(size)
    before = os.umask(0o077)
    try:
        create_file(base, b"f", memoryview(data), owner=(1234, 70000), mode=0o6755, mtime_ns=1_500_000_000_123_456_789)
        create_file(base, b"early", data, owner=(0, 0), mode=0o600, mtime_ns=-1)
    finally:
        os.umask(before)
    made, early = os.stat(tmp_path / "f"), os.stat(tmp_path / "early")
    assert Path(tmp_path, "f").read_bytes() == data
    assert (stat.S_IMODE(made.st_mode), made.st_uid, made.st_gid) == (0o6755, 1234, 70000)
    assert made.st_mtime_ns == made.st_atime_ns == 1_500_000_000_123_456_789
    assert (stat.S_IMODE(early.st_mode), early.st_uid, early.st_gid, early.st_mtime_ns) == (0o600, 0, 0, -1)


def test_a_file_is_made_nowhere_else(tmp_path: Path, base: int) -> None:
    (tmp_path / "there").write_text("before")
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "d").mkdir()
    wanted = {
        b"there": errno.EEXIST,
        b"link": errno.EEXIST,
        b"d": errno.EEXIST,
        b"d/f": errno.EINVAL,
        b"../f": errno.EINVAL,
        b"/tmp/f": errno.EINVAL,
        b"..": errno.EINVAL,
        b".": errno.EINVAL,
        b"": errno.EINVAL,
        b"n" * 256: errno.ENAMETOOLONG,
    }
    before = listing(str(tmp_path))
    for name, number in wanted.items():
        with pytest.raises(OSError) as refusal:
            create_file(base, name, b"x", owner=(0, 0), mode=0o644, mtime_ns=0)
        assert refusal.value.errno == number, name
    with pytest.raises(ValueError, match="null"):
        create_file(base, b"a\0b", b"x", owner=(0, 0), mode=0o644, mtime_ns=0)
    assert listing(str(tmp_path)) == before
    assert (tmp_path / "there").read_text() == "before"


def test_a_full_disk_is_said_and_closes_the_file(ram: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=256k", ram], check=True)
    directory_fd = os.open(ram, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(OSError) as refusal:
            create_file(directory_fd, b"f", bytes(1 << 20), owner=(0, 0), mode=0o644, mtime_ns=0)
        assert refusal.value.errno == errno.ENOSPC
    finally:
        os.close(directory_fd)


def test_a_thousand_layers(tmp_path: Path) -> None:
    layers = [
        [file(f"d/{n}", str(n)), file("top", str(n)), directory(f"e{n % 7}", mode=0o700 + n % 8)] for n in range(1000)
    ]
    with Store.open(str(tmp_path / "store"), create=True) as store:
        image = store.import_image(layout_of(str(tmp_path / "layout"), layers, ""))
        flat = os.path.join(store.data, store.ensure_flat(image))
    assert len(os.listdir(os.path.join(flat, "d"))) == 1000
    assert Path(flat, "top").read_text() == "999"
    assert [oct(os.stat(os.path.join(flat, f"e{n}")).st_mode & 0o777) for n in range(7)] == [
        oct(0o700 + max(k for k in range(1000) if k % 7 == n) % 8) for n in range(7)
    ]


@pytest.mark.timeout(120)
def test_an_inode_that_has_all_its_links_is_copied(tmp_path: Path, base: int) -> None:
    """ext4 ends at 65,000 and tmpfs has no end, so that the place decides what is seen here."""
    layer = tmp_path / "layer"
    layer.mkdir()
    first = layer / "f"
    first.write_text("data")
    os.chmod(first, 0o4711)
    os.utime(first, ns=(1, 2))
    links = tmp_path / "links"
    links.mkdir()
    made = 1
    try:
        while made < 65_100:
            os.link(first, links / str(made))
            made += 1
    except OSError as error:
        assert error.errno == errno.EMLINK
    done = flatten(base, ["layer"], "flat")
    assert (done.links, done.copies) == ((0, 1) if made < 65_100 else (1, 0))
    before, after = facts(str(layer))["f"], facts(str(tmp_path / "flat"))["f"]
    del before["links"], after["links"]
    assert before == after


def test_a_target_that_exists_is_left_alone(tmp_path: Path, base: int) -> None:
    fill(tmp_path / "layer", "a")
    fill(tmp_path / "flat", "mine")
    with pytest.raises(FileExistsError, match="flat"):
        flatten(base, ["layer"], "flat")
    assert listing(str(tmp_path / "flat")) == ["mine"]


@in_own_namespace
def test_a_mount_in_a_layer_is_not_entered(tmp_path_factory: pytest.TempPathFactory) -> None:
    here = tmp_path_factory.mktemp("mounted")
    fill(here / "layer", "d/a")
    fill(here / "other", "secret")
    fd = os.open(here, os.O_RDONLY)
    mount(str(here / "other"), str(here / "layer/d"), flags=MS_BIND)
    try:
        with pytest.raises(OSError, match="d") as caught:
            flatten(fd, ["layer"], "flat")
        assert caught.value.errno == errno.EXDEV
    finally:
        umount(str(here / "layer/d"))
        os.close(fd)


@in_own_namespace
def test_nothing_is_removed_through_a_mount(tmp_path_factory: pytest.TempPathFactory) -> None:
    here = tmp_path_factory.mktemp("mounted")
    fill(here / "tree", "a/b/c", "a/point/x", "z")
    fill(here / "other", "sentinel")
    fd = os.open(here, os.O_RDONLY)
    try:
        for name, code in (("other", errno.EXDEV), ("tree/a/b", errno.EXDEV)):
            # A bind mount of another directory, and one of the same tree: same device, another mount.
            mount(str(here / name), str(here / "tree/a/point"), flags=MS_BIND)
            fill(here / "tree", "z")
            with pytest.raises(OSError, match="a/point") as caught:
                remove_tree(fd, "tree")
            assert caught.value.errno == code
            umount(str(here / "tree/a/point"))
            assert (here / "other/sentinel").read_text() == "sentinel"
            fill(here / "tree", "a/b/c")
        remove_tree(fd, "tree")
        assert os.listdir(here) == ["other"]
    finally:
        os.close(fd)


def test_no_link_is_followed_out_of_a_tree(tmp_path: Path, base: int) -> None:
    fill(tmp_path / "outside", "kept")
    fill(tmp_path / "tree", "a")
    (tmp_path / "tree/link").symlink_to(tmp_path / "outside")
    (tmp_path / "tree2").symlink_to(tmp_path / "outside")
    assert remove_tree(base, "tree").entries == 3
    assert remove_tree(base, "tree2").entries == 1
    with pytest.raises(FileNotFoundError):
        remove_tree(base, "tree")
    assert listing(str(tmp_path)) == ["outside", "outside/kept"]


def test_a_tree_deeper_than_any_path_is_removed(tmp_path: Path, base: int) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    fd = os.open(tree, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("deep", dir_fd=fd)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=fd))
        inner = os.open("deep", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    assert remove_tree(base, "tree").entries == 6001
    assert os.listdir(tmp_path) == []


def test_what_a_removal_frees(tmp_path: Path, base: int) -> None:
    tree = fill(tmp_path / "tree", "kept")
    (tree / "big").write_bytes(bytes(range(256)) * 4096)
    os.link(tree / "kept", tmp_path / "other-name")
    os.sync()
    done = remove_tree(base, "tree")
    assert done.entries == 3
    assert 1 << 20 <= done.size_bytes < 2 << 20


def acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def test_a_copy_with_other_owners(tmp_path: Path) -> None:
    tree, copy = tmp_path / "tree", tmp_path / "copy"
    fill(tree, "d/a", "d/cap", "acl")
    os.link(tree / "d/a", tree / "same")
    os.symlink("/nowhere", tree / "link")
    os.mkfifo(tree / "pipe")
    os.mknod(tree / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.chown(tree / "d/a", 1000, 5)
    os.chmod(tree / "d/a", 0o6755)
    os.chown(tree / "link", 7, 8, follow_symlinks=False)
    os.setxattr(tree / "d/cap", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    undefined = 0xFFFFFFFF
    os.setxattr(
        tree / "acl",
        "system.posix_acl_access",
        acl((1, 6, undefined), (2, 4, 33), (4, 4, undefined), (8, 4, 44), (16, 4, undefined), (32, 4, undefined)),
    )
    with open(tree / "sparse", "wb") as sparse:
        sparse.truncate(64 << 20)
        sparse.seek(32 << 20)
        sparse.write(b"middle")
    os.utime(tree / "d", ns=(1, 1_000_000_007))
    copy.mkdir()
    from_fd, to_fd = os.open(tree, os.O_RDONLY), os.open(copy, os.O_RDONLY)
    try:
        assert copy_tree(from_fd, to_fd, Mapping.single(100_000)) == 9
    finally:
        os.close(from_fd)
        os.close(to_fd)
    before, after = facts(str(tree)), facts(str(copy))
    assert after["d/cap"]["xattrs"].pop("security.capability")[20:] == struct.pack("<I", 100_000)
    assert after["acl"]["xattrs"].pop("system.posix_acl_access") == acl(
        (1, 6, undefined),
        (2, 4, 100_033),
        (4, 4, undefined),
        (8, 4, 100_044),
        (16, 4, undefined),
        (32, 4, undefined),
    )
    del before["d/cap"]["xattrs"]["security.capability"]
    del before["acl"]["xattrs"]["system.posix_acl_access"]
    for found in before.values():
        found["owner"] = tuple(100_000 + owner for owner in found["owner"])
    assert before == after
    assert os.stat(copy / "sparse").st_blocks < 1024


def test_a_copy_needs_a_mapping_for_every_owner(tmp_path: Path) -> None:
    layers = [[directory("d"), file("d/f", uid=70_000), symlink("l", "d")]]
    with Store.open(str(tmp_path / "store"), create=True) as store:
        image = store.import_image(layout_of(str(tmp_path / "layout"), layers))
        with pytest.raises(MappingError, match="uid 70000"):
            store.ensure_shifted(image, Mapping.single(100_000))
        wide = Mapping.single(100_000, 100_000)
        shifted = store.ensure_shifted(image, wide)
        assert store.ensure_shifted(image, wide) == shifted
        found = facts(os.path.join(store.data, shifted))
        assert found["d/f"]["owner"] == (170_000, 100_000)
        assert found["."]["owner"] == (100_000, 100_000)
        store.remove_image(image.digest)
        assert os.listdir(os.path.join(store.data, "shifted")) == []
    tree = tmp_path / "tree"
    fill(tree, "a")
    os.chown(tree / "a", 70_000, 0)
    (tmp_path / "copy").mkdir()
    from_fd, to_fd = os.open(tree, os.O_RDONLY), os.open(tmp_path / "copy", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="'a'") as caught:
            copy_tree(from_fd, to_fd, Mapping.single(100_000))
        assert caught.value.errno == errno.EOVERFLOW
    finally:
        os.close(from_fd)
        os.close(to_fd)
