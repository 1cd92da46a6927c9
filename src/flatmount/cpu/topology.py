"""Processors as the kernel describes them in sysfs: sockets, NUMA nodes, level-3 caches, SMT siblings, and limits."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass

from flatmount.errors import FlatmountError

_CPUS = "sys/devices/system/cpu"
_NODES = "sys/devices/system/node"
_CGROUPS = ("sys/fs/cgroup", "sys/fs/cgroup/unified")


@dataclass(frozen=True, slots=True)
class Cpu:
    """One logical processor that is online.

    `core` and `l3` are counted from 0 over the machine in the order of their lowest processor; the kernel's own
    `core_id` has holes and repeats on every socket, so it is only shown.
    """

    number: int
    package: int
    node: int
    core: int
    l3: int
    core_id: int


@dataclass(frozen=True, slots=True)
class Node:
    """A NUMA node. `distances` are to the nodes in their order, in the firmware's unit (10: local)."""

    number: int
    cpus: tuple[int, ...]
    distances: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Topology:
    """The machine. `allowed` are the processors this process may use; `quota_cpus` what its control group lets it use.

    `smt` is None where the kernel does not say. `hidden` says what a hypervisor or the firmware keeps to itself.
    """

    model: str
    architecture: str
    kernel: str
    cpus: tuple[Cpu, ...]
    offline: tuple[int, ...]
    nodes: tuple[Node, ...]
    smt: bool | None
    smt_control: str
    l3_bytes: int | None
    governor: str | None
    hypervisor: str | None
    allowed: tuple[int, ...]
    quota_cpus: float | None
    hidden: tuple[str, ...]

    @property
    def packages(self) -> tuple[tuple[int, ...], ...]:
        """Processors of each socket."""
        return _grouped(self.cpus, [cpu.package for cpu in self.cpus])

    @property
    def l3_domains(self) -> tuple[tuple[int, ...], ...]:
        """Processors that share each level-3 cache."""
        return _grouped(self.cpus, [cpu.l3 for cpu in self.cpus])

    @property
    def cores(self) -> tuple[tuple[int, ...], ...]:
        """Siblings of each core."""
        return _grouped(self.cpus, [cpu.core for cpu in self.cpus])

    def cpu(self, number: int) -> Cpu:
        """The processor of that number. Raises: KeyError."""
        for cpu in self.cpus:
            if cpu.number == number:
                return cpu
        raise KeyError(number)

    @property
    def in_order(self) -> tuple[int, ...]:
        """All processors, neighbours beside each other: by socket, node, cache, then core, siblings last."""
        place = {number: siblings.index(number) for siblings in self.cores for number in siblings}
        return tuple(
            cpu.number for cpu in sorted(self.cpus, key=lambda c: (c.package, c.node, c.l3, place[c.number], c.core))
        )

    def summary(self) -> str:
        """One line: what the machine is made of."""
        siblings = max((len(core) for core in self.cores), default=1)
        parts = [
            counted(len(self.packages), "socket"),
            counted(len(self.nodes), "NUMA node"),
            counted(len(self.l3_domains), "level-3 cache"),
            counted(len(self.cores), "core"),
            counted(len(self.cpus), "processor"),
            f"{siblings} siblings a core" if siblings > 1 else "no SMT siblings",
        ]
        return f"{self.model}: {', '.join(parts)}"


def counted(number: int, noun: str) -> str:
    """A number and its noun, in the plural where it has to be."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _grouped(cpus: Iterable[Cpu], keys: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    groups: dict[int, list[int]] = {}
    for cpu, key in zip(cpus, keys, strict=True):
        groups.setdefault(key, []).append(cpu.number)
    return tuple(tuple(group) for group in groups.values())


def parse_list(text: str) -> tuple[int, ...]:
    """A kernel list of numbers, as in `0-3,8,10-11`. Raises: ValueError."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            numbers.extend(range(int(first), int(last or first) + 1))
    return tuple(numbers)


