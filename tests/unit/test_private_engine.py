"""The private containerd and service of a proof: how they are started, and what is left of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from flatmount.cli.main import main
from flatmount.config import Snapshotter
from flatmount.snapshotter import daemon, engine


class Stopped(Exception):
    """Stands for whatever ends a start."""


def test_the_service_serves_no_metrics_whatever_the_machine_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Sequence[str]] = []
    served: list[Snapshotter] = []

    def start(command: Sequence[str], log: str, environment: Mapping[str, str] | None = None) -> None:
        begun.append(command)
        raise Stopped

    def run(place: daemon.Place, settings: Snapshotter) -> int:
        served.append(settings)
        return 0

    monkeypatch.setattr("shutil.which", lambda program, path: "/bin/true")
    monkeypatch.setattr(engine, "engine_version", lambda program: "1.7.0")
    monkeypatch.setattr(engine, "start_program", start)
    with pytest.raises(Stopped), engine.running_engine(str(tmp_path)):
        pass
    (command,) = begun
    config = tmp_path / "flatmount.toml"
    config.write_text('version = 1\n[snapshotter]\nmetrics = "127.0.0.1:9400"\n')
    monkeypatch.setenv("FLATMOUNT_CONFIG", str(config))
    monkeypatch.setattr(daemon, "run", run)
    monkeypatch.setattr("flatmount.cli.snapshotter.require_root", lambda verb: None)
    assert main(list(command[command.index("flatmount") + 1 :])) == 0
    assert [settings.metrics for settings in served] == [""]
