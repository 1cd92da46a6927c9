"""From what was seen to findings: pure functions, one for each question, and the thresholds they use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from flatmount.observe.doctor.engine_checks import engines
from flatmount.observe.doctor.findings import Finding, Severity
from flatmount.observe.doctor.state import Cause, NodeState
from flatmount.observe.leak_results import Kind, Leak
from flatmount.observe.owners import Owner

STORM_PER_S = 100.0
PER_LAYER_RATIO = 3.0  # id-mapped mounts for each new file system: with a constant number of mounts it is 2 at most
LARGE_TABLE, HUGE_TABLE = 5_000, 20_000
MANY_LEAKS = 1_000
LOOPED_PEERS = 8
BUSY_SHARE = 0.10
NEAR, VERY_NEAR = 0.7, 0.9
FEW_TIME_OUTS = 3
PRESSURE_PERCENT = 40.0

_REMEDIES = {
    Owner.KUBELET: "look for pods with many volumes, and for volumes of pods that are gone",
    Owner.CONTAINERD: "`flatmount leaks` tells what is left; update containerd if it leaks temporary mounts",
    Owner.PODMAN: "`podman ps -a --storage` shows containers that are still mounted",
    Owner.DOCKER: "remove containers that are stopped, and volumes nobody uses",
    Owner.RUNC: "update runc to 1.2 or later",
    Owner.FLATMOUNT: "`flatmount leaks` tells what is left",
    Owner.SYSTEM: "`findmnt` shows what is mounted; look for services and snaps that mount for each user or session",
}


def diagnose(state: NodeState) -> tuple[Finding, ...]:
    """All findings, the most severe first, what happens now before what may."""
    found = [finding for check in _CHECKS for finding in check(state)]
    order = (Severity.CRITICAL, Severity.WARNING, Severity.NOTE)
    return tuple(sorted(found, key=lambda finding: (order.index(finding.severity), not finding.now)))


def assemblies(state: NodeState) -> Iterator[Finding]:
    """Whether somebody mounts a lot at this moment, and whether layer by layer."""
    storming = [cause for cause in state.causes if cause.operations >= STORM_PER_S]
    for cause in storming:
        if _per_layer(cause):
            yield Finding(
                "per-layer-assembly",
                Severity.CRITICAL,
                f"{cause.name} mounts the layers of images one by one",
                (
                    f"{_process(cause)}: {cause.operations:,.0f} mount operations a second",
                    f"{cause.idmaps / max(cause.roots, 1e-9):.0f} id-mapped mounts for each root file system",
                ),
                _who(cause),
                _per_layer_remedy(state),
                True,
            )
    rest = [cause for cause in storming if not _per_layer(cause)]
    total = sum(cause.operations for cause in state.causes)
    if rest or (not storming and total >= STORM_PER_S):
        top = sorted(rest or state.causes, key=lambda cause: -cause.operations)
        yield Finding(
            "mount-storm",
            Severity.WARNING,
            f"{total:,.0f} mount operations a second",
            tuple(f"{_process(one)}: {one.operations:,.0f} a second" for one in top[:5]),
            _who(top[0]),
            "start fewer containers at a time, or with a constant number of mounts (`flatmount storm` compares)",
            True,
        )


def _per_layer(cause: Cause) -> bool:
    return cause.idmaps >= PER_LAYER_RATIO * max(cause.roots, 1.0) and cause.attaches >= cause.idmaps


def _process(cause: Cause) -> str:
    return f"{cause.name} [{cause.pid}] ({cause.place})" if cause.pid else f"{cause.name} (processes that ended)"


def _who(cause: Cause) -> str:
    return cause.name if not cause.place or cause.place == "/" else f"{cause.name} in {cause.place}"


def _per_layer_remedy(state: NodeState) -> str:
    if any(engine.name == "containerd" for engine in state.engines):
        return "update containerd to 2.0.7, 2.1.5 or 2.2 or later, or use flatmount's snapshotter"
    return "use an engine that id-maps the layers' common parent, or none of them"


def leaked(state: NodeState) -> Iterator[Finding]:
    """Temporary mounts that stayed."""
    stayed: dict[tuple[Owner, bool], list[Leak]] = {}
    for leak in state.leaks:
        if leak.kind is not Kind.NAMESPACE:
            stayed.setdefault((leak.owner, leak.kind is Kind.LAYER_WORK), []).append(leak)
    for (owner, layer_work), leaks in stayed.items():
        holders = Counter(
            f"{holder.name} [{holder.pid}]" for leak in leaks for holder in leak.holders if holder.pid is not None
        )
        elsewhere = sum(not leak.here for leak in leaks)
        evidence = [f"{len(leaks):,} temporary mounts of {owner} are still there, {leaks[0].where} among them"]
        if holders:
            held = ", ".join(f"{name} ({count:,})" for name, count in holders.most_common(3))
            evidence.append(f"mount namespaces that hold them: {held}")
        if elsewhere:
            evidence.append(f"{elsewhere:,} of them are only in other mount namespaces")
        removable = any(leak.removable for leak in leaks)
        yield Finding(
            "leaked-mounts",
            Severity.CRITICAL if len(leaks) >= MANY_LEAKS else Severity.WARNING,
            f"{len(leaks):,} temporary mounts of {owner} were left behind",
            tuple(evidence),
            str(owner),
            "`flatmount leaks --clean` takes them off, also in the namespaces that hold them"
            if removable
            else "restart containerd: it takes them off when it starts"
            if layer_work
            else "end or restart the processes whose namespaces hold them",
            True,
        )


def table(state: NodeState) -> Iterator[Finding]:
    """How long the table is, whose its mounts are, and how near its limit."""
    seen = state.table
    owners = ", ".join(f"{owner} {count:,}" for owner, count in seen.owners)
    if seen.mounts >= LARGE_TABLE:
        top = seen.owners[0][0]
        yield Finding(
            "table-large",
            Severity.CRITICAL if seen.mounts >= HUGE_TABLE else Severity.WARNING,
            f"the mount table has {seen.mounts:,} mounts",
            (
                f"by owner: {owners}",
                f"each new mount namespace copies all of them: about {seen.mounts * 1.7 / 1000:,.0f} ms",
                f"{seen.changes_per_s:,.0f} changes and {seen.growth_per_s:+,.0f} mounts a second",
            ),
            str(top),
            _REMEDIES[top],
            True,
        )
    if seen.mounts >= NEAR * seen.limit:
        yield Finding(
            "mount-max",
            Severity.CRITICAL if seen.mounts >= VERY_NEAR * seen.limit else Severity.WARNING,
            f"{seen.mounts:,} of at most {seen.limit:,} mounts are in use",
            (f"fs.mount-max = {seen.limit:,}; by owner: {owners}",),
            "the administrator",
            f"sysctl fs.mount-max={seen.limit * 2}, and find out who mounts so much",
            True,
        )
    if seen.peers >= LOOPED_PEERS:
        yield Finding(
            "propagation-loop",
            Severity.WARNING,
            f"each mount below {seen.peers_at} is made {seen.peers:,} times",
            (f"{seen.peers:,} mounts of one directory in one peer group, {seen.peers_at} among them",),
            "whoever bind-mounts a shared directory again and again",
            f"`findmnt -o TARGET,PROPAGATION` shows them; take some off, or `mount --make-private {seen.peers_at}`",
            True,
        )


def watchers(state: NodeState) -> Iterator[Finding]:
    """Who burns processor time on following the table."""
    length = f"the table has {state.table.mounts:,} mounts and {state.table.changes_per_s:,.0f} changes a second"
    if state.init_cpu_share >= BUSY_SHARE:
        yield Finding(
            "init-busy",
            Severity.WARNING,
            f"PID 1 ({state.init_name}) uses {state.init_cpu_share:.0%} of a processor",
            (length, "it parses the whole table after every burst of changes"),
            state.init_name,
            "make fewer mounts in the host's table; systemd 248 and later limits how often it reads",
            True,
        )
    for watcher in state.watchers:
        if watcher.pid != 1 and watcher.cpu_share >= BUSY_SHARE:
            place = f" in {watcher.place}" if watcher.place not in ("", "/") else ""
            yield Finding(
                "watcher-busy",
                Severity.WARNING,
                f"{watcher.name} follows the mount table and uses {watcher.cpu_share:.0%} of a processor",
                (f"{watcher.name} [{watcher.pid}]{place} has a mount table open", length),
                f"{watcher.name}{place}",
                "ask its maker to limit its rate, or to use mount events (fanotify, Linux 6.15)",
                True,
            )


def preflight(state: NodeState) -> Iterator[Finding]:
    """Whether containers with user namespaces of their own can work here."""
    for store in state.stores:
        if store.idmap:
            yield Finding(
                "no-idmapped-mounts",
                Severity.WARNING,
                f"{store.engine} cannot id-map its layers on {store.fs_type}",
                (f"{store.path} ({store.fs_type}): {store.idmap}",),
                "the administrator",
                "put its directory on ext4, xfs, btrfs or another file system with id-mapped mounts",
                False,
            )
    limit = state.system.user_namespaces_limit
    if limit == 0:
        yield Finding(
            "user-namespaces-off",
            Severity.WARNING,
            "user namespaces are switched off",
            ("user.max_user_namespaces = 0",),
            "the administrator",
            "sysctl user.max_user_namespaces=65536",
            False,
        )


def limits(state: NodeState) -> Iterator[Finding]:
    """Limits of the kernel that come near."""
    system = state.system
    if system.open_files >= NEAR * system.open_files_limit:
        yield Finding(
            "open-files",
            Severity.WARNING,
            f"{system.open_files:,} of at most {system.open_files_limit:,} files are open",
            (f"fs.file-max = {system.open_files_limit:,}",),
            "the administrator",
            "raise fs.file-max, and find out who holds so many",
            True,
        )
    few = system.mount_namespaces_limit
    if few is not None and few < 1024:
        yield Finding(
            "few-mount-namespaces",
            Severity.NOTE,
            f"a user may have {few:,} mount namespaces",
            (f"user.max_mnt_namespaces = {few:,}; each detached mount counts as one too",),
            "the administrator",
            "sysctl user.max_mnt_namespaces=65536",
            False,
        )
    pressure = {"processors": system.cpu_pressure, "memory": system.memory_pressure, "disks": system.io_pressure}
    high = {name: share for name, share in pressure.items() if share is not None and share >= PRESSURE_PERCENT}
    if high:
        yield Finding(
            "pressure",
            Severity.NOTE,
            "tasks wait for " + " and ".join(high),
            tuple(f"{name}: some task waited {share:.0f} % of the last minute" for name, share in high.items()),
            "the administrator",
            "pressure alone does not tell lock waits from load: `flatmount profile` does",
            True,
        )


def shape(state: NodeState) -> Iterator[Finding]:
    """Whether this machine makes contended locks dearer."""
    system = state.system
    reasons = []
    if system.sockets > 1:
        reasons.append(f"{system.sockets} sockets: a contended lock's cache line crosses between them")
    if system.cache_domains > max(system.sockets, 1):
        reasons.append(f"{system.cache_domains} last-level caches: it crosses between those, too")
    if system.threads_per_core > 1 and reasons:
        reasons.append(f"{system.threads_per_core} threads on a core: one that spins slows its sibling")
    if reasons:
        yield Finding(
            "topology",
            Severity.NOTE,
            f"mount locks cost more on this machine ({system.processors} processors)",
            tuple(reasons),
            "the administrator",
            "keep bursts of starts within one cache domain, or make the mounts few",
            False,
        )


def time_outs(state: NodeState) -> Iterator[Finding]:
    """Time-outs of kubelet and runtimes that line up with what else was found."""
    many = [one for one in state.time_outs if one.count >= FEW_TIME_OUTS]
    if many:
        yield Finding(
            "time-outs",
            Severity.WARNING,
            f"{sum(one.count for one in many):,} time-outs of kubelet and runtimes in a quarter of an hour",
            tuple(f"{one.what}, {one.count:,} times; last: {one.example}" for one in many),
            "kubelet and the container runtime",
            "see whether they come with bursts of starts: `flatmount watch`, `flatmount profile --for 30s`",
            True,
        )


_CHECKS: tuple[Callable[[NodeState], Iterator[Finding]], ...] = (
    assemblies,
    leaked,
    table,
    watchers,
    engines,
    preflight,
    limits,
    shape,
    time_outs,
)
