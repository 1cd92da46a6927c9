"""`flatmount run`, `ps`, `exec`, `logs`, `stop` and `remove`, with the machine's runc."""

from __future__ import annotations

import os
import pty
import random
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from flatmount.kernel.mounts import read_table
from flatmount.runtime import cgroups
from tests.conftest import SOAK
from tests.e2e.conftest import CommandLine
from tests.e2e.containers.conftest import ATTACHMENTS, left_by, new_name
from tests.waiting import until


def run(line: CommandLine, *arguments: str, expect: int = 0) -> str:
    return line("run", "--rm", "--name", new_name(), *arguments, expect=expect)


@pytest.mark.parametrize("attach", ATTACHMENTS)
def test_a_container_is_what_its_image_and_the_call_say(line: CommandLine, attach: str) -> None:
    script = (
        "id -u; id -g; hostname; echo $COLOUR $EXTRA; pwd; cat /proc/self/uid_map; grep -c . /etc/hosts; nproc >/new"
    )
    options = ("--attach", attach, "--hostname", "box", "--env", "EXTRA=x=1", "--workdir", "/srv")
    said = run(line, *options, "tiny", "sh", "-c", script).split("\n")
    assert said[:5] == ["0", "0", "box", "green x=1", "/srv"]
    assert said[5].split() == ["0", "1048576", "65536"]


@pytest.mark.parametrize("attach", ATTACHMENTS)
def test_how_often_the_host_sees_a_mount(line: CommandLine, attach: str) -> None:
    name = new_name()
    before = len(read_table())
    line("run", "--detach", "--name", name, "--attach", attach, "tiny", "sleep", "100")
    assert len(read_table()) - before == (1 if attach == "host" else 0)
    line("remove", "--force", name)


def test_every_way_to_name_a_user(line: CommandLine) -> None:
    cases = {
        "app": "uid=1000(app) gid=1001(app) groups=29(audio),44(video)",
        "1000": "uid=1000(app) gid=1001(app) groups=29(audio),44(video)",
        "app:audio": "uid=1000(app) gid=29(audio)",
        "7:8": "uid=7 gid=8",
        "0": "uid=0(root) gid=0(root) groups=44(video)",
    }
    for user, expected in cases.items():
        assert run(line, "--user", user, "tiny", "id").strip().removesuffix(" groups=29(audio)") == expected
    assert run(line, "--user", "app", "tiny", "sh", "-c", "echo $HOME") == "/home/app\n"


def test_exit_codes_and_signals_come_through(line: CommandLine) -> None:
    run(line, "tiny", "sh", "-c", "exit 33", expect=33)
    assert "not in the container" in run(line, "tiny", "nothing-like-that", expect=127)
    assert "cannot be executed" in run(line, "tiny", "/bin/not-executable", expect=126)
    said = run(line, "tiny", "/bin/no-interpreter", expect=127)
    assert "exec /bin/no-interpreter: no such file" in said and "the interpreter in its first line" in said
    run(line, "tiny", "/bin", expect=126)
    run(line, "tiny", "sh", "-c", "exec /bin/no-interpreter", expect=127)  # the shell's own word for it
    run(line, "tiny", "sh", "-c", "echo exec /x: no such file or directory >&2; exit 1", expect=1)
    script = "trap 'exit 44' USR1; echo ready; while :; do sleep 0.05; done"
    process = line.start("run", "--rm", "--name", new_name(), "tiny", "sh", "-c", script, stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 44


def test_both_streams_go_where_they_belong_and_input_arrives(line: CommandLine) -> None:
    script = "cat; echo error >&2; echo again >/dev/stdout"
    with line.start(
        "run", "--rm", "--name", new_name(), "tiny", "sh", "-c", script,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.communicate("typed\n", timeout=60) == ("typed\nagain\n", "error\n")
        assert process.returncode == 0


def test_a_terminal_with_size_and_interrupt(line: CommandLine) -> None:
    pid, fd = pty.fork()
    if pid == 0:
        # The whole path as its own name, too: a virtual environment is found by it.
        command = [sys.executable, "-m", "flatmount"]
        options = ["run", "--rm", "--tty", "--name", new_name(), "tiny", "sh"]
        os.execve(sys.executable, [*command, *options], line.environment())
    seen = bytearray()

    def shows(text: bytes) -> bool:
        if select.select([fd], [], [], 0.05)[0]:
            seen.extend(os.read(fd, 4096))
        return text in seen

    try:
        import fcntl
        import struct
        import termios

        until(lambda: shows(b"/ # "))
        fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 44, 99, 0, 0))
        until(lambda: os.write(fd, b"stty size\n") and shows(b"44 99"))
        os.write(fd, b"echo $((6*7)); sleep 100\n")
        until(lambda: shows(b"42\r\n"))
        os.write(fd, b"\x03")
        os.write(fd, b"exit 9\n")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    finally:
        os.close(fd)


