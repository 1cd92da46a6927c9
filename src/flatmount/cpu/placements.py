"""Where threads are put: the sets of processors whose comparison tells what a distance costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flatmount.cpu.topology import Topology
from flatmount.errors import UsageError


@dataclass(frozen=True, slots=True)
class Placement:
    """Processors in the order in which threads take them. `distinct_cores` is how many cores they lie on."""

    name: str
    title: str
    cpus: tuple[int, ...]
    distinct_cores: int


def placements(topology: Topology) -> tuple[Placement, ...]:
    """All placements this machine has, smallest first; those that equal an earlier one are left out.

    Only processors that the process may use are in them.
    """
    usable = set(topology.allowed)

    def keep(cpus: Iterable[int]) -> tuple[int, ...]:
        return tuple(cpu for cpu in cpus if cpu in usable)

    order = keep(topology.in_order)
    firsts = {first[0] for core in topology.cores if (first := keep(core))}

    def one_each(cpus: Iterable[int]) -> tuple[int, ...]:
        return tuple(cpu for cpu in cpus if cpu in firsts)

    def largest(groups: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
        kept = [keep(cpu for cpu in topology.in_order if cpu in group) for group in groups]
        return max(kept, key=len, default=())

    pair = next((p for core in topology.cores if len(p := keep(core)) > 1), ())
    l3 = largest(topology.l3_domains)
    socket = largest(topology.packages)
    apart = tuple(part[0] for domain in topology.l3_domains if (part := one_each(keep(domain))))
    candidates = (
        ("smt-pair", "two siblings of one core", pair),
        ("one-l3", "one level-3 cache, a thread for each core", one_each(l3)),
        ("one-per-l3", "one thread in each level-3 cache", apart),
        ("socket", "one socket, a thread for each core", one_each(socket)),
        ("socket-smt", "one socket with SMT siblings", socket),
        ("all", "all sockets, a thread for each core", one_each(order)),
        ("all-smt", "all processors", order),
    )
    core_of = {cpu.number: cpu.core for cpu in topology.cpus}
    seen: set[frozenset[int]] = set()
    found = []
    for name, title, cpus in candidates:
        if cpus and frozenset(cpus) not in seen and (len(cpus) > 1 or name == "all-smt"):
            seen.add(frozenset(cpus))
            found.append(Placement(name, title, cpus, len({core_of[cpu] for cpu in cpus})))
    return tuple(found)


def find_placement(name: str, topology: Topology) -> Placement:
    """The placement of that name. Raises: UsageError where this machine has none that differs from the others."""
    all_of_them = placements(topology)
    for placement in all_of_them:
        if placement.name == name:
            return placement
    raise UsageError(
        f"this machine has no placement {name!r}",
        hint=f"it has {', '.join(placement.name for placement in all_of_them)}; others would be the same processors",
    )


def thread_counts(placement: Placement) -> tuple[int, ...]:
    """How many threads to try there: powers of two, and all."""
    most = len(placement.cpus)
    return tuple(sorted({n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if n < most} | {most}))
