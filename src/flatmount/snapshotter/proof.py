"""Proving on this machine that an engine starts containers from our snapshots, and the record of what was proven.

A proof starts a containerd and a service of their own, a container through one door, and looks at it from outside: its
root file system, the owners of its files, and how many mounts it added to the host's table.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from flatmount.errors import FlatmountError, StoreError
from flatmount.kernel.mounts import read_table
from flatmount.plan.mapping import Mapping
from flatmount.runtime.daemons import afterwards
from flatmount.snapshotter.cri import Pods
from flatmount.snapshotter.docker import running_docker
from flatmount.snapshotter.engine import PAUSE_IMAGE, POD_SUBNET, Engine, engine_place, running_engine
from flatmount.snapshotter.nerdctl import RANGE_FILES, nerdctl_on, offers_ranges, root_has_range

# "cni" is Kubernetes' door with pods in networks of their own, which real plugins make.
DOORS = ("ctr", "cri", "cni", "docker", "nerdctl")
SCHEMA = "flatmount.containerd.proofs/1"
_FILE = "proofs.json"
_MAPPING = Mapping.single(1879048192)
_DOCKERS = ("docker", _MAPPING)
_LAYERS = 5
_NAMES = {"ctr": "default", "cri": "k8s.io", "cni": "k8s.io", "docker": "moby", "nerdctl": "default"}
_SETTLE_S = 20.0


class _NotOffered(Exception):
    """There is no way to ask for a range: pods before containerd 1.7 have none, nor nerdctl with every containerd."""


WriteImage = Callable[[str, int], None]
_Begun = AbstractContextManager[tuple[list[str], list[int]]]


@dataclass(frozen=True, slots=True)
class Proof:
    """What was seen through one door, with or without a user namespace.

    `mounts` are those that one container added to the host's table, of a pod's sandbox and its container together.
    `problem` is "" where everything was right.
    """

    door: str
    engine: str
    form: str
    mapped: bool
    mounts: int
    problem: str
    kernel: str
    proven_at: str

    @property
    def key(self) -> tuple[str, str, str, bool]:
        """A newer proof takes the place of one with the same key."""
        return self.door, self.engine, self.form, self.mapped


def prove(doors: Sequence[str], write_image: WriteImage, *, form: str = "auto", programs: str = "") -> list[Proof]:
    """Prove each door, without a user namespace and with one. Leaves nothing behind but cgroup directories' names.

    Args:
        doors: of DOORS.
        write_image: writes an OCI layout whose program waits, with a number of layers, to a path.
        form: the service's form of answer.
        programs: a directory with the engine's programs; "" for PATH.

    What the engine has no way to be asked for is left out. Mounts are made in the calling thread's mount namespace.
    Raises: MissingFeature; FlatmountError where the engine does not start. What fails behind that is a proof with a
    problem.
    """
    with engine_place() as place:
        write_image(f"{place}/image", _LAYERS)
        archive = f"{place}/image.tar"
        subprocess.run(["tar", "-C", f"{place}/image", "-cf", archive, "."], check=True)
        work = f"{place}/engine"
        os.mkdir(work, 0o711)
        cni = "cni" in doors
        with running_engine(work, form=form, cri=cni or "cri" in doors, bridge=cni, programs=programs) as engine:
            # Docker has one range for all of its containers and tells snapshotters of none.
            asked = [(door, mapping) for door in doors for mapping in (None, _MAPPING) if (door, mapping) != _DOCKERS]
            made = (_proof(engine, door, mapping, archive) for door, mapping in asked)
            return [proof for proof in made if proof is not None]


def _proof(engine: Engine, door: str, mapping: Mapping | None, archive: str) -> Proof | None:
    problem, mounts, before = "", 0, _mount_points()
    try:
        namespace = _NAMES[door]
        if door != "docker":
            engine.take_image(archive, PAUSE_IMAGE, namespace=namespace)
        before = _mount_points()
        with _begun(engine, door, mapping, archive) as (names, processes):
            mounts = len(_mount_points() - before - _of_sandboxes(engine))
            for name in names:
                problem = problem or _not_ours(engine, door, name)
            for process in processes:
                problem = problem or _looked_at(process, mapping)
                problem = problem or (_network_of(process) if door == "cni" else "")
        problem = problem or _settled(engine, before)
    except _NotOffered:
        _settled(engine, before)
        return None
    except FlatmountError as error:
        problem = error.line()
    return Proof(
        door=door,
        engine=f"containerd {engine.version}",
        form=engine.form,
        mapped=mapping is not None,
        mounts=mounts,
        problem=problem,
        kernel=platform.release(),
        proven_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _begun(engine: Engine, door: str, mapping: Mapping | None, archive: str) -> _Begun:
    if door == "docker":
        return _docker_container(engine, archive)
    if door == "nerdctl":
        return _nerdctl_container(engine, mapping)
    return _ctr_container(engine, mapping) if door == "ctr" else _pod(engine, mapping, own_network=door == "cni")


def _not_ours(engine: Engine, door: str, name: str) -> str:
    """Whether a container has its root file system from somebody else."""
    own = ("-n", _NAMES[door])
    if door == "docker":  # which asks for snapshots itself, and tells containerd of none
        listed = engine.ctr(*own, "snapshots", "--snapshotter", "flatmount", "ls").split()
        return "" if name in listed else "it took another snapshotter than ours"
    used = json.loads(engine.ctr(*own, "containers", "info", name))["Snapshotter"]
    return "" if used == "flatmount" else f"it took the snapshotter {used!r} instead of ours"


@contextmanager
def _ctr_container(engine: Engine, mapping: Mapping | None) -> Iterator[tuple[list[str], list[int]]]:
    options: list[str] = []
    if mapping is not None:
        options = ["--uidmap", str(mapping.uids[0]), "--gidmap", str(mapping.gids[0]), "--remap-labels"]
    with afterwards(lambda: engine.remove("proof")):
        engine.ctr("run", "--detach", "--snapshotter", "flatmount", *options, PAUSE_IMAGE, "proof")
        yield ["proof"], [engine.tasks()["proof"]]


@contextmanager
def _pod(engine: Engine, mapping: Mapping | None, *, own_network: bool) -> Iterator[tuple[list[str], list[int]]]:
    with Pods(engine.socket) as pods:
        pods.wait_for_image(PAUSE_IMAGE)
        pod, config = pods.run("proof", mapping=mapping, own_network=own_network)
        with afterwards(lambda: pods.remove(pod)):
            container = pods.start(pod, config, PAUSE_IMAGE)
            tasks = engine.tasks(_NAMES["cri"])
            yield [pod, container], [tasks[pod], tasks[container]]


@contextmanager
def _docker_container(engine: Engine, archive: str) -> Iterator[tuple[list[str], list[int]]]:
    with running_docker(engine) as docker:
        said = docker("load", "-i", archive).split()
        name = docker("run", "--detach", "--network", "none", said[-1]).strip()

        def remove() -> None:
            docker("rm", "--force", name)
            docker("rmi", "--force", said[-1])

        with afterwards(remove):
            process = int(docker("inspect", "--format", "{{.State.Pid}}", name))
            yield [name], [process]


@contextmanager
def _nerdctl_container(engine: Engine, mapping: Mapping | None) -> Iterator[tuple[list[str], list[int]]]:
    nerdctl = nerdctl_on(engine)
    with ExitStack() as stack:
        options: list[str] = []
        if mapping is not None:
            if not offers_ranges(engine, nerdctl):
                raise _NotOffered
            options = ["--userns-remap", stack.enter_context(root_has_range(engine, mapping))]
        wanted = ("run", "--detach", "--pull", "never", "--network", "none", *options, PAUSE_IMAGE)
        name = nerdctl(*wanted).strip()

        def remove() -> None:
            nerdctl("rm", "--force", name)

        stack.enter_context(afterwards(remove))
        yield [name], [int(nerdctl("inspect", "--format", "{{.State.Pid}}", name))]


def _mount_points() -> set[str]:
    return {entry.mount_point for entry in read_table()}


def _of_sandboxes(engine: Engine) -> set[str]:
    """What is mounted besides root file systems.

    By CRI and Docker a pod's shm, names of namespaces and Docker's own directory; by us root's ranges for nerdctl.
    """
    state = f"{engine.place}/state/io.containerd.grpc.v1.cri/"
    others = (state, "/run/netns/", "/var/run/netns/", f"{engine.place}/docker/exec/")
    own = (f"{engine.place}/docker/data", *RANGE_FILES)
    return {point for point in _mount_points() if point.startswith(others) or point in own}


def _looked_at(process: int, mapping: Mapping | None) -> str:
    """What is wrong with a container, seen from outside; "" for nothing."""
    root = f"/proc/{process}/root"
    host = 0 if mapping is None else mapping.host_uid(0)
    inside = Path(f"/proc/{process}/uid_map").read_text().split()
    if mapping is not None and inside == ["0", "0", str(2**32 - 1)]:
        raise _NotOffered
    if inside[1] != str(host):
        return f"the container's ids begin at {inside[1]}, not at {host}"
    names = set(os.listdir(f"{root}/etc"))
    wanted = {f"layer-{number}" for number in range(_LAYERS)}
    if not wanted <= names:
        return f"layers are missing: {sorted(wanted - names)}"
    if {name for name in names if name.startswith("gone-")} != {f"gone-{_LAYERS - 1}"}:
        return f"whiteouts are wrong: {sorted(names - wanted)}"
    owner = os.stat(f"{root}/etc/layer-0").st_uid
    if owner != host:
        return f"a file of the container's root belongs to {owner}, not to {host}"
    roots = [line for line in Path(f"/proc/{process}/mountinfo").read_text().splitlines() if line.split()[4] == "/"]
    if len(roots) != 1 or " - overlay " not in roots[0]:
        return f"its root is no overlay: {roots}"
    return ""


def _network_of(process: int) -> str:
    """What is wrong with the network of a pod's container, seen from outside; "" for nothing."""
    devices = {line.partition(":")[0].strip() for line in Path(f"/proc/{process}/net/dev").read_text().splitlines()[2:]}
    if not {"lo", "eth0"} <= devices:
        return f"its network has {sorted(devices)}, and neither lo nor eth0 may be missing"
    addresses = Path(f"/proc/{process}/net/fib_trie").read_text()
    if POD_SUBNET not in addresses or "127.0.0.1" not in addresses:
        return "its network has no address"
    return ""


