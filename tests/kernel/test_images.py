"""Images of every form into the store; damaged ones, foreign ones and things that are none."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import images as make
import pytest
from images import OCI, archive, digest, directory, docker_archive, file, layout_of, tar_of
from trees import facts, listing

from flatmount.cli import image as verb
from flatmount.errors import BadImage, FlatmountError, InUse, MappingError, StoreError, UnknownImage, UsageError
from flatmount.plan.mapping import Mapping
from flatmount.store import Progressed, RootAttributes, Store

LAYERS = [
    [directory("etc"), file("etc/passwd", "root:x:0:0::/:/bin/sh\n"), file("gone")],
    [file("etc/hosts", "localhost"), file(".wh.gone")],
]
SHOWN = ["etc", "etc/hosts", "etc/passwd"]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(str(tmp_path / "store"), create=True) as opened:
        yield opened


def flat(store: Store, reference: str) -> str:
    return os.path.join(store.data, store.ensure_flat(store.image(reference)))


def state(store: Store) -> dict[str, Any]:
    """Everything that is on disk and everything that the store says about it."""
    with store._database.reading() as db:
        tables = ("layers", "images", "image_layers", "names", "flats", "leases", "documents")
        book = {table: sorted(map(repr, db.execute(f"SELECT * FROM {table}"))) for table in tables}
    trees = facts(store.data)
    for path, found in trees.items():
        if "/" not in path:
            del found["mtime_ns"]  # of layers/, staging/ and so on
    return {"trees": trees, "entries": sorted(os.listdir(os.path.join(store.root, "v1/entries"))), **book}


@pytest.mark.parametrize("packing", ["", "+gzip", "+zstd"])
@pytest.mark.parametrize("as_tar", [False, True])
def test_an_oci_layout(store: Store, tmp_path: Path, packing: str, as_tar: bool) -> None:
    source = layout_of(str(tmp_path / "layout"), LAYERS, packing)
    if as_tar:
        source = tar_of(source, str(tmp_path / "layout.tar"))
    seen: list[Progressed] = []
    image = store.import_image(source, name="web:1", progress=seen.append)
    assert listing(flat(store, "web:1")) == SHOWN
    assert image.name == "web:1"
    assert image.config.user == "1000:1000"
    assert image.config.cmd == ("/bin/sh",)
    assert [layer.entries for layer in image.layers] == [3, 3]
    assert {(at.layer, at.layers) for at in seen if at.done_bytes == at.total_bytes} == {(1, 2), (2, 2)}


def test_a_docker_archive(store: Store, tmp_path: Path) -> None:
    source = docker_archive(str(tmp_path / "saved.tar"), [LAYERS[0], LAYERS[1], LAYERS[0]], ["app:1", "app:latest"])
    image = store.import_image(source)
    assert image.name == "app:1"
    assert listing(flat(store, "app:1")) == [*SHOWN, "gone"]
    assert len({layer.path for layer in image.layers}) == 3  # overlayfs takes no directory twice
    assert store.import_image(source, name="other").digest == image.digest


def test_one_of_several_images(store: Store, tmp_path: Path) -> None:
    layout = make.new_layout(str(tmp_path / "layout"))
    manifests = [
        make.put_manifest(layout, [archive([file(name)])], annotations={"org.opencontainers.image.ref.name": name})
        for name in ("one", "two")
    ]
    make.write_index(layout, manifests)
    with pytest.raises(BadImage, match="several images") as caught:
        store.import_image(layout)
    assert "one, two" in caught.value.hint
    with pytest.raises(BadImage, match="no image 'three'"):
        store.import_image(f"{layout}:three")
    store.import_image(f"{layout}:two")
    assert listing(flat(store, "two")) == ["two"]


def test_the_platform_of_this_host_is_taken(store: Store, tmp_path: Path) -> None:
    layout = make.new_layout(str(tmp_path / "layout"))
    here = json.loads(make.config_of([]))["architecture"]
    manifests = [
        make.put_manifest(layout, [archive([file(name)])], platform={"os": system, "architecture": name})
        for system, name in (("linux", "s390x"), ("linux", here), ("unknown", "unknown"))
    ]
    index = json.dumps({"schemaVersion": 2, "manifests": manifests}).encode()
    make.write_index(layout, [make.put(layout, index, f"{OCI}.index.v1+json")])
    store.import_image(layout, name="multi")
    assert listing(flat(store, "multi")) == [here]
    make.write_index(layout, [manifests[0], manifests[2]])
    with pytest.raises(BadImage, match=f"no image for linux/{here}") as caught:
        store.import_image(layout, name="foreign")
    assert "linux/s390x" in caught.value.hint


def test_the_same_image_again_does_nothing(store: Store, tmp_path: Path) -> None:
    source = layout_of(str(tmp_path / "layout"), LAYERS)
    first = store.import_image(source, name="web")
    before = state(store)
    assert store.import_image(source, name="web") == first
    assert state(store) == before


def test_layers_are_shared_where_they_mean_the_same(store: Store, tmp_path: Path) -> None:
    base = [directory("d", uid=1), file("a")]
    independent, dependent = [directory("x"), file("x/y")], [file("d/new")]
    one = store.import_image(layout_of(str(tmp_path / "1"), [base, independent, dependent]), name="one")
    two = store.import_image(
        layout_of(str(tmp_path / "2"), [[directory("d", uid=2)], independent, dependent]), name="two"
    )
    assert one.layers[1] == two.layers[1]
    assert one.layers[2].path != two.layers[2].path
    assert facts(flat(store, "one"))["d"]["owner"] == (1, 0)
    assert facts(flat(store, "two"))["d"]["owner"] == (2, 0)
    store.remove_image("one")
    assert listing(flat(store, "two")) == ["d", "d/new", "x", "x/y"]
    store.remove_image("two")
    assert listing(os.path.join(store.data, "layers")) == []


def test_a_name_moves_and_an_image_goes_with_its_last_name(store: Store, tmp_path: Path) -> None:
    one = store.import_image(layout_of(str(tmp_path / "1"), [[file("1")]]), name="app")
    two = store.import_image(layout_of(str(tmp_path / "2"), [[file("2")]]), name="app")
    assert store.image("app").digest == two.digest
    assert {image.name for image in store.images()} == {None, "app"}
    store.import_image(str(tmp_path / "2"), name="also")
    assert store.remove_image("app").images == ()
    assert store.image("also").digest == two.digest
    assert store.remove_image(one.digest[7:20]).images == (one.digest,)
    assert store.remove_image(two.digest).names == ("also",)
    assert store.images() == ()
    with pytest.raises(UnknownImage, match="no image 'app'"):
        store.image("app")
    with pytest.raises(UnknownImage):
        store.image(one.digest)


def test_an_image_in_use_stays(store: Store, tmp_path: Path) -> None:
    image = store.import_image(layout_of(str(tmp_path / "layout"), LAYERS), name="web")
    store.hold(image, "mount:a")
    store.hold(image, "mount:a")
    assert [holder.holder for holder in store.holders()] == ["mount:a"]
    before = state(store)
    with pytest.raises(InUse, match="used by mount:a"):
        store.remove_image("web")
    assert state(store) == before
    store.release("mount:a")
    store.remove_image("web")
    with pytest.raises(UnknownImage):
        store.hold(image, "mount:b")


def test_owners_must_be_mapped(store: Store, tmp_path: Path) -> None:
    image = store.import_image(layout_of(str(tmp_path / "layout"), [[file("a", uid=10), file("b", gid=65536)]]))
    with pytest.raises(MappingError, match="gid 65536"):
        image.owners.require(Mapping.single(100000))
    image.owners.require(Mapping.single(100000, 65537))
    image.owners.require(Mapping.parse("0:5:1,10:70:1", "0:5:40000,40000:90000:40000"))
    with pytest.raises(MappingError, match="uid 10"):
        image.owners.require(Mapping.parse("0:5:10", "0:5:70000"))


def test_the_root_is_the_topmost_that_was_given(store: Store, tmp_path: Path) -> None:
    layers = [[directory("./", 0o700, uid=3)], [directory("./", 0o711, gid=4)], [file("a")]]
    image = store.import_image(layout_of(str(tmp_path / "layout"), layers), name="web")
    assert image.root == RootAttributes(0o711, 0, 4, make.MTIME * 10**9)
    assert facts(flat(store, "web"))["."]["owner"] == (0, 4)


# Bad input: one line that says what, where and what to do, and the store as it was.


def flip(path: str) -> None:
    with open(path, "r+b") as opened:
        opened.seek(-20, os.SEEK_END)
        byte = opened.read(1)[0]
        opened.seek(-20, os.SEEK_END)
        opened.write(bytes([byte ^ 0xFF]))


def blobs(layout: str) -> list[str]:
    manifest = json.loads(open_index(layout))["manifests"][0]["digest"]
    with open(os.path.join(layout, "blobs/sha256", manifest[7:]), encoding="ascii") as opened:
        layers = json.load(opened)["layers"]
    return [os.path.join(layout, "blobs/sha256", layer["digest"][7:]) for layer in layers]


def open_index(layout: str) -> str:
    with open(os.path.join(layout, "index.json"), encoding="ascii") as opened:
        return opened.read()


def truncate(layout: str) -> None:
    path = blobs(layout)[1]
    os.truncate(path, os.path.getsize(path) - 10)


def tamper(layout: str) -> None:
    flip(blobs(layout)[1])


def lose(layout: str) -> None:
    os.unlink(blobs(layout)[1])


def link(layout: str) -> None:
    path = blobs(layout)[1]
    os.rename(path, f"{path}.real")
    os.symlink(f"{path}.real", path)


def replace_with_fifo(layout: str) -> None:
    os.unlink(blobs(layout)[1])
    os.mkfifo(blobs(layout)[1])


def rewrite(change: Callable[[str, list[bytes]], dict[str, Any]]) -> Callable[[str], None]:
    def damage(layout: str) -> None:
        make.write_index(layout, [change(layout, [archive(nodes) for nodes in LAYERS])])

    return damage


def wrong_diff_id(layout: str, layers: list[bytes]) -> dict[str, Any]:
    return make.put_manifest(layout, layers, config=make.config_of([digest(layers[0]), digest(b"another")]))


def too_few_diff_ids(layout: str, layers: list[bytes]) -> dict[str, Any]:
    return make.put_manifest(layout, layers, config=make.config_of([digest(layers[0])]))


def digest_as_path(layout: str, layers: list[bytes]) -> dict[str, Any]:
    return make.put_manifest(layout, layers) | {"digest": "sha256:../../../../etc/passwd"}


def wrong_size(layout: str, layers: list[bytes]) -> dict[str, Any]:
    descriptor = make.put_manifest(layout, layers)
    return descriptor | {"size": descriptor["size"] + 1}


def no_layers(layout: str, layers: list[bytes]) -> dict[str, Any]:
    return make.put_manifest(layout, [])


def other_platform(layout: str, layers: list[bytes]) -> dict[str, Any]:
    config = make.config_of([digest(layer) for layer in layers], architecture="s390x")
    return make.put_manifest(layout, layers, config=config)


def both_at_once(layout: str, layers: list[bytes]) -> dict[str, Any]:
    value = {"schemaVersion": 2, "manifests": [], "layers": [], "config": {}}
    return make.put(layout, json.dumps(value).encode(), f"{OCI}.manifest.v1+json")


def encrypted(layout: str, layers: list[bytes]) -> dict[str, Any]:
    layer = make.put(layout, layers[0], f"{OCI}.layer.v1.tar+gzip+encrypted")
    config = make.put(layout, make.config_of([digest(layers[0])]), f"{OCI}.config.v1+json")
    value = {"schemaVersion": 2, "config": config, "layers": [layer]}
    return make.put(layout, json.dumps(value).encode(), f"{OCI}.manifest.v1+json")


def an_artifact(layout: str, layers: list[bytes]) -> dict[str, Any]:
    config = make.put(layout, b"{}", "application/vnd.example.config+json")
    value = {"schemaVersion": 2, "config": config, "layers": []}
    return make.put(layout, json.dumps(value).encode(), f"{OCI}.manifest.v1+json")


def index_of_itself(layout: str, layers: list[bytes]) -> dict[str, Any]:
    """Its digest cannot be known before it exists, so that the circle is closed by a wrong one."""
    itself = {"mediaType": f"{OCI}.index.v1+json", "digest": digest(b"circle"), "size": 6}
    inner = json.dumps({"schemaVersion": 2, "manifests": [itself]}).encode()
    path = os.path.join(layout, "blobs/sha256", digest(b"circle")[7:])
    with open(path, "wb") as out:
        out.write(inner)
    return itself | {"size": len(inner)}


def endless_index(layout: str, layers: list[bytes]) -> dict[str, Any]:
    descriptor = make.put_manifest(layout, layers)
    for _ in range(20):
        value = {"schemaVersion": 2, "manifests": [descriptor]}
        descriptor = make.put(layout, json.dumps(value).encode(), f"{OCI}.index.v1+json")
    return descriptor


def not_a_tar(layout: str, layers: list[bytes]) -> dict[str, Any]:
    return make.put_manifest(layout, [layers[0], b"this is no archive" * 100])


def a_cut_tar(layout: str, layers: list[bytes]) -> dict[str, Any]:
    return make.put_manifest(layout, [layers[0], archive([file("a", b"x" * 5000)])[:3000]])


def a_negative_size(layout: str, layers: list[bytes]) -> dict[str, Any]:
    raw = bytearray(archive([file("a", b"x" * 600)]))
    raw[124:136] = b"\xff" * 12
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return make.put_manifest(layout, [layers[0], bytes(raw)])


DAMAGE = {
    "truncated": (truncate, "bytes instead of"),
    "tampered": (tamper, "has another digest"),
    "missing": (lose, "is missing"),
    "a blob that is a link": (link, "not a plain file"),
    "a blob that is a fifo": (replace_with_fifo, "not a plain file"),
    "wrong diff_id": (rewrite(wrong_diff_id), "but the image's config says"),
    "too few diff_ids": (rewrite(too_few_diff_ids), "2 layers, and 1 diff_ids"),
    "digest as a path": (rewrite(digest_as_path), "is not a sha256"),
    "wrong size": (rewrite(wrong_size), "bytes instead of"),
    "no layers": (rewrite(no_layers), "has no layers"),
    "other platform": (rewrite(other_platform), "is for linux/s390x"),
    "manifest and index": (rewrite(both_at_once), "an index and a manifest at once"),
    "encrypted": (rewrite(encrypted), "of type '.*encrypted'"),
    "artifact": (rewrite(an_artifact), "config of type"),
    "index of itself": (rewrite(index_of_itself), "another digest"),
    "index without end": (rewrite(endless_index), "leads to itself"),
    "layer is no tar": (rewrite(not_a_tar), "layer sha256:.*checksum"),
    "layer is cut": (rewrite(a_cut_tar), "ends within"),
    "negative size": (rewrite(a_negative_size), "out of range"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_image_changes_nothing(
    store: Store, tmp_path: Path, damage: Callable[[str], None], message: str
) -> None:
    store.import_image(layout_of(str(tmp_path / "there"), [[file("there")]]), name="there")
    before = state(store)
    layout = layout_of(str(tmp_path / "layout"), LAYERS)
    damage(layout)
    with pytest.raises(BadImage, match=message) as caught:
        store.import_image(layout, name="web")
    assert caught.value.hint
    assert state(store) == before


def test_things_that_are_no_image(store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello " * 1000)
    (tmp_path / "nothing").write_text("")
    os.mkfifo(tmp_path / "fifo")
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.add(tmp_path / "text", "text")
    (tmp_path / "packed.tar.gz").write_bytes(gzip.compress((tmp_path / "other.tar").read_bytes()))
    for name, message in {
        "empty": "neither index.json nor manifest.json",
        "text": "is not an image",
        "nothing": "is not an image",
        "fifo": "neither a directory nor a file",
        "other.tar": "neither index.json nor manifest.json",
        "packed.tar.gz": "compressed as a whole",
    }.items():
        with pytest.raises(BadImage, match=message) as caught:
            store.import_image(str(tmp_path / name))
        assert caught.value.hint
    with pytest.raises(FlatmountError, match="no such file"):
        store.import_image(str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="cannot be an image's name"):
        store.import_image(str(tmp_path / "empty"), name="../x")


def test_a_cut_archive_of_an_image(store: Store, tmp_path: Path) -> None:
    whole = tar_of(layout_of(str(tmp_path / "layout"), LAYERS), str(tmp_path / "layout.tar"))
    data = Path(whole).read_bytes()
    choose = random.Random(7)
    before = state(store)
    for _ in range(20):
        cut = tmp_path / "cut.tar"
        cut.write_bytes(data[: choose.randrange(1, len(data) - 12000)])
        with pytest.raises(BadImage):
            store.import_image(str(cut))
    assert state(store) == before


def test_a_bomb_meets_the_space_there_is(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(str(tmp_path / "layout"), [[file("zeros", bytes(30 << 20))]])
    before = state(store)
    monkeypatch.setattr(store._disk, "free_bytes", lambda: 20 << 20)
    with pytest.raises(StoreError, match="that are free in the store"):
        store.import_image(layout)
    assert state(store) == before


FULL = """
import sys
from flatmount.errors import StoreError
from flatmount.store import Store
with Store.open(sys.argv[1] + "/store", create=True) as store:
    store.import_image(sys.argv[2], name="small")
    try:
        store.import_image(sys.argv[3], name="large")
    except StoreError as error:
        print(error.line())
    else:
        print("it fitted")
    assert [image.name for image in store.images()] == ["small"]
    store.import_image(sys.argv[4], name="small2")
