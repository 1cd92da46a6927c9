"""What the doctor saw on a node, as frozen values; checks read only these."""

from __future__ import annotations

from dataclasses import dataclass

from flatmount.observe.doctor.snapshotters import Snapshotter
from flatmount.observe.leak_results import Leak
from flatmount.observe.owners import Owner


@dataclass(frozen=True, slots=True)
class Table:
    """The mount table of the doctor's namespace, looked at twice.

    `limit` is fs.mount-max. `changes_per_s` counts attached and detached mounts, `growth_per_s` what remained.
    `peers` is the largest number of mounts in this table that show the same directory and pass mounts on to each
    other; `peers_at` is where one of them is.
    """

    mounts: int
    limit: int
    changes_per_s: float
    growth_per_s: float
    owners: tuple[tuple[Owner, int], ...]
    peers: int
    peers_at: str


@dataclass(frozen=True, slots=True)
class Watcher:
    """A process that has mount tables open, and the share of one processor that it used meanwhile."""

    pid: int
    name: str
    place: str
    cpu_share: float


@dataclass(frozen=True, slots=True)
class Cause:
    """Mount calls per second of one process, in whatever namespace, while the doctor looked.

    `operations` attach or detach; `idmaps` change a mount's attributes; `roots` make a file system's mount anew.
    """

    pid: int
    name: str
    place: str
    operations: float
    attaches: float
    idmaps: float
    roots: float


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine or runtime on this node: what it says its version is, and whether it runs as a daemon."""

    name: str
    version: tuple[int, int, int]
    said: str
    path: str
    running: bool


@dataclass(frozen=True, slots=True)
class Image:
    """An image in an engine's store."""

    engine: str
    name: str
    layers: int


@dataclass(frozen=True, slots=True)
class LayerStore:
    """Where an engine keeps layers. `idmap` is "" where its file system takes id-mapped mounts, else the kernel's word;
    None where it was not tried."""

    engine: str
    path: str
    fs_type: str
    idmap: str | None


@dataclass(frozen=True, slots=True)
class System:
    """The kernel's limits and the machine's shape. Pressure is the share of time, in percent of the last minute."""

    kernel: str
    processors: int
    sockets: int
    threads_per_core: int
    cache_domains: int
    open_files: int
    open_files_limit: int
    mount_namespaces_limit: int | None
    user_namespaces_limit: int | None
    cpu_pressure: float | None
    memory_pressure: float | None
    io_pressure: float | None


@dataclass(frozen=True, slots=True)
class TimeOut:
    """A kind of time-out in the journal of the last quarter of an hour: how often, and the last line."""

    what: str
    count: int
    example: str


@dataclass(frozen=True, slots=True)
class NodeState:
    """Everything. `init_cpu_share` is PID 1's share of one processor; `snapshotter` is what containerd is to use."""

    table: Table
    init_name: str
    init_cpu_share: float
    watchers: tuple[Watcher, ...]
    causes: tuple[Cause, ...]
    engines: tuple[Engine, ...]
    images: tuple[Image, ...]
    stores: tuple[LayerStore, ...]
    system: System
    time_outs: tuple[TimeOut, ...]
    leaks: tuple[Leak, ...]
    unseen: tuple[str, ...]
    snapshotter: Snapshotter | None = None
