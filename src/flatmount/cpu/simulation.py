"""The model's formulas again, as discrete events: what checks them where a test cannot run a kernel.

Two simulations. A lock: threads that work, queue and hold. A burst: containers that take turns on processors and at
one lock, whose mounts come and go one by one.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from flatmount.cpu.model import COLD, Costs, copying_s, live_mounts, of_containers, walk_s, work_of
from flatmount.cpu.results import Burst

_REGULARITY = 16.0


def simulate_lock(
    threads: int, parallel_s: float, serial_s: Callable[[int], float], sections: int, seed: int = 1
) -> float:
    """Sections a second; times are exponential, and a section gets dearer as soon as another waits."""
    clock = 0.0
    rng = random.Random(seed)
    thinking = [(rng.expovariate(1 / parallel_s), i) for i in range(threads)]
    heapq.heapify(thinking)
    waiting = 0
    served = 0
    ends = float("inf")
    while served < sections:
        if thinking and thinking[0][0] <= ends:
            clock, _ = heapq.heappop(thinking)
            waiting += 1
        else:
            clock = ends
            waiting -= 1
            served += 1
            heapq.heappush(thinking, (clock + rng.expovariate(1 / parallel_s), served))
        # Exponential times forget what is past, so that the rest may be drawn again at the new rate.
        ends = clock + rng.expovariate(1 / serial_s(waiting)) if waiting else float("inf")
    return served / clock


def simulate_burst(costs: Costs, burst: Burst, *, cpus: int, before: float, seed: int = 1) -> float:
    """Seconds of one burst, container by container and mount by mount.

    A container that has a processor works, waits for the lock without giving the processor up, holds it (for as long as
    the live table makes it, where a clone looks at it), and goes to the end of those that wait for a processor: who has
    had least comes first, as the kernel's scheduler does it. The first pass on each processor finds a cold cache.
    How many mounts a copy finds is the formula's: that containers copy while others still hold half of their layers was
    measured (docs/processors.md), and is not what any order of containers tried here gives. What leaves the cache is
    the formula's too, and grace periods, which only add up, are in neither.
    """
    return _BurstSimulation(costs, burst, cpus, before, seed).run()


@dataclass(order=True, slots=True)
class _Container:
    """`step` is the next mount operation or copy; `had_s` what it has had of a processor."""

    had_s: float
    number: int
    step: int = 0


@dataclass(frozen=True, slots=True)
class _Change:
    """One mount operation or copy: what it does to the table, and whether a clone has walked it before."""

    by: int
    walks: bool = False
    copies: bool = False


class _BurstSimulation:
    def __init__(self, costs: Costs, burst: Burst, cpus: int, before: float, seed: int) -> None:
        work = work_of(burst.strategy, burst.layers)
        self._costs = costs
        self._burst = burst
        self._changes = tuple(_changes(burst))
        self._colder = of_containers(burst, cpus)
        self._work_s = (costs.pass_s * work.passes + costs.lower_s * work.lowers) * self._colder / work.operations
        self._rng = random.Random(seed)
        self._mounts = before + burst.background
        self._copied = live_mounts(burst, before)[1]
        at_once = min(burst.admit or burst.containers, burst.containers)
        self._ready = [_Container(0.0, i) for i in range(at_once)]
        self._not_yet = burst.containers - at_once
        self._waiting: deque[_Container] = deque()
        self._held = False
        self._events: list[tuple[float, int, bool, _Container]] = []
        self._numbers = 0
        self._clock = 0.0
        self._cpus = cpus

    def run(self) -> float:
        for container in [heapq.heappop(self._ready) for _ in range(min(self._cpus, len(self._ready)))]:
            self._after(COLD * self._costs.pass_s + self._work_s, False, container)
        while self._events:
            self._clock, _, was_section, container = heapq.heappop(self._events)
            if was_section:
                self._held = False
                self._end_section(container)
            else:
                self._waiting.append(container)
            if self._waiting and not self._held:
                self._held = True
                first = self._waiting.popleft()
                self._after(self._section_s(first), True, first)
        return self._clock

    def _after(self, mean_s: float, section: bool, container: _Container) -> None:
        self._numbers += 1
        # Work of one's own varies by a quarter; sections as the chain has them.
        shape = 1.0 if section else _REGULARITY
        spent_s = self._rng.gammavariate(shape, mean_s / shape)
        container.had_s += spent_s
        heapq.heappush(self._events, (self._clock + spent_s, self._numbers, section, container))

    def _next_container(self) -> None:
        if self._ready:
            self._begin(heapq.heappop(self._ready))

    def _begin(self, container: _Container) -> None:
        if self._changes[container.step].copies:
            self._waiting.append(container)  # a copy is all section
            return
        self._after(self._work_s, False, container)

    def _end_section(self, container: _Container) -> None:
        change = self._changes[container.step]
        self._mounts += change.by
        container.step += 1
        if container.step < len(self._changes):
            heapq.heappush(self._ready, container)
        elif self._not_yet:
            self._not_yet -= 1
            heapq.heappush(self._ready, _Container(container.had_s, container.number))
        self._next_container()

    def _section_s(self, container: _Container) -> float:
        change = self._changes[container.step]
        if change.copies:
            return copying_s(self._costs, self._burst, self._copied, self._cpus)
        return self._costs.operation_s * self._colder + (walk_s(self._costs, self._mounts) if change.walks else 0.0)


def _changes(burst: Burst) -> Iterator[_Change]:
    """What one container does, in the plan's order, copies last."""
    temporary = work_of(burst.strategy, burst.layers).temporary
    if temporary:
        for last in (False, True):
            yield from [_Change(1, walks=True)] * temporary
            yield _Change(1)  # the overlay: the first one only serves to look up users
            yield from [_Change(-1)] * (temporary if last else temporary + 1)
    else:
        yield _Change(1)
    yield from [_Change(0, copies=True)] * burst.copies
