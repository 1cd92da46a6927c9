"""What the snapshot service can be told: the `[snapshotter]` table of flatmount's configuration."""

from __future__ import annotations

from dataclasses import dataclass

RUN = "/run/flatmount"


@dataclass(frozen=True, slots=True)
class Settings:
    """`form` is auto, overlay, bind or helper. Times in seconds. `metrics` is HOST:PORT, "" for none."""

    root: str = "/var/lib/flatmount"
    run: str = RUN
    socket: str = RUN + "/snapshotter.sock"
    form: str = "auto"
    deadline_s: float = 30.0
    flatten_after_s: float = 1.0
    metrics: str = ""
    log_level: str = "info"
