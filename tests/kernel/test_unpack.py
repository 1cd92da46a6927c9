"""Layers with everything that images contain and everything that hostile ones try."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from images import Node, archive, char, directory, file, hardlink, layout_of, symlink
from own_namespace import in_own_namespace, mount, umount
from trees import facts, listing

from flatmount.errors import BadImage
from flatmount.store import Store, StoredImage

MARK = "trusted.overlay.opaque"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(str(tmp_path / "store"), create=True) as opened:
        yield opened


def imported(store: Store, tmp_path: Path, *layers: list[Node] | bytes) -> StoredImage:
    count = len(os.listdir(tmp_path))
    return store.import_image(layout_of(str(tmp_path / f"layout{count}"), list(layers)))


def tree(store: Store, image: StoredImage) -> str:
    return os.path.join(store.data, store.ensure_flat(image))


def layer(store: Store, image: StoredImage, position: int) -> str:
    return os.path.join(store.data, image.layers[position].path)


def content(path: str) -> str:
    with open(path, encoding="utf-8") as opened:
        return opened.read()


def is_whiteout(path: str) -> bool:
    status = os.lstat(path)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def test_an_entry_keeps_everything(store: Store, tmp_path: Path) -> None:
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    image = imported(
        store,
        tmp_path,
        [
            directory("./", 0o750, uid=3, mtime=1000.000000005),
            directory("d", 0o1777, uid=7, gid=8, mtime=1_500_000_000.25),
            file("d/su", "x", mode=0o6755, uid=1000, gid=70000, pax={"mtime": "1500000000.123456789"}),
            file("d/ping", "y", mode=0o755, pax={"SCHILY.xattr.security.capability": capability.decode("latin-1")}),
            file("d/user", pax={"SCHILY.xattr.user.comment": "hello"}),
            hardlink("d/same", "d/su"),
            symlink("d/dangling", "../../../nowhere", uid=5, gid=6),
            char("d/null", 1, 3),
            Node("d/disk", b"4", mode=0o660, device=(8, 1), gid=6),
            Node("d/pipe", b"6", mode=0o600, uid=9),
            file("d/" + "ü" * 127, "unicode"),
        ],
    )
    found = facts(tree(store, image))
    assert found["."]["mode"] == oct(stat.S_IFDIR | 0o750)
    assert found["d"]["mode"] == oct(stat.S_IFDIR | 0o1777)
    assert found["d"]["owner"] == (7, 8)
    assert found["d"]["mtime_ns"] == 1_500_000_000_250_000_000
    assert found["d/su"]["mode"] == oct(stat.S_IFREG | 0o6755)
    assert found["d/su"]["owner"] == (1000, 70000)
    assert found["d/su"]["mtime_ns"] == 1_500_000_000_123_456_789
    assert found["d/su"]["links"] == ["d/same", "d/su"]
    assert found["d/ping"]["xattrs"] == {"security.capability": capability}
    assert found["d/user"]["xattrs"] == {"user.comment": b"hello"}
    assert found["d/dangling"]["target"] == "../../../nowhere"
    assert found["d/dangling"]["owner"] == (5, 6)
    assert found["d/null"]["device"] == os.makedev(1, 3)
    assert found["d/disk"]["device"] == os.makedev(8, 1)
    assert stat.S_ISFIFO(os.lstat(os.path.join(tree(store, image), "d/pipe")).st_mode)
    assert "d/" + "ü" * 127 in found
    assert image.root.mode == 0o750
    assert image.root.uid == 3
    assert image.owners.uids == ((0, 0), (3, 3), (5, 5), (7, 7), (9, 9), (1000, 1000))
    assert image.owners.gids == ((0, 0), (6, 6), (8, 8), (70000, 70000))
    assert image.files == 9


def test_small_and_large_files_come_out_alike(store: Store, tmp_path: Path) -> None:
    """Up to a mebibyte a file is made in one go, beyond it piece by piece; a large layer is read ahead."""
    sizes = [0, 1, 511, 512, 513, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20]
    contents = {f"f{size}": os.urandom(size) for size in sizes}
    nodes = [
        file(name, data, mode=0o4751, uid=1000, gid=70000, pax={"mtime": "1500000000.123456789"})
        for name, data in contents.items()
    ]
    image = imported(store, tmp_path, nodes)
    for name, data in contents.items():
        path = Path(layer(store, image, 0), name)
        status = path.stat()
        assert path.read_bytes() == data
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o4751, 1000, 70000)
        assert status.st_mtime_ns == 1_500_000_000_123_456_789
    assert not store.check().findings


def test_a_large_layer_that_is_cut_or_forged_leaves_nothing(store: Store, tmp_path: Path) -> None:
    """Read ahead, so that what is wrong is met on another thread than the one that makes files."""
    data = archive([file("f", os.urandom(6 << 20)), file("g", "g")])
    for number, layout_data in enumerate((data[: 5 << 20], data[: 6 << 20] + b"x" * 4096)):
        with pytest.raises(BadImage, match="layer sha256:"):
            store.import_image(layout_of(str(tmp_path / f"bad{number}"), [layout_data], ""))
    good = layout_of(str(tmp_path / "good"), [data], "")
    (blob,) = (path for path in Path(good, "blobs/sha256").iterdir() if path.stat().st_size > 1 << 20)
    changed = bytearray(blob.read_bytes())
    changed[3 << 20] ^= 1
    blob.write_bytes(changed)
    with pytest.raises(BadImage, match="another digest"):
        store.import_image(good)
    assert not os.listdir(os.path.join(store.data, "layers")) and not os.listdir(os.path.join(store.data, "staging"))
    assert not [thread for thread in threading.enumerate() if thread.name == "flatmount-ahead"]


def test_a_setgid_directory_does_not_lend_its_group(store: Store, tmp_path: Path) -> None:
    image = imported(store, tmp_path, [directory("d", 0o2775, gid=50), file("d/a"), directory("d/e")])
    found = facts(tree(store, image))
    assert found["d"]["mode"] == oct(stat.S_IFDIR | 0o2775)
    assert found["d/a"]["owner"] == (0, 0)
    assert found["d/e"]["mode"] == oct(stat.S_IFDIR | 0o755)


def test_a_sparse_file_stays_sparse(store: Store, tmp_path: Path) -> None:
    size = 1 << 30
    pax = {"GNU.sparse.map": f"4096,5,{size - 4},4", "GNU.sparse.size": str(size), "GNU.sparse.name": "s"}
    image = imported(store, tmp_path, [file("x", b"firstlast", pax=pax, mode=0o640)])
    path = os.path.join(tree(store, image), "s")
    status = os.stat(path)
    assert (status.st_size, stat.S_IMODE(status.st_mode)) == (size, 0o640)
    assert status.st_blocks * 512 < 1 << 20
    with open(path, "rb") as opened:
        assert opened.read(4096 + 6) == bytes(4096) + b"first\0"
        opened.seek(size - 5)
        assert opened.read() == b"\0last"


def test_a_whiteout_hides_lower_names_only(store: Store, tmp_path: Path) -> None:
    image = imported(
        store,
        tmp_path,
        [file("a", "1"), file("d/x", "1"), file("e/y", "1"), file("keep")],
        [
            file(".wh.a"),
            file("d/z", "2"),
            file(".wh.d"),
            file(".wh.e"),
            file("e/n", "2"),
            file(".wh.never"),
            file("b"),
            file(".wh.b"),
        ],
    )
    assert listing(tree(store, image)) == ["b", "d", "d/z", "e", "e/n", "keep"]
    assert is_whiteout(os.path.join(layer(store, image, 1), "a"))
    assert not os.path.lexists(os.path.join(layer(store, image, 1), "never"))
    assert os.getxattr(os.path.join(layer(store, image, 1), "d"), MARK) == b"y"


@pytest.mark.parametrize("first", [True, False])
def test_whiteouts_beneath_a_directory_that_became_a_file(store: Store, tmp_path: Path, first: bool) -> None:
    hidden, now = file("d/.wh.old"), file("d", "a file")
    image = imported(
        store, tmp_path, [file("d/old"), file("e")], [hidden, now] if first else [now, hidden], [file("e/.wh.x")]
    )
    assert listing(tree(store, image)) == ["d", "e"]


@pytest.mark.parametrize("first", [True, False])
def test_an_opaque_marker_works_wherever_it_comes(store: Store, tmp_path: Path, first: bool) -> None:
    marker, entries = file("d/.wh..wh..opq"), [file("d/new"), directory("d/sub"), file("d/sub/new")]
    upper = [directory("d"), *([marker, *entries] if first else [*entries, marker])]
    image = imported(store, tmp_path, [file("d/old"), file("d/sub/old")], upper)
    assert listing(tree(store, image)) == ["d", "d/new", "d/sub", "d/sub/new"]


def test_an_opaque_directory_has_no_whiteouts(store: Store, tmp_path: Path) -> None:
    image = imported(store, tmp_path, [file("d/old")], [file("d/.wh.old"), file("d/.wh..wh..opq")])
    assert listing(layer(store, image, 1)) == ["d"]


def test_an_opaque_root_hides_all_that_was(store: Store, tmp_path: Path) -> None:
    image = imported(
        store, tmp_path, [file("a"), file("d/old"), file("e/old")], [file("d/new"), file(".wh..wh..opq"), file("b")]
    )
    assert listing(tree(store, image)) == ["b", "d", "d/new"]
    assert is_whiteout(os.path.join(layer(store, image, 1), "e"))


def test_a_file_that_becomes_a_directory_hides_the_lower_one(store: Store, tmp_path: Path) -> None:
    image = imported(store, tmp_path, [file("d/old")], [file("d", "now a file"), directory("d"), file("d/new")])
    assert listing(tree(store, image)) == ["d", "d/new"]


def test_a_directory_that_becomes_a_file_takes_its_content_along(store: Store, tmp_path: Path) -> None:
    image = imported(store, tmp_path, [file("d/old"), file("d/e/f"), file("d", "x")])
    assert listing(tree(store, image)) == ["d"]


def test_a_missing_parent_is_the_one_beneath(store: Store, tmp_path: Path) -> None:
    lower = directory("d", 0o700, uid=4, gid=5, mtime=1_400_000_000, pax={"SCHILY.xattr.user.k": "v"})
    image = imported(store, tmp_path, [lower], [file("d/new")])
    found = facts(tree(store, image))["d"]
    assert found["mode"] == oct(stat.S_IFDIR | 0o700)
    assert found["owner"] == (4, 5)
    assert found["mtime_ns"] == 1_400_000_000_000_000_000
    assert found["xattrs"] == {"user.k": b"v"}


def test_names_go_through_links_of_the_image_only(store: Store, tmp_path: Path) -> None:
    image = imported(
        store,
        tmp_path,
        [directory("usr/bin"), symlink("bin", "usr/bin"), symlink("abs", "/usr"), symlink("up", "../../../../usr/bin")],
        [file("bin/one", "1"), file("abs/two", "2"), file("up/three", "3"), file("bin/.wh.gone")],
    )
    assert listing(tree(store, image)) == [
        "abs",
        "bin",
        "up",
        "usr",
        "usr/bin",
        "usr/bin/one",
        "usr/bin/three",
        "usr/two",
    ]


def test_a_directory_over_a_lower_link_replaces_it(store: Store, tmp_path: Path) -> None:
    image = imported(
        store,
        tmp_path,
        [symlink("l", "there"), file("there/x")],
        [file("l/first"), directory("l"), file("l/second")],
    )
    assert listing(tree(store, image)) == ["l", "l/second", "there", "there/first", "there/x"]


def test_a_hard_link_into_a_lower_layer_is_the_same_file(store: Store, tmp_path: Path) -> None:
    image = imported(store, tmp_path, [file("a", "data", uid=5)], [hardlink("d/b", "a")])
    assert facts(tree(store, image))["a"]["links"] == ["a", "d/b"]
    assert image.layers[1].size_bytes == 0


def test_a_hard_link_between_deep_directories(store: Store, tmp_path: Path) -> None:
    one, two = "/".join(["a"] * 200), "/".join(["b"] * 200)
    image = imported(store, tmp_path, [file(f"{one}/f", "x"), file("c/f", "y"), hardlink(f"{two}/g", f"{one}/f")])
    assert facts(tree(store, image))[f"{one}/f"]["links"] == [f"{one}/f", f"{two}/g"]


def test_a_replaced_target_leaves_the_other_names_alone(store: Store, tmp_path: Path) -> None:
    image = imported(store, tmp_path, [file("a", "1"), hardlink("b", "a"), file("a", "2"), hardlink("b", "b")])
    root = tree(store, image)
    assert content(os.path.join(root, "a")) == "2"
    assert content(os.path.join(root, "b")) == "1"


def test_overlay_attributes_of_an_image_mean_nothing(store: Store, tmp_path: Path) -> None:
    pax = {f"SCHILY.xattr.{name}": "y" for name in ("trusted.overlay.opaque", "user.overlay.redirect", "user.mine")}
    image = imported(store, tmp_path, [file("d/old")], [directory("d", pax=pax)])
    assert image.dropped_xattrs == 2
    assert facts(layer(store, image, 1))["d"]["xattrs"] == {"user.mine": b"y"}
    assert "d/old" in listing(tree(store, image))


HOSTILE = {
    "dotdot": [file("../escape")],
    "dotdot inside": [file("a/../../escape")],
    "dotdot last": [directory("a/..")],
    "empty name": [Node("", data=b"x")],
    "NUL in a PAX name": [file("x", pax={"path": "a\0b"})],
    "name too long": [file("x", pax={"path": "/".join(["a" * 200] * 30)})],
    "component too long": [file("x", pax={"path": "a" * 256})],
    "too deep": [file("/".join(["d"] * 300))],
    "root as a link": [symlink("./", "/etc")],
    "root as a file": [Node(".", data=b"x")],
    "parent is a file": [file("a"), file("a/b")],
    "loop of links": [symlink("a", "b"), symlink("b", "a"), file("a/c")],
    "link to nothing": [hardlink("a", "nothing")],
    "link outside": [hardlink("a", "../../etc/passwd")],
    "link to a directory": [directory("d"), hardlink("a", "d")],
    "link to a whiteout": [hardlink("a", ".wh.b")],
    "whiteout of nothing": [file(".wh.")],
    "whiteout of .": [file(".wh..")],
    "whiteout of ..": [file("d/.wh...")],
    "beneath a whiteout": [file(".wh.d/x")],
    "posing as a whiteout": [char("a", 0, 0)],
    "no such device": [char("a", 5000, 1)],
    "owner without an id": [file("a", pax={"uid": "4294967295"})],
    "owner past 32 bits": [file("a", pax={"gid": "99999999999"})],
    "attribute without a name": [file("a", pax={"SCHILY.xattr.": "v"})],
    "attribute of no class": [file("a", pax={"SCHILY.xattr.trusted": "v"})],
    "link without a target": [Node("a", b"2")],
}


@pytest.mark.parametrize("nodes", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_entry_is_named_and_nothing_stays(store: Store, tmp_path: Path, nodes: list[Node]) -> None:
    (tmp_path / "escape").write_text("before")
    with pytest.raises(BadImage, match=r"layer sha256:[0-9a-f]{64}: entry|layer sha256:[0-9a-f]{64}: tar entry"):
        imported(store, tmp_path, [file("ok"), *nodes])
    assert store.images() == ()
    for name in ("layers", "staging", "trash"):
        assert os.listdir(os.path.join(store.data, name)) == []
    assert os.listdir(os.path.join(store.root, "v1/entries")) == []
    assert (tmp_path / "escape").read_text() == "before"


def test_links_out_of_the_image_lead_into_it(store: Store, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_text("before")
    image = imported(
        store,
        tmp_path,
        [symlink("out", str(outside)), file("out/victim", "after"), symlink("lib", "/../../.."), file("lib/x", "1")],
        [file("out/.wh.victim"), file("out/new", "2")],
    )
    assert (outside / "victim").read_text() == "before"
    assert os.listdir(outside) == ["victim"]
    assert "x" in listing(tree(store, image))


@pytest.mark.timeout(60)
@in_own_namespace
def test_the_flat_tree_is_what_overlayfs_shows(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Random chains: overlayfs over the layers, the flat tree at once and the flat tree step by step agree."""
    base = tmp_path_factory.mktemp("oracle")
    mount("tmpfs", str(base), "tmpfs", options="mode=700")
    try:
        rounds = iter(range(1000))

        @settings(
            max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
        )
        @given(st.lists(st.lists(nodes_of_a_layer, max_size=8), min_size=1, max_size=4))
        def agree(layers: list[list[Node]]) -> None:
            here = base / str(next(rounds))
            here.mkdir()
            compare(here, layers)

        agree()
    finally:
        umount(str(base), 2)


