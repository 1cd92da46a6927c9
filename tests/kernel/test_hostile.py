"""Attacks and faults that no other test tries; docs/attacks.md lists them all with the test that shows each."""

from __future__ import annotations

import errno
import fcntl
import gzip
import io
import json
import os
import resource
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import images as make
import pytest
import zstandard
from images import Node, archive, directory, file, hardlink, layout_of, symlink
from trees import facts, listing

from flatmount.errors import BadImage, FlatmountError, StoreError
from flatmount.kernel.probes import probe
from flatmount.plan.mapping import Mapping
from flatmount.rootfs import assemble
from flatmount.rootfs.assembler import Assembler
from flatmount.rootfs.image import choose_for, specification
from flatmount.rootfs.ranges import RangePool
from flatmount.store import FlatForm, Store, StoredImage
from flatmount.store import unpack as unpacking
from flatmount.strategies import STRATEGIES, Upper


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(str(tmp_path / "store"), create=True) as opened:
        yield opened


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Something that no image may reach."""
    place = tmp_path / "outside"
    place.mkdir()
    (place / "victim").write_text("before")
    os.chmod(place / "victim", 0o640)
    return place


def untouched(outside: Path) -> bool:
    victim = outside / "victim"
    status = victim.stat()
    return (
        os.listdir(outside) == ["victim"]
        and victim.read_text() == "before"
        and (stat.S_IMODE(status.st_mode), status.st_nlink, status.st_uid) == (0o640, 1, 0)
    )


def imported(store: Store, tmp_path: Path, *layers: list[Node] | bytes, packing: str = "+gzip") -> StoredImage:
    count = len(os.listdir(tmp_path))
    return store.import_image(layout_of(str(tmp_path / f"layout{count}"), list(layers), packing))


def tree(store: Store, image: StoredImage) -> str:
    return os.path.join(store.data, store.ensure_flat(image))


# Names and links.


def test_absolute_and_dotted_names_stay_inside(store: Store, tmp_path: Path) -> None:
    image = imported(store, tmp_path, [file("/abs/a"), file("./b"), file("c/./d"), file("//e"), file("f//g")])
    assert listing(tree(store, image)) == ["abs", "abs/a", "b", "c", "c/d", "e", "f", "f/g"]


def test_a_directory_that_becomes_a_link_on_the_way(store: Store, tmp_path: Path, outside: Path) -> None:
    """The component is swapped between two entries, and between two layers."""
    swapped = [directory("d"), file("d/one"), symlink("d", str(outside)), file("d/victim", "after"), file("d/new")]
    image = imported(store, tmp_path, swapped, [file("d/two"), file("d/.wh.victim")])
    assert untouched(outside)
    assert os.readlink(os.path.join(tree(store, image), "d")) == str(outside)


def test_an_absolute_link_begins_at_the_images_root(store: Store, tmp_path: Path) -> None:
    image = imported(store, tmp_path, [symlink("d/e/l", "/f"), file("d/e/l/one")], [file("d/e/l/two")])
    assert listing(tree(store, image)) == ["d", "d/e", "d/e/l", "f", "f/one", "f/two"]


def test_a_chain_of_links_that_no_realpath_follows(store: Store, tmp_path: Path, outside: Path) -> None:
    """Each link doubles the way; resolved as text the end is cut off, and the last step leads out (CVE-2025-4517)."""
    deep = "d" * 200
    nodes: list[Node] = []
    path = ""
    for step in range(16):
        nodes += [directory(f"{path}{deep}"), symlink(f"{path}{chr(97 + step)}", deep)]
        path += f"{chr(97 + step)}/"
    nodes += [symlink(f"{path}up", "../" * 16 + "../../../../../../.." + str(outside))]
    nodes += [symlink("escape", f"{path}up"), file("escape/victim", "after"), file("escape/new", "x")]
    with pytest.raises(BadImage, match="symbolic links on the way"):
        imported(store, tmp_path, [*nodes, *(symlink(f"l{i}", f"l{i + 1}") for i in range(50)), file("l0/x")])
    imported(store, tmp_path, nodes)
    assert untouched(outside)


def test_hard_links_do_not_leave_through_links(store: Store, tmp_path: Path, outside: Path) -> None:
    out = symlink("out", str(outside))
    with pytest.raises(BadImage, match="which is no file"):
        imported(store, tmp_path, [out, hardlink("mine", "out/victim")])
    with pytest.raises(BadImage, match="which is no file"):
        imported(store, tmp_path, [out], [hardlink("mine", "out/victim")])
    assert untouched(outside)


def test_nothing_is_changed_through_a_hard_link_to_a_link(store: Store, tmp_path: Path, outside: Path) -> None:
    """A name that is linked to a symbolic link must not lend it its mode, owner or content."""
    link = symlink("s", str(outside / "victim"))
    again = Node("h", tarfile.LNKTYPE, target="s", mode=0o777, uid=4321)
    image = imported(store, tmp_path, [link, again], [Node("h2", tarfile.LNKTYPE, target="s", mode=0o777, uid=4321)])
    assert untouched(outside)
    assert {os.readlink(os.path.join(tree(store, image), name)) for name in ("s", "h", "h2")} == {f"{outside}/victim"}
    imported(store, tmp_path, [link, again, file("h", "after", mode=0o777)])
    assert untouched(outside)


def test_the_victim_of_a_link_into_a_lower_layer_keeps_its_mode(store: Store, tmp_path: Path) -> None:
    lower = [file("secret", "s", mode=0o600)]
    image = imported(store, tmp_path, lower, [Node("open", tarfile.LNKTYPE, target="secret", mode=0o4777, uid=7)])
    found = facts(tree(store, image))["secret"]
    assert (found["mode"], found["owner"]) == (oct(stat.S_IFREG | 0o600), (0, 0))


def test_an_opaque_marker_before_its_directory_counts(store: Store, tmp_path: Path) -> None:
    upper = [directory("d"), file("d/.wh..wh..opq"), directory("d", 0o700), file("d/new")]
    image = imported(store, tmp_path, [file("d/old"), file("keep")], upper)
    assert listing(tree(store, image)) == ["d", "d/new", "keep"]


# What the kernel or the host would take for more than content.


@pytest.mark.parametrize("name", ["redirect", "metacopy", "opaque", "origin", "whiteout", "upper", "nlink"])
@pytest.mark.parametrize("family", ["trusted.overlay", "user.overlay"])
def test_no_attribute_of_overlayfs_comes_with_an_image(store: Store, tmp_path: Path, family: str, name: str) -> None:
    pax = {f"SCHILY.xattr.{family}.{name}": "/etc", "SCHILY.xattr.security.selinux": "system_u:object_r:shadow_t:s0"}
    image = imported(store, tmp_path, [file("a", pax=pax), directory("d", pax=pax)])
    layer = facts(os.path.join(store.data, image.layers[0].path))
    assert layer["a"]["xattrs"] == layer["d"]["xattrs"] == {}
    assert image.dropped_xattrs == 4


def test_setuid_programs_are_out_of_reach_for_other_users(store: Store, tmp_path: Path) -> None:
    image = imported(store, tmp_path, [file("su", "x", mode=0o4755)])
    path = os.path.join(tree(store, image), "su")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o4755
    reach = f"import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534); os.chdir('/'); os.stat({path!r})"
    done = subprocess.run([sys.executable, "-c", reach], capture_output=True, text=True, check=False)
    assert "PermissionError" in done.stderr
    assert stat.S_IMODE(os.stat(store.data).st_mode) == 0o700


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_a_device_node_in_a_mounted_root_cannot_be_opened(store: Store, tmp_path: Path, strategy: str) -> None:
    """As root, whom no mode keeps out; one layer and two, both forms of a flat tree: each is mounted in its own way."""
    known = probe(store.data).facts
    node = make.char("zero", 1, 5)
    images = [imported(store, tmp_path, [node]), imported(store, tmp_path, [file("a")], [node])]
    (tmp_path / "target").mkdir()
    forms = list(FlatForm) if known.erofs and strategy == "flat" else [FlatForm.HARDLINK]
    for image, form in ((image, form) for image in images for form in forms):
        store.ensure_flat(image, form)
        store.prefer_flat(image, form)
        for read_only in (False, True):
            target = str(tmp_path / "target")
            with assemble(store, image, Mapping.single(200000), target, strategy=strategy, read_only=read_only):
                assert stat.S_ISCHR(os.stat(f"{target}/zero").st_mode)
                with pytest.raises(PermissionError) as refused:
                    os.close(os.open(f"{target}/zero", os.O_RDONLY))
                assert refused.value.errno == errno.EACCES


def test_labels_and_names_of_an_image_control_nothing(store: Store, tmp_path: Path) -> None:
    layout = make.new_layout(str(tmp_path / "layout"))
    labels = {"containerd.io/snapshot.ref": "evil", "containerd.io/gc.root": "1", "flatmount.holder": "mount:x"}
    raw = archive([file("a")])
    config = json.loads(make.config_of([make.digest(raw)]))
    config["config"]["Labels"] = labels
    named = {"org.opencontainers.image.ref.name": "../../etc/passwd", **labels}
    make.write_index(layout, [make.put_manifest(layout, [raw], config=json.dumps(config).encode(), annotations=named)])
    image = store.import_image(layout)
    assert image.name is None
    assert dict(image.config.labels) == labels
    assert store.holders() == ()
    assert store.collect().images == (image.digest,)


def test_no_descriptor_reaches_a_program(store: Store, tmp_path: Path) -> None:
    """Whatever is open while root file systems stand is closed by execve (CVE-2024-21626)."""
    before = set(os.listdir("/proc/self/fd"))
    image = imported(store, tmp_path, [file("a")])
    facts_ = probe(store.data).facts
    choice = choose_for("flat", store, image, facts_)
    mapping = Mapping.single(100000)
    spec = specification(store, image, choice, mapping=mapping, upper=Upper.STORE)
    pool = RangePool(store.data, facts_)
    target = tmp_path / "target"
    target.mkdir()
    try:
        uppers, scratch = os.path.join(store.data, "uppers"), str(tmp_path / "s")
        assembler = Assembler(spec, choice.name, pool, uppers=uppers, scratch=scratch, ephemeral=True)
        with assembler.assemble(mapping, "c", str(target)):
            opened = set(os.listdir("/proc/self/fd")) - before
            kept = [fd for fd in opened if _is_open(fd) and not fcntl.fcntl(int(fd), fcntl.F_GETFD) & fcntl.FD_CLOEXEC]
            assert kept == []
            assert opened
    finally:
        pool.close()


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_a_layer_that_comes_twice_has_two_trees(store: Store, tmp_path: Path) -> None:
    """overlayfs refuses one directory as two of its layers, and the store has one of them already."""
    twice, between = [file("a", "1")], [file("a", "2")]
    once = imported(store, tmp_path, twice)
    image = imported(store, tmp_path, twice, between, twice)
    assert len({layer.path for layer in image.layers}) == 3
    assert image.layers[0].path == once.layers[0].path
    assert facts(tree(store, image))["a"]["content"] == facts(tree(store, once))["a"]["content"]
    assert store.check().findings == ()


# Size.


def test_bombs_meet_the_space_there_is(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store._disk, "free_bytes", lambda: 20 << 20)
    bomb = [file("zeros", bytes(64 << 20))]
    for packing in ("+gzip", "+zstd"):
        with pytest.raises(StoreError, match="that are free in the store"):
            imported(store, tmp_path, bomb, packing=packing)
    assert store.images() == ()


def test_zeros_after_the_end_of_an_archive_end(store: Store, tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="after the end of the archive"):
        imported(store, tmp_path, archive([file("a")]) + bytes(65 << 20))


def test_a_zstd_window_of_gigabytes_is_refused(store: Store, tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30)
    packed = io.BytesIO()
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(packed, closefd=False) as writer:
        writer.write(archive([file("a")]))
    layout = make.new_layout(str(tmp_path / "layout"))
    raw = archive([file("a")])
    blob = make.put(layout, packed.getvalue(), f"{make.OCI}.layer.v1.tar+zstd")
    config = make.put(layout, make.config_of([make.digest(raw)]), f"{make.OCI}.config.v1+json")
    value = {"schemaVersion": 2, "config": config, "layers": [blob]}
    make.write_index(layout, [make.put(layout, json.dumps(value).encode(), f"{make.OCI}.manifest.v1+json")])
    with pytest.raises(BadImage, match="cannot be decompressed"):
        store.import_image(layout)


def test_a_sparse_bomb_takes_no_space(store: Store, tmp_path: Path) -> None:
    size = 1 << 39
    pax = {"GNU.sparse.map": f"{size - 1},1", "GNU.sparse.size": str(size), "GNU.sparse.name": "s"}
    image = imported(store, tmp_path, [file("x", b"x", pax=pax)])
    status = os.stat(os.path.join(tree(store, image), "s"))
    assert (status.st_size, status.st_blocks * 512 < 1 << 20) == (size, True)
    assert store.check().findings == ()
    pax["GNU.sparse.size"], pax["GNU.sparse.map"] = str(1 << 50), f"{(1 << 50) - 1},1"
    with pytest.raises(BadImage, match="a file of 1125899906842624 bytes"):
        imported(store, tmp_path, [file("x", b"x", pax=pax)])


def test_entries_without_end(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking.Limits.__init__, "__defaults__", (1000, 250, 4000, 1 << 40))
    with pytest.raises(BadImage, match="more than 1000 entries"):
        imported(store, tmp_path, [file(f"f{i}") for i in range(1001)])
    assert os.listdir(os.path.join(store.data, "staging")) == []


def test_gzip_members_and_rubbish_after_them(store: Store, tmp_path: Path) -> None:
    """Two members are one stream; what follows the last one is no second archive for another reader."""
    raw = archive([file("a"), file("b")])
    layout = make.new_layout(str(tmp_path / "layout"))
    for packed, message in (
        (gzip.compress(raw) + archive([file("evil")]), "follows the compressed stream"),
        (gzip.compress(raw[:700]) + gzip.compress(raw[700:]), None),
    ):
        blob = make.put(layout, packed, f"{make.OCI}.layer.v1.tar+gzip")
        config = make.put(layout, make.config_of([make.digest(raw)]), f"{make.OCI}.config.v1+json")
        value = {"schemaVersion": 2, "config": config, "layers": [blob]}
        make.write_index(layout, [make.put(layout, json.dumps(value).encode(), f"{make.OCI}.manifest.v1+json")])
        if message is None:
            assert listing(tree(store, store.import_image(layout))) == ["a", "b"]
        else:
            with pytest.raises(BadImage, match=message):
                store.import_image(layout)


# Faults.


def test_too_few_descriptors_are_one_line(store: Store, tmp_path: Path) -> None:
    nodes = [file(f"{'/'.join(f'd{n}' for n in range(depth))}/f") for depth in range(1, 60)]
    layout = layout_of(str(tmp_path / "layout"), [nodes])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 12, hard))
    try:
        with pytest.raises(FlatmountError, match="EMFILE"):
            store.import_image(layout)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert os.listdir(os.path.join(store.data, "staging")) == []
    store.import_image(layout)
    assert store.check().findings == ()


@pytest.mark.parametrize("options", ["size=1m", "nr_inodes=110"])
def test_no_space_for_a_flat_tree_is_one_line(tmp_path: Path, options: str) -> None:
    """Import fits and the flat tree does not; after space is made it does."""
    nodes = [node for i in range(50) for node in (directory(f"d{i}"), file(f"d{i}/f", "x"))]
    layout = layout_of(str(tmp_path / "layout"), [nodes])
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m,nr_inodes=2000", "disk", disk], check=True)
    try:
        with Store.open(str(disk / "store"), create=True) as store:
            image = store.import_image(layout, name="web")
            status = os.statvfs(disk)
            if options.startswith("size"):
                (disk / "filler").write_bytes(b"x" * (status.f_bfree * status.f_bsize))
            else:
                for i in range(status.f_ffree):
                    (disk / f"filler{i}").touch()
            with pytest.raises(StoreError, match=r"ENOSPC|is full") as caught:
                store.ensure_flat(image)
            assert "free space" in caught.value.hint
            for filler in disk.glob("filler*"):
                filler.unlink()
            store.ensure_flat(image)
            assert store.check().findings == ()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_read_only_store_is_read(tmp_path: Path) -> None:
    layout = layout_of(str(tmp_path / "layout"), [[file("a")]])
    place = tmp_path / "store"
    with Store.open(str(place), create=True) as store:
        image = store.import_image(layout, name="web")
        store.ensure_flat(image)
    subprocess.run(["mount", "--bind", place, place], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", place], check=True)
    try:
        with Store.open(str(place)) as readonly:
            assert readonly.image("web").digest == image.digest
            with pytest.raises(FlatmountError, match=r"EROFS|readonly") as caught:
                readonly.remove_image("web")
            assert caught.value.hint
    finally:
        subprocess.run(["umount", place], check=True)
    with Store.open(str(place)) as store:
        assert store.image("web").digest == image.digest
        assert store.check().findings == ()


def test_a_clock_that_steps_back(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = imported(store, tmp_path, [file("a")])
    monkeypatch.setattr("time.time_ns", lambda: 5)
    second = imported(store, tmp_path, [file("b")])
    assert first.layers[0].path != second.layers[0].path
    store.hold(first, "mount:1")
    assert store.collect().images == (second.digest,)
    assert store.check().findings == ()
