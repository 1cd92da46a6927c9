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

from flatmount.cpu.model import Costs, work_of
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

    A container that has a processor works, waits for the lock without giving the processor up, holds it for as long as
    the live table makes it, and sleeps; whoever of those that wait for a processor is next is drawn by lot. A copy sees
    the roots of all that were let in and the average of temporary mounts so far: a burst's first containers copy while
    the others still hold their layers (measured, see docs/processors.md).
    """
    return _BurstSimulation(costs, burst, cpus, before, seed).run()


@dataclass(slots=True)
class _Container:
    """`step` is the next mount operation or copy."""

    step: int = 0


class _BurstSimulation:
    def __init__(self, costs: Costs, burst: Burst, cpus: int, before: float, seed: int) -> None:
        work = work_of(burst.strategy, burst.layers)
        own_s = costs.container_s + costs.lower_s * work.lowers + costs.copy_s * burst.copies
        self._costs = costs
        self._burst = burst
        self._operations = work.operations
        self._changes = tuple(_changes(burst))
        self._work_s = own_s / len(self._changes)
        self._rng = random.Random(seed)
        self._before = before + burst.background
        self._roots = _Average(self._before)
        self._temporary = _Average(0.0)
        at_once = min(burst.admit or burst.containers, burst.containers)
        self._ready = [_Container() for _ in range(at_once)]
        self._not_yet = burst.containers - at_once
        self._waiting: deque[_Container] = deque()
        self._held = False
        self._events: list[tuple[float, int, bool, _Container]] = []
        self._numbers = 0
        self._clock = 0.0
        self._cpus = cpus

    def run(self) -> float:
        for _ in range(self._cpus):
            self._next_container()
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
        heapq.heappush(self._events, (self._clock + spent_s, self._numbers, section, container))

    def _next_container(self) -> None:
        if self._ready:
            place = self._rng.randrange(len(self._ready))
            self._ready[place], self._ready[-1] = self._ready[-1], self._ready[place]
            self._after(self._work_s, False, self._ready.pop())

    def _end_section(self, container: _Container) -> None:
        change, temporary = self._changes[container.step]
        (self._temporary if temporary else self._roots).change(change, self._clock)
        container.step += 1
        if container.step < len(self._changes):
            self._ready.append(container)
        elif self._not_yet:
            self._not_yet -= 1
            self._ready.append(_Container())
        self._next_container()

    def _section_s(self, container: _Container) -> float:
        if container.step < self._operations:
            mounts = self._roots.value + self._temporary.value
            return self._costs.operation_s + self._costs.operation_mount_s * mounts
        if self._burst.template:
            return self._costs.copy_mount_s
        let_in = self._burst.containers - self._not_yet
        return self._costs.copy_mount_s * (self._before + let_in + self._temporary.average(self._clock))


class _Average:
    """A number of mounts that changes, and its average over time."""

    def __init__(self, value: float) -> None:
        self.value = value
        self._area = 0.0
        self._since = 0.0

    def change(self, by: int, now: float) -> None:
        self._area += self.value * (now - self._since)
        self._since = now
        self.value += by

    def average(self, now: float) -> float:
        return (self._area + self.value * (now - self._since)) / now if now > 0 else self.value


def _changes(burst: Burst) -> Iterator[tuple[int, bool]]:
    """What each mount operation of one container does to the table, and whether to what is only there for the moment;
    in the plan's order, copies last."""
    temporary = work_of(burst.strategy, burst.layers).temporary
    if temporary:
        for last in (False, True):
            yield from [(1, True)] * temporary
            yield 1, not last  # the overlay: the first one only serves to look up users
            yield from [(-1, True)] * temporary
            if not last:
                yield -1, True
    else:
        yield 1, False
    yield from [(0, False)] * burst.copies