def format_list(numbers: Iterable[int]) -> str:
    """Numbers as the kernel writes them: `0-3,8`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)


def read_topology(root: str = "/", *, allowed: Iterable[int] | None = None) -> Topology:
    """Read the machine's processors from sysfs and procfs. Changes nothing and needs no privilege.

    Args:
        root: where `sys` and `proc` are; another directory than / holds a recorded tree.
        allowed: processors that may be used; by default the calling thread's affinity mask, or on a recorded tree all.

    Without sysfs, processors are those of the affinity mask, and `hidden` says what is not known.

    Raises: FlatmountError for a recorded tree that tells of no processor.
    See: Documentation/ABI/stable/sysfs-devices-system-cpu, Documentation/admin-guide/cputopology.rst.
    """
    tree = _Tree(root)
    online = tree.numbers(f"{_CPUS}/online") or _online(tree)
    described = bool(online)
    if not described and root != "/":
        raise FlatmountError(
            f"{os.path.join(root, _CPUS)}/online tells of no processor",
            hint="a recorded tree has sys/devices/system/cpu",
        )
    online = online or tuple(sorted(os.sched_getaffinity(0)))
    nodes = _nodes(tree, online)
    cpus = _cpus(tree, online, nodes)
    if allowed is None:
        allowed = os.sched_getaffinity(0) if root == "/" else online
    here = set(online)
    hypervisor = _hypervisor(tree)
    return Topology(
        model=_model(tree),
        architecture=tree.text("proc/arch") or platform.machine(),
        kernel=tree.text("proc/sys/kernel/osrelease"),
        cpus=cpus,
        offline=tuple(n for n in tree.numbers(f"{_CPUS}/present") if n not in here),
        nodes=nodes,
        smt={"0": False, "1": True}.get(tree.text(f"{_CPUS}/smt/active")),
        smt_control=tree.text(f"{_CPUS}/smt/control"),
        l3_bytes=_bytes(tree.text(f"{_CPUS}/cpu{online[0]}/cache/index3/size")),
        governor=tree.text(f"{_CPUS}/cpu{online[0]}/cpufreq/scaling_governor") or None,
        hypervisor=hypervisor,
        allowed=tuple(sorted(here.intersection(allowed, _cgroup_cpus(tree) or here))),
        quota_cpus=_quota(tree),
        hidden=_hidden(tree, cpus, hypervisor) if described else (_NO_SYSFS,),
    )


_NO_SYSFS = (
    "there is no sysfs: sockets, nodes, caches and siblings are not known, and all processors are taken for one cache "
    "domain; mount it on /sys, in a container do not mask it"
)


class _Tree:
    """Files below a root; what is not there reads as empty, because containers and old kernels lack some."""

    def __init__(self, root: str) -> None:
        self.root = root

    def text(self, path: str) -> str:
        try:
            with open(os.path.join(self.root, path), encoding="utf-8", errors="replace") as file:
                return file.read().strip("\0\n ")
        except OSError:
            return ""

    def numbers(self, path: str) -> tuple[int, ...]:
        try:
            return parse_list(self.text(path))
        except ValueError:
            return ()

    def cpus(self, lists: str, maps: str) -> tuple[int, ...]:
        """Processors of a list, or of the older mask: hexadecimal words, the highest first."""
        found = self.numbers(lists)
        words = self.text(maps).split(",") if not found else []
        try:
            mask = int("".join(word.rjust(8, "0") for word in words) or "0", 16)
        except ValueError:
            return found
        return found or tuple(n for n in range(mask.bit_length()) if mask >> n & 1)

    def entries(self, path: str, prefix: str) -> tuple[int, ...]:
        """N of the directories prefixN."""
        try:
            names = os.listdir(os.path.join(self.root, path))
        except OSError:
            return ()
        rests = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
        return tuple(sorted(int(rest) for rest in rests if rest.isdigit()))

    def number(self, path: str, default: int) -> int:
        text = self.text(path)
        return int(text) if text.lstrip("-").isdigit() else default


def _online(tree: _Tree) -> tuple[int, ...]:
    """Without the summary file: every processor that has a directory and does not say that it is off."""
    return tuple(n for n in tree.entries(_CPUS, "cpu") if tree.text(f"{_CPUS}/cpu{n}/online") != "0")


def _nodes(tree: _Tree, online: tuple[int, ...]) -> tuple[Node, ...]:
    numbers = tree.numbers(f"{_NODES}/online") or tree.entries(_NODES, "node")
    nodes = tuple(
        Node(
            n,
            tuple(cpu for cpu in tree.cpus(f"{_NODES}/node{n}/cpulist", f"{_NODES}/node{n}/cpumap") if cpu in online),
            tuple(map(int, tree.text(f"{_NODES}/node{n}/distance").split())),
        )
        for n in numbers
    )
    # Kernels without NUMA have no such directory: one node with everything.
    return nodes or (Node(0, online, (10,)),)


def _cpus(tree: _Tree, online: tuple[int, ...], nodes: tuple[Node, ...]) -> tuple[Cpu, ...]:
    node_of = {cpu: node.number for node in nodes for cpu in node.cpus}
    cores: dict[tuple[int, ...], int] = {}
    caches: dict[tuple[int, ...], int] = {}
    cpus = []
    for n in online:
        here = f"{_CPUS}/cpu{n}"
        topology = f"{here}/topology"
        siblings = tree.cpus(f"{topology}/core_cpus_list", f"{topology}/core_cpus") or tree.cpus(
            f"{topology}/thread_siblings_list", f"{topology}/thread_siblings"
        )
        package = max(tree.number(f"{topology}/physical_package_id", 0), 0)
        shared = _l3_cpus(tree, here) or tree.numbers(f"{topology}/package_cpus_list") or (-1 - package,)
        core = cores.setdefault(siblings or (n,), len(cores))
        l3 = caches.setdefault(shared, len(caches))
        core_id = tree.number(f"{topology}/core_id", -1)
        cpus.append(Cpu(n, package, node_of.get(n, 0), core, l3, core_id))
    return tuple(cpus)


def _l3_cpus(tree: _Tree, here: str) -> tuple[int, ...]:
    for index in range(8):
        cache = f"{here}/cache/index{index}"
        if tree.text(f"{cache}/level") == "3":
            return tree.cpus(f"{cache}/shared_cpu_list", f"{cache}/shared_cpu_map")
    return ()


def _bytes(text: str) -> int | None:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    digits, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    return int(digits) * unit if digits.isdigit() else None


def _model(tree: _Tree) -> str:
    for line in tree.text("proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "cpu model", "Model"):
            return value.strip()
    # Arm kernels give numbers and no name.
    return tree.text("proc/arch") or platform.machine()


def _hypervisor(tree: _Tree) -> str | None:
    name = tree.text("sys/hypervisor/type") or tree.text("sys/class/dmi/id/sys_vendor")
    flags = next((x for x in tree.text("proc/cpuinfo").splitlines() if x.startswith("flags")), "")
    if " hypervisor" in flags:
        return name or "a hypervisor that gives no name"
    return tree.text("sys/hypervisor/type") or None


def _hidden(tree: _Tree, cpus: tuple[Cpu, ...], hypervisor: str | None) -> tuple[str, ...]:
    said = []
    if hypervisor:
        said.append("a hypervisor decides where virtual processors run: they may change cache and socket meanwhile")
        if len({cpu.core for cpu in cpus}) == len(cpus):
            said.append("no SMT siblings are shown; two virtual processors may share a core all the same")
    if not any(_l3_cpus(tree, f"{_CPUS}/cpu{cpu.number}") for cpu in cpus):
        said.append("no level-3 cache is described: each socket is taken for one cache domain")
    if hypervisor and not tree.text(f"{_CPUS}/cpu{cpus[0].number}/cpufreq/scaling_governor"):
        said.append("clock frequency and its governor are the host's business")
    return tuple(said)


def _own_groups(tree: _Tree) -> dict[str, str]:
    """Controllers to paths; "" stands for the unified hierarchy."""
    groups = {}
    for line in tree.text("proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        for controller in controllers.split(","):
            groups[controller] = path.lstrip("/")
    return groups


def _cgroup_cpus(tree: _Tree) -> tuple[int, ...]:
    groups = _own_groups(tree)
    for base in _CGROUPS:
        found = tree.numbers(os.path.join(base, groups.get("", ""), "cpuset.cpus.effective"))
        if found:
            return found
    return tree.numbers(os.path.join("sys/fs/cgroup/cpuset", groups.get("cpuset", ""), "cpuset.effective_cpus"))


def _quota(tree: _Tree) -> float | None:
    groups = _own_groups(tree)
    for base in _CGROUPS:
        quota, _, period = tree.text(os.path.join(base, groups.get("", ""), "cpu.max")).partition(" ")
        if quota.isdigit() and period.isdigit():
            return int(quota) / int(period)
    v1 = os.path.join("sys/fs/cgroup/cpu", groups.get("cpu", ""))
    quota_us = tree.number(os.path.join(v1, "cpu.cfs_quota_us"), -1)
    period_us = tree.number(os.path.join(v1, "cpu.cfs_period_us"), 0)
    return quota_us / period_us if quota_us > 0 and period_us > 0 else None
