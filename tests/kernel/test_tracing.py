"""Tracing against commands whose mount calls are known, and against the executor's own count."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flatmount.kernel.mounts import mount_count
from flatmount.observe.mount_calls import Effect
from flatmount.observe.tiny_image import exiting_program
from flatmount.observe.trace import NOT_FOUND, trace
from flatmount.observe.trace_engines import trace_engines
from flatmount.observe.trace_results import fits
from flatmount.observe.tracefs import TraceInstance

SCRIPT = """
mount -t tmpfs a {0} && mount --bind {0} {0} && umount {0} && umount {0}
umount {0} 2>/dev/null
unshare -m true
"""


def instances() -> list[str]:
    with TraceInstance("look") as instance:
        names = os.listdir(os.path.dirname(instance._directory))
    return [name for name in names if f".{os.getpid()}-" in name and not name.startswith("flatmount-look")]


def test_a_command_is_counted_to_the_operation(tmp_path: Path) -> None:
    mounts = mount_count()
    run = trace(["sh", "-c", SCRIPT.format(tmp_path)])
    assert run.done(Effect.ATTACH) == 2
    assert run.done(Effect.DETACH) == 2
    assert sum(call.failed for one in run.processes for call in one.calls) == 1
    assert {one.command for one in run.processes} == {"mount", "umount", "unshare"}
    assert (run.attached, run.detached) in ((2, 2), (None, None))
    assert run.copies == 1
    assert run.table_lengths == (mounts,)
    assert (run.exit_code, run.lost) == (0, 0)
    assert not instances()


def test_threads_and_grandchildren_are_followed_and_others_are_not(tmp_path: Path) -> None:
    stop, target = tmp_path / "stop", tmp_path / "target"
    own = tmp_path / "own"
    target.mkdir()
    own.mkdir()
    loop = f"until test -e {stop}; do mount -t tmpfs b {target} && umount {target}; done"
    other = subprocess.Popen(["sh", "-c", loop])
    program = f"import subprocess, threading\nt = threading.Thread(target=lambda: subprocess.run({['sync']!r}))\n"
    program += f"t.start(); t.join(); subprocess.run(['sh', '-c', 'mount -t tmpfs c {own}; umount {own}'])"
    try:
        run = trace([sys.executable, "-c", program])
    finally:
        stop.touch()
        other.wait(30)
    assert run.operations == 2


def test_a_missing_command_has_the_shells_code() -> None:
    assert trace(["no-such-command"]).exit_code == NOT_FOUND


def test_the_tiny_program_ends_with_nothing_to_say(tmp_path: Path) -> None:
    path = tmp_path / "end"
    path.write_bytes(exiting_program(os.uname().machine))
    path.chmod(0o755)
    assert subprocess.run([path], capture_output=True, check=True).stdout == b""


def test_ours_by_strategy_constant_or_growing(ram: Path) -> None:
    names = ("flatmount", "flatmount:per-layer", "flatmount:common-parent")
    runs, absent = trace_engines(names, (2, 12), str(ram), lambda text: None)
    assert absent == ()
    flat, per_layer, common = fits(runs)
    assert (flat.grows, round(flat.base)) == (False, 2)
    # The plan's own formula 2(1 + 2L), the temporary overlay of the first pass and the root's undoing included.
    assert (per_layer.grows, round(per_layer.base), round(per_layer.per_layer, 3)) == (True, 4, 4.0)
    assert not common.grows
    for run in runs:
        if run.attached is not None and run.detached is not None:
            assert run.operations == run.attached + run.detached


def test_engines_that_are_not_here_are_named(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    runs, absent = trace_engines(("containerd", "podman", "runc"), (2,), str(ram), lambda text: None)
    assert runs == ()
    assert [one.engine for one in absent] == ["containerd", "podman", "runc"]
    assert all("not installed" in one.reason for one in absent)
