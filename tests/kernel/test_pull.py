"""Images out of a registry into the store: all of it or nothing, and nothing twice."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from images import archive, directory, file, layout_of
from test_images import state
from trees import facts

from flatmount.config import Config, Registry
from flatmount.errors import BadImage, FlatmountError, RegistryError, UsageError
from flatmount.image.registry import open_registry
from flatmount.image.registry_auth import Keychain
from flatmount.image.registry_http import Patience
from flatmount.image.registry_reference import Reference
from flatmount.store import Progressed, Store, StoredImage
from tests.fake_registry import FakeRegistry, Fault, Handler, half, serve, status, tampered

HASTY = Patience(first_pause_s=0.001, longest_pause_s=0.01, idle_s=5.0)
NODES = [
    [directory("etc"), file("etc/passwd", "root:x:0:0::/:/bin/sh\n"), file("gone")],
    [file("etc/hosts", "localhost"), file(".wh.gone")],
    [file("large", random.Random(3).randbytes(700_000))],
]
LAYERS = [archive(nodes) for nodes in NODES]


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with serve() as running:
        running.put_image(LAYERS, "v1")
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(str(tmp_path / "store"), create=True) as opened:
        yield opened


def pull(store: Store, registry: FakeRegistry, tag: str = "v1", name: str | None = None) -> StoredImage:
    config = Config(registries={registry.host: Registry(plain_http=True)})
    keychain = Keychain({"HOME": "/nonexistent"})
    image = open_registry(Reference.parse(f"{registry.host}/app:{tag}"), config, keychain=keychain, patience=HASTY)
    try:
        return store.import_from(image, name=name or image.name)
    finally:
        image.close()


def blobs_asked(registry: FakeRegistry) -> set[str]:
    """The layers, and not the config, that were asked for so far; then forgotten."""
    layers = {
        layer["digest"] for kind, raw in registry.manifests.values() for layer in json.loads(raw).get("layers", [])
    }
    asked = {seen.path.rpartition("/")[2] for seen in registry.asked("/blobs/")}
    registry.seen.clear()
    return asked & layers


def test_the_same_as_from_a_directory(store: Store, registry: FakeRegistry, tmp_path: Path) -> None:
    pulled = pull(store, registry)
    assert pulled.name == f"{registry.host}/app:v1"
    with Store.open(str(tmp_path / "other"), create=True) as other:
        imported = other.import_image(layout_of(str(tmp_path / "layout"), NODES), name="x")
        assert imported.chain_id == pulled.chain_id
        assert [layer.diff_id for layer in imported.layers] == [layer.diff_id for layer in pulled.layers]
        trees = [facts(os.path.join(s.data, s.ensure_flat(i))) for s, i in ((store, pulled), (other, imported))]
    assert trees[0].keys() == trees[1].keys() == {".", "etc", "etc/passwd", "etc/hosts", "large"}
    assert [tree["large"]["content"] for tree in trees] == [trees[0]["large"]["content"]] * 2


def test_a_second_pull_fetches_nothing(store: Store, registry: FakeRegistry) -> None:
    first = pull(store, registry)
    assert len(blobs_asked(registry)) == 3
    before = state(store)
    assert pull(store, registry).digest == first.digest
    assert not blobs_asked(registry)
    assert state(store) == before


def test_what_the_store_has_is_not_fetched(store: Store, registry: FakeRegistry) -> None:
    pull(store, registry)
    blobs_asked(registry)
    new = archive([file("new")])
    registry.put_image([*LAYERS, new], "v2")
    image = pull(store, registry, "v2")
    assert len(image.layers) == 4
    assert len(blobs_asked(registry)) == 1


def test_progress_is_that_of_the_store(store: Store, registry: FakeRegistry) -> None:
    image = open_registry(
        Reference.parse(f"{registry.host}/app:v1"), Config(registries={registry.host: Registry(plain_http=True)})
    )
    seen: list[Progressed] = []
    try:
        store.import_from(image, name="app", progress=seen.append)
    finally:
        image.close()
    assert {(at.layer, at.layers) for at in seen if at.done_bytes == at.total_bytes} == {(1, 3), (2, 3), (3, 3)}


class Held:
    """An answer that comes when it is told to."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def __call__(self, handler: Handler, body: bytes | None) -> None:
        assert self.gate.wait(60)
        handler.answer(200, body or b"")


