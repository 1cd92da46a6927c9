"""What a storm of real containers measured, as frozen values with a schema name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from flatmount.decoding import decode
from flatmount.errors import UsageError
from flatmount.storm.results import HostFacts, ImageFacts, LatencyMs, ProbeMs

SCHEMA = "flatmount.starts/1"


@dataclass(frozen=True, slots=True)
class StartSettings:
    """What the storm was asked for.

    `hold`: containers run on while those of later waves start. `probe`: a health check was measured beside them, which
    costs 30 % of a processor beside 10,000 mounts.
    """

    engines: tuple[str, ...]
    containers: int
    concurrency: int
    waves: int
    repeats: int
    hold: bool
    background: int
    timeout_s: float
    on_host: bool
    probe: bool
    store: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """An engine that was asked for and is not there."""

    engine: str
    reason: str


@dataclass(frozen=True, slots=True)
class WaveResult:
    """One wave of one engine.

    Latency is from the request to the container's first instruction. `running_before` is how many of this engine's
    containers already ran. `mounts_before` and `mounts_standing` count the storm's mount namespace before the wave and
    when all of it ran. `undo_s` is None where the wave was held, and else until all that could be ended had.
    """

    engine: str
    repeat: int
    wave: int
    running_before: int
    containers: int
    failed: int
    failures: tuple[str, ...]
    wall_s: float
    starts_per_s: float
    latency_ms: LatencyMs
    probe_ms: ProbeMs
    mounts_before: int
    mounts_standing: int
    undo_s: float | None
    latencies_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class StartsReport:
    """A storm of real containers: when, where, on what, how, and each wave in the order they ran.

    `template_mounts` is how many mounts the namespace has that `flatmount` starts its runtime in a copy of; None where
    no such engine ran, or the report is older. `left` names what could not be taken away afterwards, and why.
    """

    taken_at: str
    host: HostFacts
    image: ImageFacts
    settings: StartSettings
    skipped: tuple[Skipped, ...]
    waves: tuple[WaveResult, ...]
    template_mounts: int | None = None
    left: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As one JSON object with its schema's name."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, value: object) -> StartsReport:
        """The report that `value`, as `json.load` returned it, holds. Raises: UsageError naming the field."""
        if not isinstance(value, dict) or value.get("schema") != SCHEMA:
            raise UsageError("not the results of a storm of engines", hint=f"give a file with schema {SCHEMA}")
        return decode(cls, value, "starts")
