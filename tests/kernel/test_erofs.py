"""EROFS images: written from trees, mounted, shared between containers, and kept by the store."""

from __future__ import annotations

import dataclasses
import errno
import filecmp
import os
import random
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flatmount.errors import FlatmountError, MissingFeature, OperationFailed, StoreError
from flatmount.kernel.erofs import ErofsImage, require_erofs, write_erofs
from flatmount.kernel.executor import run_once
from flatmount.kernel.loop import loop_device
from flatmount.kernel.mounts import MountEvents, mount_count
from flatmount.plan.facts import HostFacts
from flatmount.plan.mapping import Mapping
from flatmount.plan.operations import Parameter
from flatmount.rootfs.assembler import Assembler, Request, Rootfs
from flatmount.rootfs.image import choose_for, specification
from flatmount.rootfs.ranges import RangePool
from flatmount.store import FlatForm, Store
from flatmount.store.image_file import digest_of
from flatmount.strategies import Attach, RootfsSpec, Upper, pin_superblock
from tests.conftest import CANNOT
from tests.kernel.images import directory, file, hardlink, layout_of, symlink
from tests.kernel.trees import facts as facts_of
from tests.waiting import until

ROUNDS = 200 if os.environ.get("FLATMOUNT_SOAK") else 20
ONE, OTHER = Mapping.single(200000), Mapping.single(300000)


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    """Not in memory: the kernel reads no EROFS image from a file on a tmpfs, only through a loop device."""
    directory = Path(os.environ.get("FLATMOUNT_TEST_DISK", tmp_path)) / "disk"
    directory.mkdir()
    return directory


@pytest.fixture(autouse=True)
def _kernel_has_it(facts: HostFacts) -> None:
    if not facts.erofs_files:
        pytest.skip(f"{CANNOT}the kernel mounts no EROFS images from files")


