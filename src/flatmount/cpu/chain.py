"""A lock as a closed queue: the finite-population chain that gives its throughput.

N threads alternate between work of their own and a section under one lock. The number k at the lock is a birth-death
chain: it grows at rate (N-k)/parallel and falls at rate 1/serial(k).
See: Boyd-Wickizer, Kaashoek, Morris and Zeldovich, Non-scalable locks are dangerous (2012), section 4.
"""

from __future__ import annotations

from collections.abc import Callable


def throughput(threads: int, parallel_s: float, serial_s: Callable[[int], float]) -> float:
    """Sections a second of `threads` threads.

    `parallel_s` is the mean time between two sections, `serial_s(k)` the mean time of a section with k threads at the
    lock, the holder among them.
    """
    if parallel_s <= 0:
        return 1 / serial_s(threads)
    weight, total, served = 1.0, 1.0, 0.0
    for k in range(1, threads + 1):
        section_s = serial_s(k)
        weight *= (threads - k + 1) * section_s / parallel_s
        total += weight
        served += weight / section_s
        if total > 1e200:  # only ratios matter
            weight, total, served = weight / total, 1.0, served / total
    return served / total