@pytest.mark.parametrize("attach", ATTACHMENTS)
def test_volumes_are_the_containers_own_in_both_directions(line: CommandLine, tmp_path: Path, attach: str) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "file").write_text("content\n")
    os.chown(volume, 1000, 1001)
    os.chown(volume / "file", 1000, 1001)
    options = ["--attach", attach, "--user", "app"]
    for extra in ("/data", "/data:ro", "/data:noidmap"):
        options_here = [*options, "--volume", f"{volume}:{extra}"]
        script = "stat -c %u:%g /data/file; cat /data/file; touch /data/new 2>&1; echo $?"
        said = run(line, *options_here, "tiny", "sh", "-c", script).split("\n")
        assert said[0] == ("65534:65534" if "noidmap" in extra else "1000:1001")
        assert said[1] == "content"
        assert said[-2] == ("0" if extra == "/data" else "1")
    made = (volume / "new").stat()
    assert (made.st_uid, made.st_gid) == (1000, 1001)
    one = ("--volume", f"{volume}/file:/srv/one:ro")
    assert run(line, *options, *one, "tiny", "cat", "/srv/one") == "content\n"


def test_limits_reach_the_control_groups(line: CommandLine) -> None:
    name = new_name()
    options = ("--memory", "64m", "--cpus", "0.5", "--pids-limit", "20")
    line("run", "--detach", "--name", name, *options, "tiny", "sleep", "100")
    values = {
        file: Path(group, file).read_text().strip()
        for group in cgroups.groups(name)
        for file in ("memory.limit_in_bytes", "pids.max", "cpu.cfs_quota_us", "memory.max", "cpu.max")
        if Path(group, file).exists()
    }
    assert "20" in values.values() and str(64 << 20) in values.values()
    assert "50000" in values.values() or values.get("cpu.max") == "50000 100000"


def test_the_usual_files_network_and_a_read_only_root(line: CommandLine) -> None:
    script = "touch /x; cat /etc/hostname; ls /sys/class/net; cat /etc/resolv.conf"
    said = run(line, "--read-only", "tiny", "sh", "-c", f"{script} 2>&1")
    assert "Read-only file system" in said or "lo" in said
    assert run(line, "--read-only", "tiny", "sh", "-c", "touch /x 2>/dev/null || echo refused") == "refused\n"
    host = run(line, "--network", "host", "tiny", "sh", "-c", "ls /sys/class/net; cat /etc/resolv.conf")
    assert Path("/etc/resolv.conf").read_text() in host
    assert run(line, "tiny", "ls", "/sys/class/net") == "lo\n"


def test_the_filter_and_the_capabilities(line: CommandLine) -> None:
    status = run(line, "tiny", "grep", "-E", "^(CapBnd|CapEff|Seccomp|NoNewPrivs):", "/proc/self/status")
    values = dict(entry.split(":\t") for entry in status.strip().split("\n"))
    assert values["Seccomp"] == "2" and values["NoNewPrivs"] == "1"
    assert values["CapEff"] == values["CapBnd"] == "00000000a80425fb"
    assert run(line, "tiny", "sh", "-c", "mount -t tmpfs x /tmp 2>/dev/null || echo refused") == "refused\n"


@pytest.mark.parametrize("attach", ATTACHMENTS)
def test_a_container_outlives_the_command(line: CommandLine, attach: str) -> None:
    name = new_name()
    script = "trap 'echo bye; exit 7' TERM; echo hello; echo oops >&2; while :; do sleep 0.05; done"
    assert line("run", "-d", "--attach", attach, "--name", name, "tiny", "sh", "-c", script) == f"{name}\n"
    until(lambda: line("logs", name) == "hello\n")
    (facts,) = line.json("ps")["containers"]
    assert (facts["id"], facts["state"], facts["attached"]) == (name, "running", attach)
    assert (
        line("exec", "--user", "app", "--env", "A=b", name, "sh", "-c", "id -un; echo $A; echo $COLOUR")
        == "app\nb\ngreen\n"
    )
    assert "not in the container" in line.refused("exec", name, "nothing-like-that", code=127)
    assert "interpreter" in line("exec", name, "/bin/no-interpreter", expect=127)
    line("exec", name, "sh", "-c", "exit 5", expect=5)
    assert "runs" in line.refused("remove", name, code=1)
    line("stop", name)
    (facts,) = line.json("ps", "--all")["containers"]
    assert (facts["state"], facts["exit_code"]) == ("exited", 7)
    assert line("logs", name) == "hello\nbye\n"
    assert "does not run" in line.refused("exec", name, "true", code=125)
    line("remove", name)
    assert line.json("ps", "--all")["containers"] == []


def test_stop_kills_what_does_not_listen(line: CommandLine) -> None:
    name = new_name()
    line("run", "-d", "--name", name, "tiny", "sleep", "1000")
    line("stop", "--time", "0", name)
    (facts,) = line.json("ps", "--all")["containers"]
    assert facts["exit_code"] == 137


def test_a_detached_container_goes_by_itself(line: CommandLine) -> None:
    line("run", "-d", "--rm", "--name", new_name(), "tiny", "true")
    until(lambda: not left_by(line))