def layer_digest(registry: FakeRegistry, position: int) -> str:
    digest: str = json.loads(registry.manifests["v1"][1])["layers"][position]["digest"]
    return digest


def test_layers_are_unpacked_side_by_side(store: Store, registry: FakeRegistry) -> None:
    """The third is done while the first has not come; the second removes a file of the first and waits for it."""
    held, third_is_there = Held(), threading.Event()
    registry.fault(layer_digest(registry, 0), held)

    def progress(at: Progressed) -> None:
        if at.layer == 3 and at.done_bytes == at.total_bytes:
            third_is_there.set()

    def release() -> None:
        third_is_there.wait(60)
        held.gate.set()

    releasing = threading.Thread(target=release)
    releasing.start()
    image = open_registry(
        Reference.parse(f"{registry.host}/app:v1"), Config(registries={registry.host: Registry(plain_http=True)})
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.cpu_count", lambda: 3)
            stored = store.import_from(image, name="app", progress=progress)
        assert third_is_there.is_set()
    finally:
        held.gate.set()
        releasing.join()
        image.close()
    assert stat.S_ISCHR(os.lstat(os.path.join(store.data, stored.layers[1].path, "gone")).st_mode)


def test_the_first_failure_ends_all(store: Store, registry: FakeRegistry) -> None:
    """A lower layer that does not come is not waited for when an upper one is known to be bad."""
    held = Held()
    registry.fault(layer_digest(registry, 0), held)
    registry.fault(layer_digest(registry, 2), tampered)
    threading.Timer(1.0, held.gate.set).start()
    before = state(store)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(BadImage, match=layer_digest(registry, 2)):
        patch.setattr("os.cpu_count", lambda: 3)
        pull(store, registry)
    assert state(store) == before


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize(
    ("faults", "kind", "said"),
    [
        ((tampered,), BadImage, "another digest"),
        ((half,) * 30, RegistryError, "bytes of sha256:.* came"),
        ((status(200, b"short"),), BadImage, "5 bytes instead of"),
        ((status(404),), RegistryError, "not found"),
        ((status(503),) * 30, RegistryError, "answers 503"),
    ],
)
def test_a_failure_leaves_the_store_as_it_was(
    store: Store, registry: FakeRegistry, layer: int, faults: tuple[object, ...], kind: type[FlatmountError], said: str
) -> None:
    registry.put_image([archive([file("first")])], "v0")
    pull(store, registry, "v0")
    before = state(store)
    wanted = json.loads(registry.manifests["v1"][1])["layers"][layer]["digest"]
    registry.fault(wanted, *faults)  # type: ignore[arg-type]
    with pytest.raises(kind, match=said) as caught:
        pull(store, registry)
    assert wanted in str(caught.value)
    assert "\n" not in caught.value.line()
    assert state(store) == before
    registry.faults.clear()
    assert len(pull(store, registry).layers) == 3


def test_a_layer_that_is_not_what_the_config_says(store: Store, registry: FakeRegistry) -> None:
    manifest = json.loads(registry.manifests["v1"][1])
    manifest["layers"][0], manifest["layers"][2] = manifest["layers"][2], manifest["layers"][0]
    registry.put_manifest(manifest, "v2")
    before = state(store)
    with pytest.raises(BadImage, match="config says"):
        pull(store, registry, "v2")
    assert state(store) == before


def test_a_name_that_is_none_is_told_before_layers_are_fetched(store: Store, registry: FakeRegistry) -> None:
    with pytest.raises(UsageError, match="cannot be an image's name"):
        pull(store, registry, name="sha256:12")
    assert not blobs_asked(registry)


SCRIPT = 'mount -t tmpfs -o size=1m tmpfs "$1" && shift && exec "$@"'


def test_a_full_disk(registry: FakeRegistry, tmp_path: Path) -> None:
    """What is fetched and what is unpacked lie on one file system; whichever meets its end first, the line is one."""
    registry.put_image([archive([file("a", random.Random(1).randbytes(3_000_000))])], "big")
    command = ["unshare", "-m", "sh", "-c", SCRIPT, "sh", str(tmp_path), sys.executable, "-m", "flatmount"]
    command += ["image", "pull", f"{registry.host}/app:big", "--plain-http", "--root", str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "free space" in done.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_pull_that_is_ended(registry: FakeRegistry, tmp_path: Path, how: signal.Signals) -> None:
    """With one layer unpacked, one half fetched and one waiting; Ctrl-C does not wait for the registry."""
    root = tmp_path / "store"
    wanted = json.loads(registry.manifests["v1"][1])["layers"][1]["digest"]

    def stalls(handler: Handler, body: bytes | None) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body or b"")))
        handler.end_headers()
        handler.wfile.write((body or b"")[:20])
        handler.wfile.flush()
        handler.rfile.read(1)  # until the other side is gone
        handler.close_connection = True

    registry.fault(wanted, stalls)
    command = [sys.executable, "-m", "flatmount", "image", "pull", f"{registry.host}/app:v1", "--plain-http"]
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    with subprocess.Popen(
        [*command, "--root", str(root)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # What a shell without job control starts in the background ignores Ctrl-C, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        try:
            deadline = time.monotonic() + 60
            while not registry.asked(wanted) and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(0.3)
            assert running.poll() is None
            running.send_signal(how)
            _, said = running.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGABRT)  # faulthandler says where each thread waits
            pytest.fail(running.communicate(timeout=60)[1])
        finally:
            running.kill()
    if how is signal.SIGINT:
        assert running.returncode == 130
        assert "interrupted" in said
        assert not os.listdir(root / "v1/data/staging")
    with Store.open(str(root)) as store:
        assert not store.images()
        assert not os.listdir(root / "v1/data/staging")
        assert not os.listdir(root / "v1/data/layers")
        assert len(pull(store, registry).layers) == 3


def stalls_after(count: int) -> Fault:
    """So many bytes of the rest, and then nothing until the other side is gone."""

    def fault(handler: Handler, body: bytes | None) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body or b"")))
        handler.end_headers()
        handler.wfile.write((body or b"")[:count])
        handler.wfile.flush()
        handler.rfile.read(1)
        handler.close_connection = True

    return fault


