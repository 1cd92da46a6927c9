"""Ways of doing it otherwise: caps on what assembles at a time, one range, one lower, a template namespace."""

from __future__ import annotations

from collections.abc import Callable

from bench.measure import Figures, ratio, rounds
from flatmount.cpu.burst import Bench, stage
from flatmount.cpu.results import Burst
from flatmount.kernel.namespaces import apart

CONTAINERS, LAYERS, ROUNDS = 100, 50, 5

WAYS: dict[str, Burst] = {
    "per layer": Burst("per-layer", CONTAINERS, LAYERS),
    **{f"per layer, {k} at a time": Burst("per-layer", CONTAINERS, LAYERS, admit=k) for k in (1, 2, 4, 8, 16, 32)},
    "common parent": Burst("common-parent", CONTAINERS, LAYERS),
    "common parent, 4 at a time": Burst("common-parent", CONTAINERS, LAYERS, admit=4),
    "id-mapped once for a range, one for each container": Burst("detached", CONTAINERS, LAYERS),
    "id-mapped once for a range, one for all": Burst("detached", CONTAINERS, LAYERS, one_range=True),
    "one lower": Burst("flat", CONTAINERS, LAYERS),
    "one lower, 4 at a time": Burst("flat", CONTAINERS, LAYERS, admit=4),
    "one lower, one range for all": Burst("flat", CONTAINERS, LAYERS, one_range=True),
}
COPYING: dict[str, Burst] = {
    "per layer, 2 copies": Burst("per-layer", CONTAINERS, LAYERS, 2),
    "per layer, 2 copies, 4 at a time": Burst("per-layer", CONTAINERS, LAYERS, 2, admit=4),
    "per layer, 2 copies of a template": Burst("per-layer", CONTAINERS, LAYERS, 2, template=True),
    "one lower, 2 copies": Burst("flat", CONTAINERS, LAYERS, 2),
    "one lower, 2 copies, 4 at a time": Burst("flat", CONTAINERS, LAYERS, 2, admit=4),
    "one lower, 2 copies of a template": Burst("flat", CONTAINERS, LAYERS, 2, template=True),
}


def run() -> None:
    """Print the whole burst and the container in its middle, in ms and as times less than the first way."""
    apart(_run)


def _run() -> None:
    with stage(LAYERS) as bench:
        for ways in (WAYS, COPYING):
            _show(bench, ways)


def _show(bench: Bench, ways: dict[str, Burst]) -> None:
    middles: dict[str, list[float]] = {name: [] for name in ways}

    def measure(name: str) -> Callable[[int], float]:
        def once(_: int) -> float:
            found = bench.run(ways[name])
            middles[name].append(found.latencies_s[CONTAINERS // 2] * 1e3)
            return found.wall_s * 1e3

        return once

    walls = rounds({name: measure(name) for name in ways}, ROUNDS)
    first = next(iter(ways))
    print(f"{CONTAINERS} containers of {LAYERS} layers, {ROUNDS} rounds: ms until the last and the middle one is up,")
    print(f"and how many times sooner than {first!r} (round by round, lowest - highest)")
    for name in ways:
        middle = Figures(tuple(middles[name]))
        sooner = ratio(walls[first], walls[name])
        sooner_middle = ratio(Figures(tuple(middles[first])), middle)
        print(
            f"  {name:<52} {walls[name].median:8.1f} {middle.median:8.1f}   "
            f"{sooner.median:6.2f} ({min(sooner.values):.2f} - {max(sooner.values):.2f})   "
            f"{sooner_middle.median:6.2f} ({min(sooner_middle.values):.2f} - {max(sooner_middle.values):.2f})"
        )
