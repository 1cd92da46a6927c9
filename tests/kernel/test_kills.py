"""SIGKILL and power cuts at random moments: what was said to be stored is there, and nothing is there by half.

Each round does one operation, with something to do for it, in a process of its own. How long the operation takes is
learned from those that come to their end, and the blow falls at a moment drawn evenly from that time: so the moments
are spread over all of it, its opening of the store and sweeping included. In the end it is printed how they were.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from images import Node, directory, file, hardlink, layout_of, symlink
from trees import facts

from flatmount.config import Config, Registry
from flatmount.errors import UnknownImage
from flatmount.image import open_source
from flatmount.image.layout_writer import new_layout
from flatmount.image.registry import open_registry
from flatmount.image.registry_auth import Keychain
from flatmount.image.registry_reference import Reference
from flatmount.store import FlatForm, Part, Store
from tests.conftest import SOAK
from tests.disks import cut_power, mounted_disk, new_disk
from tests.registries import registry_process

KILLS = 500 if SOAK else 50
POWER_CUTS = 50 if SOAK else 5
VERBS = ("pull", "unpack", "flatten", "erofs", "remove", "collect", "repair", "export")
LATE = 1.15  # of an operation's usual time: some blows come when it is just done
LATE_CUT = 1.6  # more of them, because what is done must be on disk

Tree = dict[str, dict[str, object]]


def layer(tag: str, count: int) -> list[Node]:
    nodes = [directory(tag), *(file(f"{tag}/{i}", f"{tag} {i}\n" * (1 + i * 20), uid=i % 5) for i in range(count))]
    return [*nodes, hardlink(f"{tag}/same", f"{tag}/1"), symlink(f"{tag}/link", "1"), file("shared", tag)]


LAYERS = {
    "base": layer("base", 30),
    "middle": [*layer("middle", 20), file("base/.wh.2"), file("base/3", "another")],
    "top": [*layer("top", 25), directory("base"), file("base/.wh..wh..opq"), file("base/new")],
    "other": layer("other", 40),
    "linked": [file("x"), hardlink("y", "base/5")],
}
IMAGES = {
    "one": ("base", "middle", "top"),
    "two": ("base", "middle", "linked"),
    "three": ("base", "other"),
}


@dataclass(frozen=True)
class Images:
    """The images as layouts and in a registry, and what their flat trees look like where nobody kills anybody."""

    layouts: dict[str, str]
    host: str
    digests: dict[str, str]
    trees: dict[str, Tree]

    def pull(self, store: Store, name: str) -> None:
        config = Config(registries={self.host: Registry(plain_http=True)})
        reference = Reference.parse(f"{self.host}/{name}:latest")
        image = open_registry(reference, config, keychain=Keychain({"HOME": "/nonexistent"}))
        try:
            store.import_from(image, name=name)
        finally:
            image.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    place = tmp_path_factory.mktemp("images")
    layouts = {name: layout_of(str(place / name), [LAYERS[part] for part in parts]) for name, parts in IMAGES.items()}
    trees = {}
    for name, path in layouts.items():
        with Store.open(str(tmp_path_factory.mktemp("calm") / "store"), create=True) as store:
            store.import_image(path, name=name)
            trees[name] = flat_facts(store, name)
    with registry_process(place) as host:
        for name, path in layouts.items():
            copy = ["skopeo", "--insecure-policy", "copy", "--quiet", "--preserve-digests", "--dest-tls-verify=false"]
            subprocess.run([*copy, f"oci:{path}", f"docker://{host}/{name}:latest"], check=True, timeout=60)
        yield Images(layouts, host, {name: manifest_digest(path) for name, path in layouts.items()}, trees)


def manifest_digest(layout: str) -> str:
    return str(json.loads(Path(layout, "index.json").read_text())["manifests"][0]["digest"])


def flat_facts(store: Store, name: str) -> Tree:
    tree = facts(os.path.join(store.data, store.ensure_flat(store.image(name))))
    del tree["."]
    return tree


def forget(store: Store, digest: str) -> None:
    with contextlib.suppress(UnknownImage):
        store.remove_image(digest)


def prepare(images: Images, root: str, verb: str, name: str, chance: random.Random) -> dict[str, str]:
    """Give `verb` something to do with the image `name`; returns which image each name has then."""
    with Store.open(root, create=True) as store:
        if verb in ("pull", "unpack", "flatten", "erofs", "collect"):
            forget(store, images.digests[name])
        if verb in ("flatten", "erofs", "remove", "repair", "export"):
            store.import_image(images.layouts[name], name=name)
        if verb in ("remove", "repair", "export") and chance.random() < 0.5:
            store.ensure_flat(store.image(name), chance.choice([*FlatForm]))
        if verb == "collect":
            # Its name goes to another image, so that nothing wants it any more.
            other = chance.choice([each for each in IMAGES if each != name])
            store.import_image(images.layouts[name], name="loose")
            store.ensure_flat(store.image("loose"))
            store.import_image(images.layouts[other], name="loose")
        if verb == "repair":
            spoil(store, name, chance)
        return named(store, images)


def named(store: Store, images: Images) -> dict[str, str]:
    digests = {digest: name for name, digest in images.digests.items()}
    return {image.name: digests[image.digest] for image in store.images() if image.name is not None}


def spoil(store: Store, name: str, chance: random.Random) -> None:
    """Another content of one file, which none of its other facts tells."""
    bottom = Path(store.data, store.image(name).layers[0].path)
    path = bottom / "base" / str(chance.randrange(6, 30))
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def work(images: Images, root: str, verb: str, name: str, out: str) -> None:
    """One operation, as its command does it."""
    with Store.open(root) as store:
        if verb == "pull":
            images.pull(store, name)
        elif verb == "unpack":
            store.import_image(images.layouts[name], name=name)
        elif verb == "flatten":
            store.ensure_flat(store.image(name))
        elif verb == "erofs":
            store.ensure_flat(store.image(name), FlatForm.EROFS)
        elif verb == "remove":
            store.remove_image(name)
        elif verb == "collect":
            store.collect()
        elif verb == "repair":
            repair(store, images)
        else:
            with new_layout(out, made_by="test") as layout:
                store.export([store.image(name)], layout)


def repair(store: Store, images: Images) -> None:
    """As often as something is found: a layer that was linked to the bad one is bad when that one is right again."""
    with contextlib.ExitStack() as stack:
        sources = [open_source(path) for path in images.layouts.values()]
        for source in sources:
            stack.callback(source.close)
        for _ in range(4):
            findings = store.check().findings
            if not findings:
                return
            store.repair(findings, sources)


@dataclass
class Moments:
    """When the blows fell, as parts of what the operation usually takes; and how many of them were within it."""

    usual_s: float = 0.0
    within: list[float] = field(default_factory=list)
    rounds: int = 0

    def learn(self, took_s: float) -> None:
        self.usual_s = took_s if not self.usual_s else 0.7 * self.usual_s + 0.3 * took_s

    def thirds(self) -> tuple[int, int, int]:
        count = [0, 0, 0]
        for moment in self.within:
            count[min(2, int(moment * 3))] += 1
        return count[0], count[1], count[2]


def strike(
    images: Images,
    root: str,
    verb: str,
    name: str,
    out: str,
    moments: Moments,
    at: float | None,
    blow: Callable[[], None],
) -> bool:
    """Do `verb` in a child and let `blow` fall at the part `at` of its usual time; whether it was done before that.

    Without `at`, it is left alone. Either way its process is gone afterwards.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            os.write(writing, b"b")
            work(images, root, verb, name, out)
            os.write(writing, b"d")
        except BaseException as error:
            os.write(writing, b"!" + str(error).encode()[:400])
        finally:
            os._exit(0)
    os.close(writing)
    moments.rounds += 1
    try:
        assert os.read(reading, 1) == b"b"
        began = time.monotonic()
        told, _, _ = select.select([reading], [], [], 60 if at is None else at * moments.usual_s)
        struck_s = time.monotonic() - began
        if at is not None:
            blow()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        rest = os.read(reading, 500)
    finally:
        os.close(reading)
    if told:
        assert rest == b"d", f"{verb} {name}: {rest!r}"
        moments.learn(struck_s)
    elif rest != b"d":
        moments.within.append(struck_s / moments.usual_s)
    return rest == b"d"


