"""What the service tells of itself, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

_PREFIX = "flatmount_snapshotter"


@dataclass(frozen=True, slots=True)
class Answered:
    """What was answered of one call: how often with which status code, how often within each bound, seconds in all."""

    call: str
    by_code: Mapping[str, int]
    within: Sequence[int]
    seconds: float


def exposition(
    answered: Iterable[Answered], bounds_s: Sequence[float], gauges: Mapping[str, tuple[str, Mapping[str, float]]]
) -> str:
    """The text. `gauges` maps a name to its help and its values by labels ("" for none)."""
    answered = [one for one in answered if one.by_code]
    lines = [f"# HELP {_PREFIX}_calls_total calls answered", f"# TYPE {_PREFIX}_calls_total counter"]
    for one in sorted(answered, key=lambda one: one.call):
        for code, count in sorted(one.by_code.items()):
            lines.append(f'{_PREFIX}_calls_total{{call="{one.call}",code="{code}"}} {count}')
    name = f"{_PREFIX}_call_seconds"
    lines += (f"# HELP {name} how long calls took", f"# TYPE {name} histogram")
    for one in sorted(answered, key=lambda one: one.call):
        for bound, count in zip((*map(str, bounds_s), "+Inf"), accumulate(one.within), strict=True):
            lines.append(f'{name}_bucket{{call="{one.call}",le="{bound}"}} {count}')
        lines.append(f'{name}_sum{{call="{one.call}"}} {one.seconds:.6f}')
        lines.append(f'{name}_count{{call="{one.call}"}} {sum(one.within)}')
    for gauge, (meaning, values) in gauges.items():
        lines += (f"# HELP {_PREFIX}_{gauge} {meaning}", f"# TYPE {_PREFIX}_{gauge} gauge")
        lines += (f"{_PREFIX}_{gauge}{labels} {value:g}" for labels, value in values.items())
    return "\n".join(lines) + "\n"
