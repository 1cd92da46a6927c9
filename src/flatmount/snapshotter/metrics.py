"""What the service counts of itself, as Prometheus reads it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict

_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_PREFIX = "flatmount_snapshotter"


class Metrics:
    """Calls by name and status code, and how long they took. Belongs to one event loop."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[str, str]] = Counter()
        self._buckets: defaultdict[str, list[int]] = defaultdict(lambda: [0] * (len(_BUCKETS_S) + 1))
        self._sums: defaultdict[str, float] = defaultdict(float)

    def count(self, call: str, code: str, seconds: float) -> None:
        """One call has ended."""
        self._calls[call, code] += 1
        self._sums[call] += seconds
        self._buckets[call][bisect_left(_BUCKETS_S, seconds)] += 1

    def text(self, gauges: dict[str, tuple[str, dict[str, float]]]) -> str:
        """The exposition. `gauges` maps a name to its help and its values by labels ("" for none)."""
        lines = [f"# HELP {_PREFIX}_calls_total calls answered", f"# TYPE {_PREFIX}_calls_total counter"]
        for (call, code), count in sorted(self._calls.items()):
            lines.append(f'{_PREFIX}_calls_total{{call="{call}",code="{code}"}} {count}')
        name = f"{_PREFIX}_call_seconds"
        lines += (f"# HELP {name} how long calls took", f"# TYPE {name} histogram")
        for call, buckets in sorted(self._buckets.items()):
            total = 0
            for bound, count in zip((*map(str, _BUCKETS_S), "+Inf"), buckets, strict=True):
                total += count
                lines.append(f'{name}_bucket{{call="{call}",le="{bound}"}} {total}')
            lines.append(f'{name}_sum{{call="{call}"}} {self._sums[call]:.6f}')
            lines.append(f'{name}_count{{call="{call}"}} {total}')
        for gauge, (meaning, values) in gauges.items():
            lines += (f"# HELP {_PREFIX}_{gauge} {meaning}", f"# TYPE {_PREFIX}_{gauge} gauge")
            lines += (f"{_PREFIX}_{gauge}{labels} {value:g}" for labels, value in values.items())
        return "\n".join(lines) + "\n"