def write(tree: Path, image: Path, name: str = "x") -> ErofsImage:
    tree_fd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    try:
        out = os.open(image, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            return write_erofs(tree_fd, out, name)
        finally:
            os.close(out)
    finally:
        os.close(tree_fd)


def mounted(image: Path) -> int:
    plan = pin_superblock(HostFacts(detached_layers=True))
    return run_once(plan, {}, {Parameter.DATA: str(image.parent), Parameter.IMAGE: image.name}).outputs[0]


def described(root: str) -> dict[str, dict[str, object]]:
    """As `facts`, with the number of links that names in the tree account for."""
    found = facts_of(root)
    for path, fact in found.items():
        status = os.lstat(os.path.join(root, path))
        fact["size"] = status.st_size if not stat.S_ISDIR(status.st_mode) else None
    return found


def assert_same(tree: Path, image: Path) -> None:
    """The mounted image is the tree, link counts within the tree included, and another reader of the format agrees."""
    root = mounted(image)
    try:
        seen = f"/proc/self/fd/{root}/."
        expected, found = described(str(tree)), described(seen)
        assert found == expected
        for path, fact in found.items():
            status = os.lstat(os.path.join(seen, path))
            if stat.S_ISDIR(status.st_mode):
                assert status.st_nlink == 2 + sum(
                    entry.is_dir(follow_symlinks=False) for entry in os.scandir(os.path.join(seen, path))
                )
            else:
                assert status.st_nlink == len(fact["links"]), path  # type: ignore[arg-type]
    finally:
        os.close(root)
    if shutil.which("fsck.erofs") is None:
        pytest.skip(f"{CANNOT}there is no fsck.erofs here (tools/setup --tests installs it)")
    done = subprocess.run(["fsck.erofs", image], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def special(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "many").mkdir(parents=True)
    for i in range(700):
        (tree / "many" / f"{i:04d}-{'n' * (i % 240)}").touch()
    (tree / ("n" * 255)).write_text("a name as long as names can be")
    (tree / os.fsdecode(b"not-\xff-utf8")).write_text("bytes")
    for size in (0, 1, 4000, 4031, 4032, 4033, 4095, 4096, 4097, 70000):
        (tree / f"size-{size}").write_bytes(random.Random(size).randbytes(size))
    with (tree / "holes").open("wb") as out:
        out.truncate(64 << 20)
        out.seek(40 << 20)
        out.write(b"island")
    os.link(tree / "size-1", tree / "many" / "linked")
    os.link(tree / "size-1", tmp_path / "outside")
    os.symlink("x" * 4000, tree / "long-link")
    os.symlink("size-1", tree / "short-link")
    os.setxattr(tree / "short-link", "trusted.of-a-link", b"1", follow_symlinks=False)
    os.setxattr(tree / "size-0", "user.large", b"v" * 3000)
    os.setxattr(tree / "size-0", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    os.setxattr(tree / "many", "system.posix_acl_default", _acl())
    os.setxattr(tree / "size-1", "trusted.overlay.opaque", b"y")
    os.removexattr(tree / "size-1", "trusted.overlay.opaque")
    os.mknod(tree / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(tree / "large-numbers", stat.S_IFBLK | 0o660, os.makedev(259, 70000))
    os.mkfifo(tree / "pipe", 0o640)
    os.chown(tree / "size-4096", 4_000_000_000, 70000)
    os.chmod(tree / "size-4097", 0o6755)
    os.utime(tree / "size-1", ns=(1, -123_456_789_012_345_678))
    os.utime(tree / "size-0", ns=(1, 1_234_567_890_123_456_789))
    os.chmod(tree / "many", 0o3777)
    return tree


def _acl() -> bytes:
    entries = ((1, 7, 0xFFFFFFFF), (2, 5, 4321), (4, 5, 0xFFFFFFFF), (0x10, 5, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF))
    return (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + bits.to_bytes(2, "little") + number.to_bytes(4, "little")
        for tag, bits, number in entries
    )


def test_an_image_is_the_tree(special: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    counts = write(special, image)
    assert_same(special, image)
    assert counts.directories == 2
    assert counts.size_bytes == image.stat().st_size > 64 << 20
    # Holes stay holes: 64 MiB that nobody wrote take no room.
    assert image.stat().st_blocks * 512 < 4 << 20


def test_equal_trees_make_equal_images(special: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", special, copy], check=True)
    (special / "holes").unlink()
    (copy / "holes").unlink()
    for tree in (special, copy):
        os.utime(tree, ns=(5, 5))
    for name, tree in (("a", special), ("b", copy)):
        write(tree, tmp_path / name, "chain")
    assert filecmp.cmp(tmp_path / "a", tmp_path / "b", shallow=False)
    write(copy, tmp_path / "b", "another chain")
    assert not filecmp.cmp(tmp_path / "a", tmp_path / "b", shallow=False)


@pytest.mark.soak
def test_random_trees(ram: Path) -> None:
    seed = int(os.environ.get("FLATMOUNT_SEED", random.SystemRandom().randrange(10**6)))
    print(f"FLATMOUNT_SEED={seed}")
    chance = random.Random(seed)
    for number in range(ROUNDS):
        tree, image = ram / f"tree{number}", ram / f"image{number}"
        tree.mkdir()
        grow(tree, chance)
        write(tree, image)
        assert_same(tree, image)
        shutil.rmtree(tree)
        image.unlink()


def grow(tree: Path, chance: random.Random) -> None:
    directories, files = [tree], []
    for number in range(chance.randrange(1, 120)):
        path = chance.choice(directories) / (f"{number}-" + "x" * chance.randrange(0, 250))
        kind = chance.choice(["directory", "file", "file", "file", "link", "symlink", "fifo"])
        if kind == "directory":
            path.mkdir(mode=chance.randrange(0o1000))
            directories.append(path)
        elif kind == "link" and files:
            os.link(chance.choice(files), path)
        elif kind == "symlink":
            os.symlink("t" * chance.randrange(1, 4095), path)
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            path.write_bytes(chance.randbytes(chance.choice([0, 1, 100, 4000, 4096, 5000, 20000])))
            files.append(path)
        # Not of a file that has some already: ext4 has one block for all of them.
        for i in range(0 if kind == "link" else chance.choice([0, 0, 0, 1, 4])):
            name = f"trusted.{i}" + "a" * chance.randrange(100)
            os.setxattr(path, name, chance.randbytes(chance.randrange(500)), follow_symlinks=False)
        os.lchown(path, chance.randrange(1 << 31), chance.randrange(1 << 31))
        os.utime(path, ns=(0, chance.randrange(1 << 60)), follow_symlinks=False)


@pytest.fixture
def store_data(data: Path) -> Path:
    (data / "erofs").mkdir()
    write(data / "flat/1", data / "erofs/2")
    return data


@pytest.fixture(params=["files", "files, without detached layers", "devices", "devices, without detached layers"])
def either(request: pytest.FixtureRequest, facts: HostFacts) -> HostFacts:
    """This kernel, and as if it were older: no EROFS from files (before 6.12), no detached layers (before 6.15)."""
    if request.param.startswith("devices") and not os.path.exists("/dev/loop-control"):
        pytest.skip(f"{CANNOT}there are no loop devices here")
    return dataclasses.replace(
        facts,
        erofs_files=request.param.startswith("files"),
        erofs_devices=request.param.startswith("devices"),
        detached_layers="without" not in request.param and facts.detached_layers,
    )


def assembler(data: Path, facts: HostFacts, upper: Upper, attach: Attach = Attach.HOST) -> Assembler:
    spec = RootfsSpec(("layers/1",), erofs="erofs/2", upper=upper, make_target=attach is Attach.HOST, attach=attach)
    uppers = data / "uppers" if upper is not Upper.ELSEWHERE else data.parent / "elsewhere"
    uppers.mkdir(exist_ok=True)
    pool = RangePool(str(data), facts)
    return Assembler(spec, "flat", pool, uppers=str(uppers), scratch=f"{data.parent}/tmp/ovl-", ephemeral=True)


def loop_devices() -> set[str]:
    found = set()
    for name in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            found.add(f"{name} {name.read_text()}")
        except OSError:
            continue
    return found


@pytest.mark.parametrize("upper", [Upper.STORE, Upper.ELSEWHERE, Upper.NONE])
def test_a_container_sees_its_own_ids(store_data: Path, either: HostFacts, upper: Upper) -> None:
    made = assembler(store_data, either, upper)
    targets = store_data.parent / "targets"
    before = mount_count()
    answers = made.assemble_many(
        [Request(ONE, "one", f"{targets}/one"), Request(OTHER, "two", f"{targets}/two")], at_once=2
    )
    for answer, name, first in zip(answers, ("one", "two"), (200000, 300000), strict=True):
        assert isinstance(answer, Rootfs), answer
        assert answer.outcome.mount_operations == made.plan.mount_operations == 1
        tool = targets / name / "bin/tool"
        assert (tool.stat().st_uid, tool.stat().st_gid, tool.read_text()) == (first + 7, first + 8, "tool\n")
        if upper is Upper.NONE:
            with pytest.raises(OSError) as refused:
                (targets / name / "new").touch()
            assert refused.value.errno == errno.EROFS
        elif upper is Upper.ELSEWHERE:
            tool.write_text("changed")
            assert tool.read_text() == "changed"
    assert mount_count() == before + 2
    for answer in answers:
        if isinstance(answer, Rootfs):
            answer.undo()
    assert mount_count() == before
    assert (store_data / "flat/1/bin/tool").read_text() == "tool\n"


def test_the_kernel_counts_what_the_plan_says(store_data: Path, facts: HostFacts) -> None:
    made = assembler(store_data, facts, Upper.STORE)
    targets = store_data.parent / "targets"
    with MountEvents() as events:
        before = events.counts()
        rootfs = [made.assemble(ONE, f"c{i}", f"{targets}/c{i}") for i in range(5)]
        for one in rootfs:
            one.undo()
        after = events.counts()
    assert after.attached - before.attached == sum(one.outcome.mount_operations for one in rootfs) == 5
    assert after.detached - before.detached == 5


def test_all_containers_share_one_superblock(store_data: Path, facts: HostFacts) -> None:
    """Of a read-only root, the device number is the superblock's."""
    made = assembler(store_data, facts, Upper.NONE, Attach.NONE)
    apart = assembler(store_data, facts, Upper.NONE, Attach.NONE)
    devices = []
    for which, mapping in ((made, ONE), (made, OTHER), (apart, ONE)):
        with which.assemble(mapping, "name") as rootfs:
            assert rootfs.descriptor is not None
            devices.append(os.fstat(rootfs.descriptor).st_dev)
    assert devices[0] == devices[1] != devices[2]


def test_loop_devices_go_with_the_mount(store_data: Path, facts: HostFacts) -> None:
    if not os.path.exists("/dev/loop-control"):
        pytest.skip(f"{CANNOT}there are no loop devices here")
    path = str(store_data / "erofs/2")
    with loop_device(path) as device:
        assert any(path in one for one in loop_devices())
        assert Path(device).is_block_device()
    until(lambda: not any(path in one for one in loop_devices()))
    with pytest.raises(FileNotFoundError), loop_device(f"{path}-not-there"):
        pass


def test_a_broken_image_is_refused_and_leaves_nothing(store_data: Path, facts: HostFacts) -> None:
    with (store_data / "erofs/2").open("r+b") as image:
        image.seek(1024)
        image.write(b"\0" * 128)
    made = assembler(store_data, facts, Upper.STORE)
    before = mount_count()
    with pytest.raises(OperationFailed, match="fsconfig create"):
        made.assemble(ONE, "one", str(store_data.parent / "targets/one"))
    assert mount_count() == before
    assert not os.listdir(store_data.parent / "targets")


# The store's.

LAYERS = [
    [directory("./", mode=0o751, uid=3), file("a", "a" * 5000), directory("d"), file("d/gone"), file("d/kept")],
    [file("d/.wh.gone"), hardlink("b", "a"), symlink("s", "a"), file("new", "n", uid=7)],
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(str(tmp_path / "store"), create=True) as opened:
        opened.import_image(layout_of(str(tmp_path / "layout"), LAYERS), name="web")
        yield opened


def image_file(store: Store) -> Path:
    path = store.flat_tree(store.image("web"), FlatForm.EROFS)
    assert path is not None
    return Path(store.data, path)


@pytest.mark.parametrize("hardlink_first", [False, True])
def test_both_forms_are_the_same_tree(store: Store, hardlink_first: bool) -> None:
    image = store.image("web")
    if hardlink_first:
        store.ensure_flat(image)
    made = store.ensure_flat(image, FlatForm.EROFS)
    assert store.ensure_flat(image, FlatForm.EROFS) == made
    assert (store.flat_tree(image) is not None) == hardlink_first
    assert not os.listdir(Path(store.data, "staging"))
    root = mounted(image_file(store))
    try:
        assert facts_of(f"/proc/self/fd/{root}/.") == facts_of(os.path.join(store.data, store.ensure_flat(image)))
        assert os.stat("a", dir_fd=root).st_nlink == 2
    finally:
        os.close(root)
    assert store.check().findings == ()


def test_the_form_asked_for_last_is_taken_where_it_can_be(store: Store, facts: HostFacts) -> None:
    image = store.image("web")
    blind = dataclasses.replace(facts, erofs_files=False, erofs_devices=False)
    assert choose_for("auto", store, image, facts).name == "detached"
    assert choose_for("flat", store, image, facts, flat_form=FlatForm.EROFS).erofs
    assert not choose_for("flat", store, image, blind, flat_form=FlatForm.EROFS).erofs
    store.ensure_flat(image, FlatForm.EROFS)
    assert choose_for("auto", store, image, facts).erofs
    assert choose_for("auto", store, image, blind).name == "detached"
    # Who only needs hard links, as a storm with plain directories does, changes nothing for containers.
    store.ensure_flat(image)
    assert choose_for("auto", store, image, facts).erofs
    store.prefer_flat(image, FlatForm.HARDLINK)
    assert choose_for("auto", store, image, facts).erofs is False
    store.prefer_flat(image, FlatForm.EROFS)
    assert choose_for("auto", store, image, facts).erofs
    assert choose_for("auto", store, image, blind).name == "flat"
    assert specification(store, image, choose_for("auto", store, image, blind)).erofs is None
    store.prefer_flat(image, FlatForm.HARDLINK)
    assert not choose_for("auto", store, image, facts).erofs
    with pytest.raises(MissingFeature, match="no EROFS") as refused:
        require_erofs(blind.erofs)
    assert "hardlink" in refused.value.hint


@pytest.mark.parametrize("at", [100, 1040, 5000, -3000])
def test_fsck_finds_a_changed_image_and_repair_takes_it_away(store: Store, at: int) -> None:
    image = store.image("web")
    store.ensure_flat(image, FlatForm.EROFS)
    path = image_file(store)
    before = path.read_bytes()
    changed = bytearray(before)
    changed[at] ^= 0x55
    path.chmod(0o600)
    path.write_bytes(changed)
    assert store.check(content=False).findings == ()
    (finding,) = store.check().findings
    assert finding.subject == f"data/erofs/{path.name}"
    assert [repair.done for repair in store.repair([finding])] == [
        "taken away; it is built again when it is next needed"
    ]
    assert not path.exists()
    store.ensure_flat(image, FlatForm.EROFS)
    assert image_file(store).read_bytes() == before
    assert store.check().findings == ()


def test_fsck_holds_the_image_against_the_layers(store: Store) -> None:
    """An image of another tree with the right digest in the book, as a wrong builder would leave it."""
    image = store.image("web")
    store.ensure_flat(image, FlatForm.EROFS)
    path = image_file(store)
    tree = Path(store.data, store.ensure_flat(image))
    (tree / "extra").touch()
    path.unlink()
    write(tree, path)
    (tree / "extra").unlink()

    with path.open("rb") as opened, store._database.transaction() as db:
        db.execute("UPDATE erofs SET digest = ?", (digest_of(opened.fileno()),))
    found = {finding.subject: finding.details for finding in store.check().findings}
    assert "extra does not belong there" in found[f"data/erofs/{path.name}"]


def test_images_go_with_their_image(store: Store, tmp_path: Path) -> None:
    store.ensure_flat(store.image("web"), FlatForm.EROFS)
    path = image_file(store)
    stray = path.with_name("900")
    stray.write_bytes(b"left by a kill")
    with Store.open(store.root) as again:
        assert not stray.exists()
        assert path.exists()
        again.hold(again.image("web"), "mount:1")
        with pytest.raises(FlatmountError, match="is used by"):
            again.remove_image("web")
        again.release("mount:1")
        removed = again.remove_image("web")
    assert not path.exists()
    assert removed.size_bytes > 4096
    assert store.check().findings == ()


def test_costs_are_what_the_disk_says(store: Store, tmp_path: Path) -> None:
    image = store.image("web")
    store.ensure_flat(image)
    store.ensure_flat(image, FlatForm.EROFS)
    shared = store.import_image(layout_of(str(tmp_path / "other"), [LAYERS[0], [file("x")]]), name="other")
    costs = store.costs(store.image("web"))
    places = [Path(store.data, part.path) for part in (*costs.layers, *costs.flat)]
    inodes: dict[int, int] = {}
    for place in places:
        for path in (place, *place.rglob("*")):
            inodes[path.lstat().st_ino] = path.lstat().st_blocks * 512
    assert (costs.total.inodes, costs.total.size_bytes) == (len(inodes), sum(inodes.values()))
    assert [layer.shared_with for layer in costs.layers] == [("other",), ()]
    # What is shared stays when the image goes: the sum of the others is what goes.
    assert costs.own.inodes == costs.total.inodes - costs.layers[0].usage.inodes
    linked, erofs = costs.flat
    assert (linked.form, linked.directories, linked.usage.inodes) == (FlatForm.HARDLINK, 2, 2)
    assert (erofs.form, erofs.usage.inodes) == (FlatForm.EROFS, 1)
    assert store.costs(shared).flat == ()


def test_no_space_for_an_image_is_one_line(tmp_path: Path) -> None:
    layout = layout_of(str(tmp_path / "layout"), [[file("a", os.urandom(6 << 20))]])
    disk = tmp_path / "small"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=18m", "disk", disk], check=True)
    try:
        with Store.open(str(disk / "store"), create=True) as store:
            image = store.import_image(layout, name="web")
            (disk / "filler").write_bytes(b"x" * (8 << 20))
            with pytest.raises(StoreError, match=r"takes 6\d{6} bytes, and its file system has \d+ free") as caught:
                store.ensure_flat(image, FlatForm.EROFS)
            assert "free space" in caught.value.hint
            assert not os.listdir(Path(store.data, "staging"))
            (disk / "filler").unlink()
            store.ensure_flat(image, FlatForm.EROFS)
            assert store.check().findings == ()
    finally:
        subprocess.run(["umount", disk], check=True)


# Roots of layers that say nothing about theirs.


@pytest.mark.parametrize("strategy", ["detached", "flat"])
def test_a_read_only_root_has_the_attributes_of_the_layer_that_gives_them(
    store: Store, facts: HostFacts, strategy: str
) -> None:
    if strategy == "detached" and not facts.lowerdir_append:
        pytest.skip(f"{CANNOT}overlayfs does not know lowerdir+")
    image = store.image("web")
    choice = choose_for(strategy, store, image, facts)
    pool = RangePool(store.data, facts)
    spec = specification(store, image, choice, upper=Upper.NONE, attach=Attach.NONE)
    made = Assembler(spec, choice.name, pool, uppers=f"{store.data}/uppers", scratch=f"{store.root}/ovl-")
    with made.assemble(ONE, "one") as rootfs:
        assert rootfs.descriptor is not None
        status = os.fstat(rootfs.descriptor)
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o751, 200003, 200000)
        assert status.st_mtime_ns == image.root.mtime_ns
        assert sorted(os.listdir(f"/proc/self/fd/{rootfs.descriptor}")) == ["a", "b", "d", "new", "s"]
    assert store.check().findings == ()
    (number,) = store._database.known_trees()["roots"] if strategy == "detached" else (None,)
    store.remove_image("web")
    assert number is None or not Path(store.data, f"roots/{number}").exists()
