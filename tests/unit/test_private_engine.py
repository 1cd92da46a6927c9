"""The private containerd and service of a proof: how they are started, and what is left of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from flatmount.cli.main import main
from flatmount.config import Snapshotter
from flatmount.errors import FlatmountError
from flatmount.kernel.process import start_time
from flatmount.runtime import daemons
from flatmount.snapshotter import daemon, engine, proof


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


def test_what_is_flat_is_what_the_service_has_told_of(tmp_path: Path) -> None:
    """Numbers of snapshots are not in the order of a chain: the first one is younger than those made ahead."""
    one = engine.Engine(str(tmp_path), "1.7.0", "overlay", "", 1, 2)
    log = tmp_path / "service.log"
    log.write_text("not JSON\n")
    assert one.has_flat(1) and not one.has_flat(3)
    told = [{"msg": "serving"}, {"msg": "flat tree made", "snapshot": 2, "layers": 3}]
    log.write_text("".join(f"{json.dumps(line)}\n" for line in told) + '{"msg": "flat tree made", "lay')
    assert one.has_flat(3) and not one.has_flat(2) and not one.has_flat(40)


class Ended:
    """An engine whose daemon has ended: everything it is asked for fails."""

    place, version, form = "/nowhere", "1.7.0", "overlay"

    def take_image(self, archive: str, name: str, *, namespace: str) -> None:
        """There already."""

    def ctr(self, *arguments: str) -> str:
        return ""

    def tasks(self) -> dict[str, int]:
        raise KeyboardInterrupt

    def remove(self, name: str) -> None:
        raise FlatmountError("connection refused")


def test_an_interruption_is_no_proof_that_failed() -> None:
    with pytest.raises(KeyboardInterrupt):
        proof._proof(Ended(), "ctr", None, "image.tar")  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_interrupts_a_proof_and_records_nothing(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prove(*arguments: object, **more: object) -> list[proof.Proof]:
        os.kill(os.getpid(), number)
        return []

    before = signal.signal(number, lambda number, frame: None)
    handler = signal.getsignal(number)
    monkeypatch.setattr(proof, "prove", prove)
    monkeypatch.setattr("flatmount.cli.containerd.require_root", lambda verb: None)
    monkeypatch.setattr("flatmount.cli.containerd.enter_private_mounts", lambda: None)
    try:
        assert main(["containerd", "prove", "--root", str(tmp_path)]) == 128 + signal.SIGINT
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)
    assert not list(tmp_path.iterdir())


def test_an_interruption_at_the_terminal_does_not_reach_a_daemon(tmp_path: Path) -> None:
    process = daemons.start_program(["sleep", "60"], str(tmp_path / "log"))
    try:
        assert os.getpgid(process.pid) == process.pid
    finally:
        daemons.end_program(process)


def shim(place: Path) -> tuple[subprocess.Popen[str], int]:
    """What looks like a shim of an engine at `place`, and the process of its container."""
    command = ["containerd-shim-none", "-c", "sleep 60 & echo $!; wait", "-address", f"{place}/c.sock"]
    process = subprocess.Popen(command, executable="/bin/sh", stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_shims_and_their_containers_go_with_their_engine_only(tmp_path: Path) -> None:
    own, child = shim(tmp_path / "own")
    other, others_child = shim(tmp_path / "own-2")
    with own, other:
        daemons.kill_those_of(str(tmp_path / "own"))
        assert own.wait(60) == -signal.SIGKILL
        assert start_time(child) is None
        assert other.poll() is None
        assert start_time(others_child) is not None
        daemons.kill_those_of(str(tmp_path / "own-2"))
        assert other.wait(60) == -signal.SIGKILL


def test_what_a_killed_proof_left_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_PLACE", str(tmp_path))
    left = tmp_path / f"flatmount-engine-0123.{os.getpid()}-1"
    (left / "engine").mkdir(parents=True)
    (tmp_path / "flatmount-engine-other").mkdir()
    process, child = shim(left / "engine")
    with process, engine.engine_place() as place:
        assert process.wait(60) == -signal.SIGKILL
        assert start_time(child) is None
        assert {path.name for path in tmp_path.iterdir()} == {"flatmount-engine-other", os.path.basename(place)}
        with engine.engine_place() as another:  # one that lives is left alone
            assert os.path.isdir(place)
            assert another != place
    assert [path.name for path in tmp_path.iterdir()] == ["flatmount-engine-other"]