def kept(store: Store) -> dict[str, int]:
    return {partial.digest: partial.size_bytes for partial in store.broken_pulls()}


def killed_in(registry: FakeRegistry, root: Path, wanted: str, count: int) -> None:
    """A pull that is killed when `count` bytes of the blob `wanted` and the others as a whole are on disk."""
    registry.fault(wanted, stalls_after(count))
    command = [sys.executable, "-m", "flatmount", "image", "pull", f"{registry.host}/app:v1", "--plain-http"]
    with subprocess.Popen([*command, "--root", str(root)]) as running:
        sizes = {layer["digest"]: layer["size"] for layer in json.loads(registry.manifests["v1"][1])["layers"]}
        sizes[wanted] = count
        deadline = time.monotonic() + 60
        while {path.name: path.stat().st_size for path in (root / "v1").glob("partial/*")} != {
            digest.replace(":", "-"): size for digest, size in sizes.items()
        }:
            assert time.monotonic() < deadline
            assert running.poll() is None
            time.sleep(0.01)
        running.kill()


def test_a_killed_pull_is_gone_on_with(registry: FakeRegistry, tmp_path: Path) -> None:
    """What came is in the store's own place with its owner's rights; the next pull asks for the rest alone."""
    root, wanted = tmp_path / "store", layer_digest(registry, 2)
    killed_in(registry, root, wanted, 300_000)
    registry.seen.clear()
    place = root / "v1/partial"
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()} == {0o600}
    with Store.open(str(root)) as store:
        assert kept(store)[wanted] == 300_000
        assert store.check().findings == ()
        assert len(pull(store, registry).layers) == 3
        (asked,) = registry.asked(wanted)
        assert asked.headers["Range"] == "bytes=300000-"
        # The other two had come as a whole: they are not asked for again.
        assert {seen.path.rpartition("/")[2] for seen in registry.asked("/blobs/")} == {
            wanted,
            json.loads(registry.manifests["v1"][1])["config"]["digest"],
        }
        assert kept(store) == {}
        assert os.listdir(place) == []
        assert store.check().findings == ()