names = st.sampled_from(["a", "b", "d", "d/a", "d/b", "d/e", "d/e/a", "d/e/f/a", "l/a", "l/e"])
whiteouts = st.sampled_from(
    [".wh.a", ".wh.d", "d/.wh.a", "d/.wh.e", "d/.wh..wh..opq", "d/e/.wh..wh..opq", ".wh..wh..opq"]
)
nodes_of_a_layer = st.one_of(
    st.builds(file, names, st.sampled_from(["1", "2"]), mode=st.sampled_from([0o600, 0o4755])),
    st.builds(directory, names, st.sampled_from([0o700, 0o755]), uid=st.integers(0, 3)),
    st.builds(symlink, st.sampled_from(["l", "d/l", "b"]), st.sampled_from(["d", "/d/e", "../d", "nowhere"])),
    st.builds(file, whiteouts),
    st.builds(hardlink, names, names),
)


def compare(here: Path, layers: list[list[Node]]) -> None:
    with Store.open(str(here / "store"), create=True) as store:
        try:
            image = store.import_image(layout_of(str(here / "layout"), layers, ""))
        except BadImage:
            return
        flat = facts(tree(store, image))
        lowers = ":".join(os.path.join(store.data, found.path) for found in reversed(image.layers))
        empty, target = here / "empty", here / "merged"
        empty.mkdir()
        target.mkdir()
        mount("overlay", str(target), "overlay", options=f"ro,lowerdir={lowers}:{empty}")
        try:
            merged = facts(str(target))
        finally:
            umount(str(target))
        for found in (flat, merged):
            del found["."]
        assert flat == merged
    with Store.open(str(here / "steps"), create=True) as store:
        for count in range(1, len(layers) + 1):
            part = store.import_image(layout_of(str(here / f"step{count}"), layers[:count], ""))
            stepwise = facts(tree(store, part))
        del stepwise["."]
        assert stepwise == flat