def assert_whole(images: Images, root: str, verb: str, name: str, before: dict[str, str], done: bool) -> None:
    """The names have what they had, or what the operation gives them; everything is whole, and nothing is beside it."""
    after = dict(before)
    if verb in ("pull", "unpack"):
        after[name] = name
    elif verb == "remove":
        after.pop(name)
    with Store.open(root) as store:
        found = store.check().findings
        if verb == "repair" and not done:
            # It may be bad still; nothing else may be.
            assert {finding.part for finding in found} <= {Part.LAYER, Part.FLAT}, found
            repair(store, images)
            found = store.check().findings
        assert found == (), found
        assert named(store, images) in ([after] if done else [before, after])
        if verb == "collect" and done:
            assert store.unused_images() == ()
        for held, image in named(store, images).items():
            assert flat_facts(store, held) == images.trees[image]
        assert store.check().findings == ()
        kept = {partial.digest.replace(":", "-") for partial in store.broken_pulls()}
        assert set(os.listdir(os.path.join(root, "v1/partial"))) == kept
        for place in ("staging", "trash"):
            assert os.listdir(os.path.join(store.data, place)) == []


def assert_layout(out: str) -> None:
    """An export is there as a whole or not at all."""
    if os.path.exists(out):
        image = open_source(out)
        try:
            for position, descriptor in enumerate(image.manifest.layers):
                with image.open_layer(position) as blob:
                    assert "sha256:" + hashlib.sha256(blob.read()).hexdigest() == descriptor.digest
        finally:
            image.close()