def _settled(engine: Engine, before: set[str]) -> str:
    # A lease that is given back with --sync makes containerd collect now what removed containers left.
    engine.ctr("leases", "create", "--id", "proof")
    engine.ctr("leases", "delete", "--sync", "proof")
    deadline = time.monotonic() + _SETTLE_S
    while left := _mount_points() - before:
        if time.monotonic() > deadline:
            return f"mounts stay behind: {sorted(left)[:3]}"
        time.sleep(0.1)
    return f"addresses stay behind: {engine.addresses()}" if engine.addresses() else ""


def read_proofs(root: str) -> list[Proof]:
    """What was proven for the store at `root`, oldest first; a record that is damaged counts as none."""
    try:
        with open(os.path.join(root, _FILE), encoding="utf-8") as file:
            record = json.load(file)
        names = {field.name for field in fields(Proof)}
        if record["schema"] != SCHEMA or any(set(one) != names for one in record["proofs"]):
            return []
        return [Proof(**one) for one in record["proofs"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def record_proofs(root: str, proofs: Sequence[Proof]) -> None:
    """Add to ROOT/proofs.json, whole or not at all. Raises: StoreError."""
    known = {proof.key: proof for proof in (*read_proofs(root), *proofs)}
    path = os.path.join(root, _FILE)
    try:
        os.makedirs(root, mode=0o711, exist_ok=True)
        with open(path + ".new", "w", encoding="utf-8") as file:
            json.dump({"schema": SCHEMA, "proofs": [asdict(proof) for proof in known.values()]}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".new", path)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}", hint="name another --root") from error
