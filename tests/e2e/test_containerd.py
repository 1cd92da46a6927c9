"""containerd and runc with our snapshotter: images come in by `ctr`, and containers run from them.

With Debian's, or with those in the directory that FLATMOUNT_CONTAINERD names.
"""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from flatmount.cli.main import main
from flatmount.image.layer_tar import LayerTar
from flatmount.image.layout_writer import new_layout
from flatmount.kernel.namespaces import enter_private_mounts
from flatmount.snapshotter import containerd as configuration
from tests import registries
from tests.conftest import SOAK
from tests.snapshotting import Daemon, kept_trees, own_mounts, serving

# Another containerd than the machine's: a directory with containerd, its shim and ctr.
PATH = os.pathsep.join(filter(None, (os.environ.get("FLATMOUNT_CONTAINERD"), os.environ["PATH"])))
LAYERS = 12
FIRST = 400000
NAMESPACE = "default"


@dataclass(frozen=True)
class Containerd:
    """One containerd of ours, with the snapshotter as a proxy."""

    directory: Path
    snapshotter: Daemon

    @property
    def log(self) -> str:
        return (self.directory / "containerd.log").read_text()

    @property
    def program(self) -> str:
        return shutil.which("ctr", path=PATH) or "ctr"

    def ctr_bytes(self, *arguments: str) -> bytes:
        command = [self.program, "--address", str(self.directory / "c.sock"), *arguments]
        done = subprocess.run(command, capture_output=True, timeout=120, check=False)
        said = f"{arguments}: {done.stdout[-3000:]!r}\n{done.stderr.decode()}\n{self.snapshotter.log[-3000:]}"
        assert done.returncode == 0, said
        return done.stdout

    def ctr(self, *arguments: str) -> str:
        return self.ctr_bytes(*arguments).decode()

    def connected(self) -> None:
        """Wait until containerd, which backs off for some seconds, has found the restarted service again."""
        deadline = time.monotonic() + 60
        asking = [self.program, "--address", str(self.directory / "c.sock"), "snapshots", "--snapshotter", "flatmount"]
        while subprocess.run([*asking, "mounts", "/x", "survivor"], capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline, self.snapshotter.log[-3000:]
            time.sleep(0.1)

    def run(self, image: str, name: str, script: str, *options: str) -> str:
        return self.ctr("run", "--rm", "--snapshotter", "flatmount", *options, image, name, "sh", "-ec", script)

    def settle(self) -> None:
        """Wait until containerd has collected what removed containers left."""
        deadline = time.monotonic() + 60
        # A lease that is given back with --sync makes containerd collect now.
        self.ctr("leases", "create", "--id", "collect")
        self.ctr("leases", "delete", "--sync", "collect")
        with self.snapshotter.client() as client:
            while client.names("kind==active", "kind==view") or own_mounts(self.snapshotter):
                assert time.monotonic() < deadline, client.names("kind==active", "kind==view")
                time.sleep(0.1)


# Who knows of unpacking layers side by side does it from 2 on; others pass over the key.
CONFIGURATION = """version = 2
root = "{place}/root"
state = "{place}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{place}/c.sock"
[ttrpc]
  address = "{place}/c.ttrpc"
[debug]
  level = "debug"
[plugins."io.containerd.transfer.v1.local"]
  max_concurrent_unpacks = 4
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo image as an OCI archive."""
    layout = tmp_path_factory.mktemp("image") / "layout"
    assert main(["image", "demo", "--layers", str(LAYERS), "--out", str(layout)]) == 0
    with tarfile.open(layout.with_suffix(".tar"), "w") as tar:
        for name in ("oci-layout", "index.json", "blobs"):
            tar.add(layout / name, name)
    return layout.with_suffix(".tar")


@contextmanager
def open_directory() -> Iterator[Path]:
    """A directory that a runtime in a user namespace can walk through, which pytest's own are not."""
    directory = Path(tempfile.mkdtemp(prefix="flatmount-", dir="/tmp"))
    directory.chmod(0o711)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="module", params=["overlay", "bind", "helper"])
def containerd(request: pytest.FixtureRequest) -> Iterator[Containerd]:
    enter_private_mounts()
    with open_directory() as directory, serving(directory, request.param) as snapshotter:
        text = CONFIGURATION.format(place=directory)
        (directory / "config.toml").write_text(configuration.install(text, str(snapshotter.socket), cri=False))
        with open(directory / "containerd.log", "wb") as log:
            process = subprocess.Popen(
                [shutil.which("containerd", path=PATH) or "containerd", "--config", str(directory / "config.toml")],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PATH": PATH},
            )
        engine = Containerd(directory, snapshotter)
        try:
            deadline = time.monotonic() + 60
            while subprocess.run(
                [engine.program, "--address", str(directory / "c.sock"), "version"], capture_output=True, check=False
            ).returncode:
                assert time.monotonic() < deadline, engine.log[-3000:]
                time.sleep(0.1)
            yield engine
        finally:
            process.terminate()
            process.wait(timeout=60)