def calm_rounds(images: Images, root: str, out: Path, moments: dict[str, Moments], verbs: tuple[str, ...]) -> None:
    """Twice each, left alone: how long they take, and that they are done when they say so."""
    chance = random.Random(1)
    for verb in (*verbs, *verbs):
        name = chance.choice([*IMAGES])
        before = prepare(images, root, verb, name, chance)
        target = str(out / f"calm-{verb}-{moments[verb].rounds}")
        assert strike(images, root, verb, name, target, moments[verb], None, lambda: None)
        assert_whole(images, root, verb, name, before, True)
        assert_layout(target)
        moments[verb].rounds -= 1


def rounds(moments: dict[str, Moments], least: int, enough: Callable[[], bool]) -> Iterator[tuple[int, str]]:
    """A number and a verb for each round: the verbs in turn, and then those that no blow has met yet.

    Where a blow falls is chance: of five, all come too late in one of a hundred runs.
    """
    verbs = [*moments]
    for count in range(20 * least):
        missed = [verb for verb in verbs if not moments[verb].within]
        if count < least:
            yield count, verbs[count % len(verbs)]
        elif not enough():
            yield count, (missed or verbs)[count % len(missed or verbs)]


def hits(moments: dict[str, Moments]) -> int:
    """How many blows fell within an operation."""
    return sum(len(each.within) for each in moments.values())


def told(moments: dict[str, Moments], began: float, what: str) -> None:
    """Print how the blows were spread."""
    within, count = hits(moments), sum(each.rounds for each in moments.values())
    print(f"{count} {what} in {time.monotonic() - began:.0f} s, {within} of them within an operation:")
    for verb, each in moments.items():
        thirds = "/".join(map(str, each.thirds()))
        print(f"  {verb:8} {each.rounds:4} rounds, {len(each.within):4} within, {thirds} in its thirds,", end="")
        print(f" usually {each.usual_s * 1000:.0f} ms")


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_kill_loses_nothing_and_leaves_nothing_by_half(ram: Path, images: Images, seed: int) -> None:
    chance = random.Random(seed)
    root, out, began = str(ram / "store"), ram / "out", time.monotonic()
    moments = {verb: Moments() for verb in VERBS}
    out.mkdir()
    with Store.open(root, create=True):
        pass
    calm_rounds(images, root, out, moments, VERBS)

    def enough() -> bool:
        return all(each.within for each in moments.values()) and hits(moments) > KILLS // 4

    for count, verb in rounds(moments, KILLS, enough):
        name = chance.choice([*IMAGES])
        before = prepare(images, root, verb, name, chance)
        target = str(out / str(count))
        done = strike(images, root, verb, name, target, moments[verb], chance.random() * LATE, lambda: None)
        assert_whole(images, root, verb, name, before, done)
        assert_layout(target)
        shutil.rmtree(out)
        out.mkdir()
    told(moments, began, "kills")
    assert enough()
    if SOAK:
        assert all(min(each.thirds()) >= 3 for each in moments.values())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 in a file, not mounted yet."""
    image = tmp_path / "disk.img"
    new_disk(image, 128 << 20)
    yield image
    image.unlink()


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_power_cut_loses_nothing_that_was_stored(disk: Path, tmp_path: Path, images: Images, seed: int) -> None:
    """FS_IOC_SHUTDOWN stops the file system as a power cut does: what is only in memory never reaches the disk."""
    chance = random.Random(seed)
    place, out, began, done = tmp_path / "mnt", tmp_path / "out", time.monotonic(), 0
    root, verbs = str(place / "store"), VERBS[:-1]  # an export is on another disk
    moments = {verb: Moments() for verb in verbs}
    place.mkdir()
    out.mkdir()
    with mounted_disk(disk, place):
        with Store.open(root, create=True):
            pass
        calm_rounds(images, root, out, moments, verbs)
    for _, verb in rounds(moments, POWER_CUTS, lambda: hits(moments) > 0):
        name = chance.choice([*IMAGES])
        with mounted_disk(disk, place):
            before = prepare(images, root, verb, name, chance)
            at = chance.random() * LATE_CUT
            stored = strike(images, root, verb, name, str(out / "x"), moments[verb], at, lambda: cut_power(place))
        with mounted_disk(disk, place):
            assert_whole(images, root, verb, name, before, stored)
        done += stored
    print(f"{done} operations done before their power cut")
    told(moments, began, "power cuts")
    assert hits(moments)