def test_logs_follow_until_the_end(line: CommandLine) -> None:
    name = new_name()
    line("run", "-d", "--name", name, "tiny", "sh", "-c", "for i in 1 2 3; do echo $i; sleep 0.2; done")
    assert line("logs", "--follow", name) == "1\n2\n3\n"
    stamped = line("logs", "--timestamps", name).split("\n")
    assert stamped[0].endswith("Z 1") and stamped[0][:4].isdigit()


def test_no_two_containers_share_an_id(line: CommandLine) -> None:
    names = [new_name() for _ in range(4)]
    started = [
        line.start("run", "-d", "--name", name, "tiny", "sleep", "100", stdout=subprocess.PIPE) for name in names
    ]
    for process in started:
        process.communicate(timeout=120)
        assert process.returncode == 0
    maps = {facts["map"] for facts in line.json("ps")["containers"]}
    assert len(maps) == 4
    taken = min(maps, key=lambda text: int(text.split(":")[1]))
    said = line.refused("run", "--rm", "--name", new_name(), "--map", taken, "tiny", "true", code=125)
    assert "overlap" in said and "--map auto" in said


def test_bad_input_is_one_line_and_the_right_code(line: CommandLine, tmp_path: Path) -> None:
    for arguments, word in (
        (("tiny-not",), "no image"),
        (("--user", "nobody-like-that", "tiny"), "not in the image"),
        (("--user", "4294967295", "tiny"), "no process can have"),
        (("--user", "70000", "tiny"), "larger range"),
        (("--runtime", "/nowhere/runc", "tiny"), "runtime"),
        (("--volume", "/nowhere:/x", "tiny"), "does not exist"),
        (("--volume", "relative:/x", "tiny"), "absolute"),
        (("--memory", "1k", "tiny"), "--memory"),
        (("--cpus", "none", "tiny"), "--cpus"),
        (("--hostname", "a_b", "tiny"), "host name"),
        (("--pool", "5", "tiny"), "FIRST:COUNT"),
        (("--pool", "100000:10", "tiny"), "no 65536 consecutive ids"),
        (("--workdir", "here", "tiny"), "absolute"),
    ):  # fmt: skip
        said = line.refused("run", "--rm", "--name", new_name(), *arguments, code=125)
        assert word in said, said
    assert "cannot be a container's name" in line.refused("run", "--name", "../x", "tiny", code=125)
    assert "no container" in line.refused("exec", "gone", "true", code=125)
    assert "no container" in line.refused("stop", "gone", code=1)
    closed = CommandLine(line.root, tmp_path / "run", line.extra)
    assert "chmod o+x" in closed.refused("run", "tiny", code=125)
    old = tmp_path / "old-runtime"
    old.write_text("#!/bin/sh\necho flag provided but not defined: -log-format >&2\nexit 3\n")
    old.chmod(0o755)
    assert "did not start the container" in line.refused(
        "run", "--runtime", str(old), "--name", new_name(), "tiny", code=125
    )


def test_a_name_is_taken_until_it_is_removed(line: CommandLine) -> None:
    name = new_name()
    line("run", "--name", name, "tiny", "true")
    assert "already" in line.refused("run", "--name", name, "tiny", "true", code=125)
    line("remove", name)
    line("run", "--rm", "--name", name, "tiny", "true")


def test_the_collector_leaves_what_containers_have(line: CommandLine) -> None:
    ended, lives = new_name(), new_name()
    line("run", "--name", ended, "tiny", "sh", "-c", "echo kept > /kept")
    line("run", "-d", "--name", lives, "tiny", "sleep", "100")
    uppers = set(os.listdir(line.root / "v1/data/uppers"))
    assert uppers == {ended, lives}
    line("gc", "--yes", "--uppers")
    assert set(os.listdir(line.root / "v1/data/uppers")) == uppers
    assert (line.root / "v1/data/uppers" / ended / "fs/kept").read_text() == "kept\n"


def children_of(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, task.read_text().split())
    return [one for child in found for one in (child, *children_of(child))]


@pytest.mark.soak
@pytest.mark.parametrize("round_", range(200 if SOAK else 20))
def test_nothing_is_left_after_a_kill_at_any_moment(line: CommandLine, round_: int, seed: int) -> None:
    """The starter, the shim, the runtime or the container's first process; the next command knows and clears up."""
    chance = random.Random(seed + round_)
    name = new_name()
    attach = chance.choice(ATTACHMENTS)
    process = line.start(
        "run", "--rm", "--attach", attach, "--name", name, "tiny", "sleep", "1000",
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    time.sleep(chance.uniform(0.1, 0.9))
    try:
        family = [process.pid, *children_of(process.pid)]
    except (FileNotFoundError, ProcessLookupError):
        family = []
    for victim in chance.sample(family, min(len(family), chance.choice((1, 1, 2)))):
        with suppress(ProcessLookupError):  # it has ended by itself
            os.kill(victim, signal.SIGKILL)
    time.sleep(chance.uniform(0, 0.3))
    process.kill()
    process.wait(60)
    # A shim that lives ends its container by itself, and the next command clears up.
    until(lambda: not line.json("ps", "--all")["containers"])
    assert not left_by(line)
