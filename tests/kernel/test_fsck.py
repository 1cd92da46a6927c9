"""fsck: every kind of damage is found where it is, and repaired without touching the rest."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from images import directory, file, hardlink, layout_of, symlink
from trees import facts

from flatmount.cli import fsck as verb
from flatmount.errors import FlatmountError, UnknownImage
from flatmount.image import open_source
from flatmount.kernel.probes import probe
from flatmount.kernel.tree import Flattened, flatten
from flatmount.rootfs.image import choose_for, specification, trees_of
from flatmount.store import Checked, Finding, FlatForm, Part, Repair, Store, trees

LAYERS = [
    [
        directory("d", uid=3),
        file("d/a", "content"),
        file("d/b", "b"),
        hardlink("d/c", "d/b"),
        file("gone"),
        file("e/f"),
    ],
    [
        file(".wh.gone"),
        directory("e"),
        file("e/.wh..wh..opq"),
        file("e/g", "g" * 5000),
        symlink("link", "d/a"),
        hardlink("same", "d/a"),
        file("x", pax={"SCHILY.xattr.user.k": "v"}),
    ],
]


@pytest.fixture
def source(tmp_path: Path) -> str:
    return layout_of(str(tmp_path / "layout"), LAYERS)


@pytest.fixture
def store(tmp_path: Path, source: str) -> Iterator[Store]:
    with Store.open(str(tmp_path / "store"), create=True) as opened:
        opened.ensure_flat(opened.import_image(source, name="web"))
        yield opened


def keeping_times(change: Callable[[str], None]) -> Callable[[str], None]:
    """Damage that an honest modification time would give away."""

    def act(path: str) -> None:
        parent = os.path.dirname(path)
        times = [(p, os.lstat(p)) for p in (path, parent) if os.path.lexists(p)]
        change(path)
        for name, status in times:
            if os.path.lexists(name):
                os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)

    return act


@keeping_times
def flip(path: str) -> None:
    with open(path, "r+b") as opened:
        byte = opened.read(1)[0]
        opened.seek(0)
        opened.write(bytes([byte ^ 1]))


@keeping_times
def tear(path: str) -> None:
    shutil.copy2(path, f"{path}.new")
    os.replace(f"{path}.new", path)


@keeping_times
def point_elsewhere(path: str) -> None:
    os.unlink(path)
    os.symlink("d/z", path)


@keeping_times
def add(path: str) -> None:
    Path(path).write_text("new")


DAMAGE: dict[str, tuple[str, Callable[[str], object], str]] = {
    "content": ("1/d/a", flip, "has other content"),
    "size": ("1/d/a", lambda path: os.truncate(path, 3), "has 3 bytes instead of 7"),
    "mode": ("1/d/a", lambda path: os.chmod(path, 0o4755), "has mode 4755 instead of 0644"),
    "owner": ("1/d", lambda path: os.chown(path, 0, 9), "belongs to 0:9 instead of 3:0"),
    "time": ("1/d/a", lambda path: os.utime(path, (5, 5)), "another modification time"),
    "missing": ("1/d/a", keeping_times(os.unlink), "d/a is missing"),
    "added": ("1/d/new", add, "d/new does not belong there"),
    "torn link": ("1/d/c", tear, "no longer the same file"),
    "torn link below": ("2/same", tear, "not the lower layer's file"),
    "target": ("2/link", point_elsewhere, "points elsewhere"),
    "whiteout": ("2/gone", keeping_times(os.unlink), "gone is missing"),
    "opaque": ("2/e", lambda path: os.removexattr(path, "trusted.overlay.opaque"), "is opaque no longer"),
    "attribute": ("2/x", lambda path: os.setxattr(path, "user.k", b"w"), "other extended attributes"),
    "another kind": ("2/x", keeping_times(lambda path: (os.unlink(path), os.mkfifo(path))[0]), "is no file any more"),
    "all": ("2", shutil.rmtree, "its tree is missing"),
}


def named(findings: tuple[Finding, ...], subject: str) -> Finding:
    return next(finding for finding in findings if finding.subject == subject)


@pytest.mark.parametrize(("place", "damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_found_and_repaired(
    store: Store, source: str, place: str, damage: Callable[[str], object], message: str
) -> None:
    image = store.image("web")
    before = facts(os.path.join(store.data, store.ensure_flat(image)))
    assert store.check().findings == ()
    damage(os.path.join(store.data, "layers", place))
    bad = f"data/layers/{place.partition('/')[0]}"
    found = named(store.check().findings, bad)
    assert found.part is Part.LAYER
    assert found.images == ("web",)
    assert any(message in detail for detail in found.details), found.details
    good = {path for path in ("data/layers/1", "data/layers/2") if path != bad}
    inodes = {path: os.stat(os.path.join(store.root, "v1", path)).st_ino for path in good}

    image_source = open_source(source)
    try:
        for _ in range(3):
            findings = store.check().findings
            for repaired in store.repair(findings, [image_source]):
                assert repaired.done, repaired.why
    finally:
        image_source.close()
    assert store.check().findings == ()
    assert facts(os.path.join(store.data, store.ensure_flat(store.image("web")))) == before
    if bad.endswith("2"):
        assert {path: os.stat(os.path.join(store.root, "v1", path)).st_ino for path in good} == inodes


@pytest.mark.parametrize("change", ["unlink", "add", "replace", "chmod"])
def test_a_bad_flat_tree_is_built_again(store: Store, change: str) -> None:
    image = store.image("web")
    flat = os.path.join(store.data, store.ensure_flat(image))
    before = facts(flat)
    if change == "unlink":
        os.unlink(f"{flat}/d/a")
    elif change == "add":
        Path(flat, "d/new").write_text("new")
    elif change == "replace":
        os.unlink(f"{flat}/e/g")
        Path(flat, "e/g").write_text("other")
    else:
        os.chmod(f"{flat}/d", 0o700)
    (found,) = store.check().findings
    assert found.part is Part.FLAT
    (repaired,) = store.repair([found])
    assert repaired.done
    assert store.check().findings == ()
    assert facts(os.path.join(store.data, store.ensure_flat(image))) == before


def test_the_entries_of_a_layer_are_lost(store: Store, source: str) -> None:
    os.truncate(os.path.join(store.root, "v1/entries/1"), 10)
    os.unlink(os.path.join(store.root, "v1/entries/2"))
    findings = store.check().findings
    assert "cannot be read" in named(findings, "data/layers/1").details[0]
    assert "is missing" in named(findings, "data/layers/2").details[0]
    image_source = open_source(source)
    assert all(repaired.done for repaired in store.repair(findings, [image_source]))
    image_source.close()
    # The second layer was linked into the first one's old tree, and is now linked to nothing that is there.
    findings = store.check().findings
    image_source = open_source(source)
    assert all(repaired.done for repaired in store.repair(findings, [image_source]))
    image_source.close()
    assert store.check().findings == ()


def test_nothing_is_replaced_under_its_user_and_without_a_source(store: Store, source: str) -> None:
    image = store.image("web")
    flip(os.path.join(store.data, "layers/1/d/a"))
    findings = [found for found in store.check().findings if found.part is Part.LAYER]
    (repaired,) = store.repair(findings)
    assert "--source" in repaired.why
    store.hold(image, "mount:a")
    image_source = open_source(source)
    (repaired,) = store.repair(findings, [image_source])
    image_source.close()
    assert "used by mount:a" in repaired.why
    assert store.image("web").layers[0].path == "layers/1"


def test_a_source_that_is_damaged_itself_changes_nothing(store: Store, source: str) -> None:
    flip(os.path.join(store.data, "layers/1/d/a"))
    findings = [found for found in store.check().findings if found.part is Part.LAYER]
    image_source = open_source(source)
    blob = image_source.manifest.layers[0].digest.removeprefix("sha256:")
    with open(os.path.join(source, "blobs/sha256", blob), "r+b") as opened:
        opened.seek(30)
        opened.write(b"damage")
    (repaired,) = store.repair(findings, [image_source])
    image_source.close()
    assert repaired.done == ""
    assert "digest" in repaired.why
    assert os.listdir(os.path.join(store.data, "staging")) == []
    assert store.image("web").layers[0].path == "layers/1"


def test_what_nobody_knows_is_found_and_goes(store: Store) -> None:
    for left in ("data/staging/90/d", "data/layers/91/d", "data/flat/92/d", "data/trash/layers-94/d"):
        os.makedirs(os.path.join(store.root, "v1", left))
    Path(store.root, "v1/entries/91").write_text("half")
    findings = store.check().findings
    assert {finding.part for finding in findings} == {Part.STRAY}
    assert len(findings) == 5
    assert all(repaired.done for repaired in store.repair(findings))
    assert store.check().findings == ()


def test_a_damaged_book_is_told(store: Store) -> None:
    with store._database.transaction() as db:
        db.execute("UPDATE documents SET content = CAST(content || ' ' AS BLOB)")
    findings = store.check().findings
    assert {finding.part for finding in findings} == {Part.BOOK}
    assert "another digest" in findings[0].details[0]
    assert all("import the images" in repaired.why for repaired in store.repair(findings))


def test_a_quick_check_does_not_read_files(store: Store) -> None:
    flip(os.path.join(store.data, "layers/1/d/a"))
    assert store.check(content=False).findings == ()
    assert store.check().findings != ()


@pytest.mark.parametrize("form", list(FlatForm))
@pytest.mark.parametrize("read", [True, False], ids=["after it was read", "before it was read"])
def test_a_tree_is_made_again_when_its_source_is_repaired_meanwhile(
    store: Store, source: str, monkeypatch: pytest.MonkeyPatch, form: FlatForm, read: bool
) -> None:
    image = store.image("web")
    store.drop_flat(image, FlatForm.HARDLINK)
    Path(store.data, image.layers[1].path, "e/g").write_text("changed")
    calls: list[str] = []

    def meanwhile(fd: int, sources: Sequence[str], target: str, *, root_source: int | None = None) -> Flattened:
        calls.append(target)
        if len(calls) > 1:
            return flatten(fd, sources, target, root_source=root_source)
        made = flatten(fd, sources, target, root_source=root_source) if read else None
        assert [repair.why for repair in repaired(store, source)] == [""]
        return made or flatten(fd, sources, target, root_source=root_source)

    monkeypatch.setattr(trees, "flatten", meanwhile)
    store.ensure_flat(image, form)
    assert len(calls) == 2
    assert store.check().findings == ()
    assert os.listdir(os.path.join(store.data, "staging")) == []
    linked = os.path.join(store.data, store.ensure_flat(store.image("web")))
    assert Path(linked, "e/g").read_text() == "g" * 5000


def test_a_source_that_goes_each_time_is_one_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    image = store.image("web")
    store.drop_flat(image, FlatForm.HARDLINK)
    shutil.move(os.path.join(store.data, image.layers[0].path), os.path.join(store.root, "elsewhere"))
    with pytest.raises(FlatmountError, match="ENOENT"):
        store.ensure_flat(image)
    shutil.move(os.path.join(store.root, "elsewhere"), os.path.join(store.data, image.layers[0].path))
    store.ensure_flat(image)
    store.remove_image("web")
    with pytest.raises(UnknownImage, match="removed meanwhile"):
        store.ensure_flat(image)


@pytest.mark.parametrize("strategy", ["detached", "flat"])
def test_what_was_repaired_before_it_is_held_is_not_mounted(store: Store, source: str, strategy: str) -> None:
    image = store.image("web")
    facts = probe(store.data).facts
    spec = specification(store, image, choose_for(strategy, store, image, facts))
    Path(store.data, image.layers[1].path, "e/g").write_text("changed")
    assert all(repair.done for repair in repaired(store, source))
    with pytest.raises(FlatmountError, match="repaired meanwhile"):
        store.hold(image, "mount:one", trees=trees_of(spec))
    assert store.holders() == ()
    image = store.image("web")
    spec = specification(store, image, choose_for(strategy, store, image, facts))
    store.hold(image, "mount:one", trees=trees_of(spec))


def test_only_what_was_repaired_is_bad_again(store: Store, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two findings that the last pass leaves, one was repaired before and one came to light by that."""
    one, other = (Finding(Part.FLAT, f"data/flat/{number}", ("bad",), 1) for number in (1, 2))

    def done(_: Store, findings: Sequence[Finding], sources: object) -> tuple[Repair, ...]:
        return tuple(Repair(finding, done="taken away") for finding in findings)

    monkeypatch.setattr(Store, "repair", done)
    monkeypatch.setattr(verb, "_PASSES", 1)
    monkeypatch.setattr(verb, "_check", lambda store, args: Checked(1, 2, 3, True, (one, other)))
    repairs = verb._repair(store, Checked(1, 2, 3, True, (one,)), [], argparse.Namespace())
    assert [(repair.finding, repair.why) for repair in repairs if repair.why] == [
        (one, "it is bad again after its repair"),
        (other, "it was found while others were repaired; repair again"),
    ]


def repaired(store: Store, source: str) -> tuple[Repair, ...]:
    again = open_source(source)
    try:
        return store.repair(store.check().findings, [again])
    finally:
        again.close()