@pytest.fixture(scope="module")
def image(containerd: Containerd, archive: Path) -> str:
    containerd.ctr("images", "import", "--snapshotter", "flatmount", str(archive))
    name = containerd.ctr("images", "ls", "-q").split()[0]
    containerd.run(name, "first", "true")
    with containerd.snapshotter.client() as client:
        assert len(client.names("kind==committed")) == LAYERS
    return name


def test_silent_clients_cost_containerd_no_call(containerd: Containerd, image: str) -> None:
    """As many as the service takes come after each of its calls, so that its connection has been silent longest."""
    for _ in range(20 if SOAK else 4):
        assert containerd.ctr("snapshots", "--snapshotter", "flatmount", "ls").count("Committed") == LAYERS
        with ExitStack() as stack:
            for _ in range(1030):
                silent = stack.enter_context(socket.socket(socket.AF_UNIX))
                silent.connect(str(containerd.snapshotter.socket))
            assert silent.recv(1), "it is greeted when all before it were"
            assert containerd.ctr("snapshots", "--snapshotter", "flatmount", "ls").count("Committed") == LAYERS


def test_an_unmapped_container_runs_and_is_committed_by_containerds_own_diff(
    containerd: Containerd, image: str
) -> None:
    script = "id -u; echo changed > /etc/new; stat -c %u:%g /etc/passwd"
    assert containerd.run(image, "plain", script).split() == ["0", "0:0"]
    script = "echo x > /etc/new; rm /etc/passwd; touch /done; sleep 60"
    containerd.ctr("run", "-d", "--snapshotter", "flatmount", image, "kept", "sh", "-c", script)
    try:
        containerd.ctr("task", "exec", "--exec-id", "a", "kept", "sh", "-c", "until [ -e /done ]; do sleep 0.1; done")
        layer = io.BytesIO(containerd.ctr_bytes("snapshots", "--snapshotter", "flatmount", "diff", "kept"))
        with tarfile.open(fileobj=layer) as tar:
            changes = {member.name.rstrip("/"): (member.uid, member.gid) for member in tar}
        assert {"etc/new", "etc/.wh.passwd", "done"} <= set(changes)
        assert "etc/group" not in changes
        assert set(changes.values()) == {(0, 0)}
    finally:
        containerd.ctr("task", "rm", "--force", "kept")
        containerd.ctr("container", "rm", "kept")
    containerd.settle()


def test_a_user_namespaced_container_runs_on_an_engine_that_has_none_for_proxies(
    containerd: Containerd, image: str
) -> None:
    script = (
        "id -u; awk '{print $2}' /proc/self/uid_map; stat -c %u:%g / /etc/passwd; echo x > /new; stat -c %u:%g /new;"
        "chmod 700 /etc; grep -c ' / / ' /proc/self/mountinfo"
    )
    mapping = f"0:{FIRST}:65536"
    said = containerd.run(image, "mapped", script, "--uidmap", mapping, "--gidmap", mapping, "--remap-labels").split()
    assert said == ["0", str(FIRST), "0:0", "0:0", "0:0", "1"]
    containerd.settle()


def test_a_mapped_containers_layer_is_right_by_ours_and_not_by_containerds_own_diff(
    containerd: Containerd, image: str, tmp_path: Path
) -> None:
    mapping = f"0:{FIRST}:65536"
    script = "echo x > /etc/new; rm /etc/passwd; touch /done; sleep 60"
    containerd.ctr(
        "run", "-d", "--snapshotter", "flatmount", "--uidmap", mapping, "--gidmap", mapping, "--remap-labels",
        image, "changed", "sh", "-c", script,
    )  # fmt: skip
    try:
        containerd.ctr(
            "task", "exec", "--exec-id", "a", "changed", "sh", "-c", "until [ -e /done ]; do sleep 0.1; done"
        )
        theirs, ours = io.BytesIO(), tmp_path / "layer.tar"
        theirs.write(containerd.ctr_bytes("snapshots", "--snapshotter", "flatmount", "diff", "changed"))
        root = str(containerd.snapshotter.root)
        assert main(["snapshotter", "diff", "changed", "--root", root, "--output", str(ours)]) == 0
        theirs.seek(0)
        with tarfile.open(fileobj=theirs) as tar:
            assert max(member.uid for member in tar) >= FIRST
        with tarfile.open(ours) as tar:
            changes = {member.name.rstrip("/"): (member.uid, member.gid) for member in tar}
        assert set(changes) == {"etc", "etc/new", "etc/.wh.passwd", "done"}
        assert set(changes.values()) == {(0, 0)}
    finally:
        containerd.ctr("task", "rm", "--force", "changed")
        containerd.ctr("container", "rm", "changed")
    containerd.settle()