@pytest.mark.parametrize("answer", ["whole", "416"])
def test_a_registry_without_ranges_starts_over(registry: FakeRegistry, tmp_path: Path, answer: str) -> None:
    root, wanted = tmp_path / "store", layer_digest(registry, 2)
    killed_in(registry, root, wanted, 100_000)
    registry.ranges = False
    if answer == "416":
        registry.fault(wanted, status(416))
    with Store.open(str(root)) as store:
        image = pull(store, registry)
        assert store.check().findings == ()
        assert os.path.getsize(os.path.join(store.data, image.layers[2].path, "large")) == 700_000


@pytest.mark.parametrize("spoiled", [0, 150_000, 299_999])
def test_a_beginning_that_is_spoiled_is_fetched_again(registry: FakeRegistry, tmp_path: Path, spoiled: int) -> None:
    """As after a power cut: the digest of the whole tells, and the same pull gets it right."""
    root, wanted = tmp_path / "store", layer_digest(registry, 2)
    killed_in(registry, root, wanted, 300_000)
    with open(root / "v1/partial" / wanted.replace(":", "-"), "r+b") as file:
        file.seek(spoiled)
        file.write(b"\0")
    registry.seen.clear()
    with Store.open(str(root)) as store:
        pull(store, registry)
        assert [seen.headers.get("Range") for seen in registry.asked(wanted)] == ["bytes=300000-", None]
        assert store.check().findings == ()
        assert kept(store) == {}


def test_a_lost_registry_leaves_what_came_and_bad_bytes_do_not_stay(store: Store, registry: FakeRegistry) -> None:
    wanted = layer_digest(registry, 2)
    registry.fault(wanted, half, *(status(503),) * 30)
    with pytest.raises(RegistryError, match="answers 503"):
        pull(store, registry)
    assert 0 < kept(store)[wanted] < 700_000
    registry.faults.clear()
    # What was kept is given up for that, once.
    registry.fault(wanted, *[lambda handler, body: handler.answer(206, b"x", {"Content-Range": "bytes 0-0/10"})] * 2)
    with pytest.raises(BadImage, match="10 bytes instead of"):
        pull(store, registry)
    assert wanted not in kept(store)
    registry.fault(wanted, tampered)
    with pytest.raises(BadImage, match="another digest"):
        pull(store, registry)
    assert wanted not in kept(store)
    pull(store, registry)
    assert kept(store) == {}


def test_what_was_kept_goes_after_a_day_and_with_gc(store: Store, registry: FakeRegistry) -> None:
    wanted = layer_digest(registry, 2)
    for _ in range(2):
        registry.fault(wanted, half, *(status(503),) * 30)
        with pytest.raises(RegistryError):
            pull(store, registry)
        registry.faults.clear()
        path = Path(store.root, "v1/partial", wanted.replace(":", "-"))
        assert path.exists()
        os.utime(path, (time.time() - 90_000,) * 2)
        Store.open(store.root).close()
        assert not path.exists()
    assert store.broken_pulls(collect=True)
    assert store.broken_pulls() == ()


def test_two_pulls_of_one_blob_at_once(store: Store, registry: FakeRegistry) -> None:
    """The second one cannot have the file, and does without."""
    held = Held()
    registry.fault(layer_digest(registry, 2), held)
    with Store.open(store.root) as other:
        first = threading.Thread(target=pull, args=(other, registry))
        first.start()
        try:
            deadline = time.monotonic() + 60
            while not registry.asked(layer_digest(registry, 2)):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            pull(store, registry)
            # In the first one's hands: no collection takes it.
            assert store.broken_pulls(collect=True) == ()
        finally:
            held.gate.set()
            first.join()
        assert len(store.images()) == 1
        assert os.listdir(os.path.join(store.root, "v1/partial")) == []