"""


@pytest.mark.parametrize("options", ["size=6m,nr_inodes=500", "size=60m,nr_inodes=60"])
def test_a_full_disk(tmp_path: Path, options: str) -> None:
    small = layout_of(str(tmp_path / "small"), [[file("a")]])
    more = layout_of(str(tmp_path / "more"), [[file("b")]])
    choose = random.Random(1)
    nodes = [file(f"f{i}", choose.randbytes(100_000)) for i in range(100)]
    large = layout_of(str(tmp_path / "large"), [[file("x")], nodes])
    target = tmp_path / "disk"
    target.mkdir()
    script = f'mount -t tmpfs -o {options} tmpfs {target} && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", FULL]
    command += [str(target), small, large, more]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "layer sha256:" in done.stdout
    assert "free" in done.stdout


def test_a_store_of_a_newer_schema_is_read_and_not_changed(tmp_path: Path) -> None:
    root = str(tmp_path / "store")
    source = layout_of(str(tmp_path / "layout"), LAYERS)
    with Store.open(root, create=True) as store:
        image = store.import_image(source, name="web")
        with store._database.transaction() as db:
            db.execute("PRAGMA user_version = 99")
    os.mkdir(os.path.join(root, "v1/data/staging/77"))
    with Store.open(root) as store:
        assert store.image("web") == image
        with pytest.raises(StoreError, match="newer flatmount"):
            store.remove_image("web")
        with pytest.raises(StoreError, match="newer flatmount"):
            store.ensure_flat(image)
    assert os.path.isdir(os.path.join(root, "v1/data/staging/77"))


def test_there_must_be_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store"):
        Store.open(str(tmp_path / "store"))
    (tmp_path / "store/v1/data").mkdir(parents=True)
    with pytest.raises(StoreError, match="there is no store"):
        Store.open(str(tmp_path / "store"))


def test_what_a_kill_left_is_swept(tmp_path: Path) -> None:
    root = str(tmp_path / "store")
    with Store.open(root, create=True) as store:
        image = store.import_image(layout_of(str(tmp_path / "layout"), LAYERS), name="web")
        store.ensure_flat(image)
        before = state(store)
    for left in ("staging/90/d", "layers/91/d", "flat/92/d", "shifted/93", "trash/layers-94/d"):
        os.makedirs(os.path.join(root, "v1/data", left))
    Path(root, "v1/entries/91").write_text("half")
    with Store.open(root) as store:
        assert state(store) == before


def test_two_imports_at_once_make_one_image(tmp_path: Path) -> None:
    root = str(tmp_path / "store")
    source = layout_of(str(tmp_path / "layout"), [*LAYERS, [file(f"f{i}") for i in range(500)]])
    Store.open(root, create=True).close()
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with Store.open(root) as store:
                image = store.import_image(source, name=f"n{number}")
                store.ensure_flat(image)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    with Store.open(root) as store:
        assert len({image.digest for image in store.images()}) == 1
        assert len(store.images()) == 6
        assert len(os.listdir(os.path.join(store.data, "layers"))) == 3
        assert len(os.listdir(os.path.join(store.data, "flat"))) == 1
        assert os.listdir(os.path.join(store.data, "staging")) == []


def test_directories_are_closed_to_others(store: Store) -> None:
    modes = {path: oct(os.stat(os.path.join(store.root, path)).st_mode & 0o7777) for path in ("", "v1", "v1/data")}
    assert modes == {"": "0o711", "v1": "0o711", "v1/data": "0o700"}
    assert os.stat(os.path.join(store.root, "v1/state.db")).st_mode & 0o7777 == 0o600


# The command line.


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    verb.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["image", *words])
    code: int = args.run(args)
    return code


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, root = layout_of(str(tmp_path / "layout"), LAYERS), ["--root", str(tmp_path / "store")]
    assert run("import", source, "--name", "web", *root) == 0
    assert capsys.readouterr().out.startswith("web: 2 layers, 3 files, sha256:")
    assert run("list", *root, "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["schema"] == "flatmount.image-list/1"
    assert [(image["name"], image["layers"]) for image in listed["images"]] == [("web", 2)]
    assert run("show", "web", *root, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["digest"] == listed["images"][0]["digest"]
    assert len(shown["layer_list"]) == 2
    for words in (["list"], ["show", "web"]):
        assert run(*words, *root) == 0
        assert "web" in capsys.readouterr().out
    assert run("remove", "web", *root) == 0
    assert "2 layers" in capsys.readouterr().out
    with pytest.raises(UnknownImage):
        run("show", "web", *root)