def write_layers(layout: Path, *, wrong: int | None = None) -> None:
    """An image whose layers take away, hide and link, with a shell: every one of them needs those below to be right.

    Layer number `wrong` is another than its configuration says.
    """
    layers = [LayerTar() for _ in range(8)]
    for name in ("dev", "proc", "run", "sys", "tmp"):
        layers[0].directory(name)
    layers[0].file("bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755)
    layers[0].symlink("bin/sh", "busybox")
    for name in ("etc/gone", "etc/kept", "dir/below", "dir/hidden"):
        layers[0].file(name, b"0")
    layers[0].file("etc/owned", b"0", owner=(1000, 1001))
    layers[1].remove("etc/gone")
    layers[1].file("dir/above", b"1")
    layers[2].hide("dir")
    layers[2].file("dir/only", b"2")
    layers[3].file("etc/one", b"3")
    layers[3].hardlink("etc/two", "etc/one")
    layers[4].file("etc/gone", b"4")
    layers[5].remove("etc/gone")
    layers[6].file("etc/kept", b"6")
    layers[7].directory("tmp", mode=0o700)
    machine = os.uname().machine.replace("x86_64", "amd64").replace("aarch64", "arm64")
    with new_layout(str(layout), made_by="a test") as writing:
        written = [writing.add_layer([layer.finish()]) for layer in layers]
        if wrong is not None:
            written[wrong] = replace(written[wrong], diff_id=f"sha256:{'0' * 64}")
        config = {"architecture": machine, "os": "linux", "config": {"Env": ["PATH=/bin"]}}
        writing.add_image(config, written, name="layers")


def push(layout: Path, host: str) -> str:
    """Bring an image of `write_layers` into a registry; its reference there."""
    reference = f"{host}/test/layers:1"
    copy = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"]
    subprocess.run([*copy, f"oci:{layout}:layers", f"docker://{reference}"], check=True, timeout=60)
    return reference


def test_a_pull_that_fails_at_a_layer_leaves_nothing_half_unpacked(containerd: Containerd, tmp_path: Path) -> None:
    """Side by side or not, containerd takes back what it has begun."""
    write_layers(tmp_path / "layout", wrong=4)
    with registries.registry_process(tmp_path) as host:
        command = [containerd.program, "--address", str(containerd.directory / "c.sock"), "images", "pull"]
        command += ["--plain-http", "--snapshotter", "flatmount", push(tmp_path / "layout", host)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode
    assert "wrong diff id" in done.stderr
    containerd.settle()


def test_a_pulled_image_is_right_whether_its_layers_came_side_by_side_or_not(
    containerd: Containerd, tmp_path: Path
) -> None:
    """containerd from 2.2 on may unpack all layers at once, each without a parent, and names it at the commit."""
    write_layers(tmp_path / "layout")
    with registries.registry_process(tmp_path) as host:
        reference = push(tmp_path / "layout", host)
        containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "flatmount", reference)
    asking = [shutil.which("containerd", path=PATH) or "containerd", "config", "default"]
    defaults = subprocess.run(asking, capture_output=True, text=True, check=True, timeout=30).stdout
    told = [line for line in containerd.log.splitlines() if 'msg="image unpacked"' in line]
    assert ("parallel=true" in "".join(told)) is ("max_concurrent_unpacks" in defaults), told
    script = (
        "b=/bin/busybox; $b ls /etc /dir; $b stat -c %u:%g /etc/owned; $b stat -c %a /tmp; $b cat /etc/kept; echo;"
        " [ /etc/one -ef /etc/two ] && echo linked"
    )
    mapping = f"0:{FIRST}:65536"
    try:
        for name, options in {
            "plain": (),
            "mapped": ("--uidmap", mapping, "--gidmap", mapping, "--remap-labels"),
        }.items():
            said = containerd.run(reference, name, script, *options).split()
            assert said == [
                *("/dir:", "only", "/etc:", "kept", "one", "owned", "two"),
                *("1000:1001", "700", "6", "linked"),
            ]
    finally:
        containerd.ctr("images", "rm", "--sync", reference)
    containerd.settle()


def test_a_container_runs_through_a_kill_of_the_snapshotter(containerd: Containerd, image: str) -> None:
    mapping = f"0:{FIRST + 65536}:65536"
    containerd.ctr(
        "run", "-d", "--snapshotter", "flatmount", "--uidmap", mapping, "--gidmap", mapping, "--remap-labels",
        image, "survivor", "sh", "-c", "while :; do echo alive >> /count; sleep 0.05; done",
    )  # fmt: skip
    try:
        containerd.snapshotter.stop(9)
        containerd.snapshotter.start()
        containerd.connected()
        # It writes on: what it had written by now is not all.
        going_on = "n=$(wc -l < /count); until [ $(wc -l < /count) -gt $n ]; do sleep 0.05; done"
        containerd.ctr("task", "exec", "--exec-id", "a", "survivor", "sh", "-c", going_on)
        with containerd.snapshotter.client() as client:
            assert any(name.endswith("/survivor") for name in client.names("kind==active"))
    finally:
        containerd.ctr("task", "rm", "--force", "survivor")
        containerd.ctr("container", "rm", "survivor")
    containerd.settle()


def test_an_image_that_is_removed_leaves_nothing(containerd: Containerd, image: str) -> None:
    containerd.ctr("images", "rm", "--sync", image)
    deadline = time.monotonic() + 60
    data = containerd.snapshotter.data
    while kept_trees(data / "snapshots") or os.listdir(data / "trash"):
        assert time.monotonic() < deadline, kept_trees(data / "snapshots")
        time.sleep(0.2)
