"""What a person gets who asks for what cannot be: one line, the right exit code, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flatmount.kernel.mounts import read_table
from tests.e2e.conftest import CommandLine
from tests.e2e.containers.conftest import ATTACHMENTS, left_by, new_name
from tests.waiting import until

# Sets a filter that answers every setns(2) into a mount namespace with ENOSYS, and becomes the command.
WITHOUT_SETNS = """
import ctypes, os, struct, sys
SETNS, ARCH = {"x86_64": (308, 0xC000003E), "aarch64": (268, 0xC00000B7)}[os.uname().machine]
rules = [
    (0x20, 0, 0, 4), (0x15, 0, 5, ARCH),
    (0x20, 0, 0, 0), (0x15, 0, 3, SETNS),
    (0x20, 0, 0, 24), (0x15, 0, 1, 0x20000),  # the second argument: CLONE_NEWNS
    (0x06, 0, 0, 0x00050000 | 38),
    (0x06, 0, 0, 0x7FFF0000),
]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
program = ctypes.create_string_buffer(struct.pack("H6xQ", len(rules), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(22, ctypes.c_ulong(2), program, 0, 0):
    raise OSError(ctypes.get_errno(), "seccomp")
os.execv(sys.argv[1], sys.argv[1:])
"""

# A runtime that keeps to the command line and nothing else: what it starts is a process, and no container.
PLAIN_RUNTIME = """#!/bin/sh
while [ "$1" != --pid-file ]; do shift; done
(sleep 0.2; exit 7) & echo $! > "$2.new"; mv "$2.new" "$2"
"""


def without_setns(line: CommandLine, *arguments: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-c", WITHOUT_SETNS, sys.executable, "-m", "flatmount", *arguments]
    return subprocess.run(call, env=line.environment(), capture_output=True, text=True, timeout=120, check=False)


def test_a_kernel_that_cannot_attach_privately_is_told_and_host_does_without(line: CommandLine, tmp_path: Path) -> None:
    done = without_setns(line, "run", "--rm", "--name", new_name(), "tiny", "true")
    assert done.returncode == 125
    assert done.stderr.count("\n") == 1 and "does not attach privately" in done.stderr
    assert "Function not implemented" in done.stderr and done.stderr.endswith("--attach host does without\n")
    probed = without_setns(line, "probe")
    assert "run cannot attach privately: this kernel does not attach privately" in probed.stdout
    assert "auto takes flat" in probed.stdout
    assert not left_by(line)
    # runc itself enters mount namespaces; what is proved is that nothing of ours does.
    runtime = tmp_path / "plain-runtime"
    runtime.write_text(PLAIN_RUNTIME)
    runtime.chmod(0o755)
    options = ("--rm", "--attach", "host", "--runtime", str(runtime), "--name", new_name())
    done = without_setns(line, "run", *options, "tiny", "true")
    assert (done.returncode, done.stderr) == (7, "")
    assert not left_by(line)


@pytest.mark.parametrize("attach", ATTACHMENTS)
def test_without_control_groups_of_ones_own_nothing_starts(line: CommandLine, attach: str) -> None:
    points = [entry.mount_point for entry in read_table() if entry.mount_point.startswith("/sys/fs/cgroup")]
    assert points
    for point in points:
        subprocess.run(["mount", "-o", "remount,bind,ro", point], check=True)
    try:
        said = line.refused("run", "--rm", "--name", new_name(), "--attach", attach, "tiny", "true", code=125)
    finally:
        for point in points:
            subprocess.run(["mount", "-o", "remount,bind,rw", point], check=True)
    assert "runc did not start the container" in said and "ead-only file system" in said
    assert "control groups that it may change" in said
    assert not left_by(line)
    line("run", "--rm", "--name", new_name(), "--attach", attach, "tiny", "true")


def test_the_name_of_a_dead_container(line: CommandLine) -> None:
    ended, lost = new_name(), new_name()
    line("run", "--name", ended, "tiny", "sh", "-c", "echo before; exit 3", expect=3)
    line("run", "--detach", "--name", lost, "tiny", "sleep", "1000")
    (facts,) = line.json("ps")["containers"]
    status = Path(f"/proc/{facts['pid']}/status").read_text()
    os.kill(int(status.partition("PPid:")[2].split()[0]), signal.SIGKILL)
    until(lambda: not line.json("ps")["containers"])
    states = {facts["id"]: (facts["state"], facts["exit_code"]) for facts in line.json("ps", "--all")["containers"]}
    assert states == {ended: ("exited", 3), lost: ("exited", 137)}
    for name in (ended, lost):
        assert "does not run" in line.refused("exec", name, "true", code=125)
        assert "a container" in line.refused("run", "--name", name, "tiny", "true", code=125)
        line("stop", name)
        line("logs", name)
        line("remove", name)
        assert "no container" in line.refused("logs", name, code=2)


def test_a_runtime_that_cannot_be_one(line: CommandLine, tmp_path: Path) -> None:
    for number, (content, mode, word) in enumerate(
        (
            ("#!/nowhere/interpreter\n", 0o755, "execve: No such file or directory"),
            ("garbage", 0o755, "execve: Exec format error"),
            ("#!/bin/sh\n", 0o644, "cannot be executed"),
            ("#!/bin/sh\nexit 0\n", 0o755, "read the container's pid"),
            ("#!/bin/sh\nkill -9 $$\n", 0o755, "it said nothing"),
        )
    ):
        runtime = tmp_path / f"runtime-{number}"
        runtime.write_text(content)
        runtime.chmod(mode)
        said = line.refused("run", "--rm", "--name", new_name(), "--runtime", str(runtime), "tiny", "true", code=125)
        assert word in said, said
        assert not left_by(line)
