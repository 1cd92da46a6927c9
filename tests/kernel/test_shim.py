"""The shim with a shell script in the runtime's place: reports, logs, signals, and whose end is whose."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from flatmount.errors import FlatmountError
from flatmount.runtime.launch import Launch, Running, RuntimeRefused, StartFailed, launch
from tests.waiting import until

SHELL = os.path.realpath("/bin/sh")


def wanted(directory: Path, container: str, *, log_bytes: int = 1 << 20, **more: object) -> Launch:
    """A launch whose runtime starts `container` in the background, writes its pid down, and ends."""
    # In a shell of its own, so that none waits for it: runc does not either.
    script = f"cd {directory} && ({container} & echo $! > pid.new) && mv pid.new pid"
    fields = {"owner": (0, 0), "log_bytes": log_bytes, "foreground": False, **more}
    return Launch(directory=str(directory), command=(SHELL, "-c", script), **fields)  # type: ignore[arg-type]


def ended(running: Running) -> int:
    code = running.wait()
    running.reap()
    return code


@pytest.mark.parametrize(("script", "code"), [("exit 5", 5), ("kill -9 $$", 137), ("true", 0)])
def test_the_end_is_reported_and_written_down(tmp_path: Path, script: str, code: int) -> None:
    running = launch(wanted(tmp_path, f"sh -c 'sleep 0.1; {script}'"))
    assert running.pid > 0
    assert ended(running) == code
    assert (tmp_path / "exit").read_text().split()[0] == str(code)


def test_lines_go_to_the_log_by_stream_and_long_ones_whole(tmp_path: Path) -> None:
    script = "echo one; printf half; echo err >&2; sleep 0.1; echo .; head -c 40000 /dev/zero"
    ended(launch(wanted(tmp_path, f"sh -c '{script}'")))
    entries = [line.split(b" ", 3) for line in (tmp_path / "log").read_bytes().splitlines()]
    out = b"".join(text + (b"\n" if kind == b"F" else b"") for _, stream, kind, text in entries if stream == b"stdout")
    assert out == b"one\nhalf.\n" + b"\0" * 40000
    assert [text for _, stream, _, text in entries if stream == b"stderr"] == [b"err"]
    assert all(at.endswith(b"Z") and len(at) == 30 for at, *_ in entries)


def test_the_log_is_cut_and_one_older_part_kept(tmp_path: Path) -> None:
    ended(launch(wanted(tmp_path, "sh -c 'i=0; while [ $i -lt 2000 ]; do echo $i; i=$((i+1)); done'", log_bytes=10000)))
    sizes = [(tmp_path / name).stat().st_size for name in ("log", "log.1")]
    assert all(0 < size <= 10000 for size in sizes)
    kept = [int(line.split()[3]) for name in ("log.1", "log") for line in (tmp_path / name).read_text().splitlines()]
    assert kept == list(range(kept[0], 2000))


def test_signals_are_passed_on(tmp_path: Path) -> None:
    running = launch(wanted(tmp_path, "sh -c 'trap \"exit 9\" USR1; touch ready; while :; do sleep 0.02; done'"))
    until((tmp_path / "ready").exists)
    running.send(signal.SIGUSR1)
    assert ended(running) == 9


def test_a_runtime_that_fails_and_one_that_is_not_there(tmp_path: Path) -> None:
    fields = {"directory": str(tmp_path), "owner": (0, 0), "log_bytes": 0, "foreground": False}
    with pytest.raises(RuntimeRefused, match="ended with 3"):
        launch(Launch(command=(SHELL, "-c", "exit 3"), **fields))  # type: ignore[arg-type]
    with pytest.raises(StartFailed) as failure:
        launch(Launch(command=("/nowhere/runc",), **fields))  # type: ignore[arg-type]
    assert failure.value.step == "execve"
    with pytest.raises(StartFailed, match="read the container's pid"):
        launch(Launch(command=(SHELL, "-c", "true"), **fields))  # type: ignore[arg-type]


def test_a_container_that_is_not_ours_to_wait_for_is_refused(tmp_path: Path) -> None:
    command = (SHELL, "-c", f"cd {tmp_path}; true & echo $! > pid; wait")
    with pytest.raises(StartFailed, match="wait for the container"):
        launch(Launch(directory=str(tmp_path), command=command, owner=(0, 0), log_bytes=0, foreground=False))


def test_a_runtime_that_hangs_is_given_up_and_killed(tmp_path: Path) -> None:
    hanging = Launch(
        directory=str(tmp_path), command=(SHELL, "-c", "echo $$ > hanging; exec sleep 1000"), owner=(0, 0), log_bytes=0,
        foreground=False,
    )  # fmt: skip
    os.chdir(tmp_path)
    for timeout_s in (0.5, 2, 8, 32):  # a busy machine may not have come to the script by then
        with pytest.raises(FlatmountError, match="took longer than"):
            launch(hanging, timeout_s=timeout_s)
        if (tmp_path / "hanging").exists() and (tmp_path / "hanging").read_text():
            break
    pid = int((tmp_path / "hanging").read_text())
    assert not Path(f"/proc/{pid}").exists()


def test_bound_ends_with_us_and_otherwise_it_lives(tmp_path: Path) -> None:
    for bound in (True, False):
        directory = tmp_path / str(bound)
        directory.mkdir()
        running = launch(wanted(directory, "sleep 1000", bound=bound))
        running.close()
        if bound:
            until((directory / "exit").exists)
            assert (directory / "exit").read_text().startswith("137 ")
        else:
            time.sleep(0.2)
            os.kill(running.pid, signal.SIGTERM)
            until((directory / "exit").exists)
            assert (directory / "exit").read_text().startswith("143 ")
        running.reap()


# What ends before it is executed has the name that runc gave it; here while the shim waits for 200 others.
UNEXECUTED = """
import os, signal
signal.alarm(120)
others = []
for _ in range(200):
    out, into = os.pipe()
    if os.fork() == 0:
        other = os.fork()
        if other == 0:
            signal.pause()
        os.write(into, b"%d" % other)
        os._exit(0)
    os.wait()
    others.append(int(os.read(out, 20)))
    os.close(out), os.close(into)
with open("/proc/self/comm", "w") as name:
    name.write("runc:[2:INIT]")
os.write(2, b"exec /x: no such file or directory")
shim = os.getppid()
os.kill(shim, signal.SIGSTOP)
for other in others:
    os.kill(other, signal.SIGKILL)
while any(open(f"/proc/{other}/stat").read().split()[2] != "Z" for other in others):
    pass
os.kill(shim, signal.SIGCONT)
while os.path.exists(f"/proc/{others[0]}"):
    pass
os._exit(1)
"""


def test_a_container_that_ends_while_others_are_waited_for_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "container.py").write_text(UNEXECUTED)
    for _ in range(3):
        assert ended(launch(wanted(tmp_path, f"{sys.executable} container.py"))) == 127


def test_what_comes_after_is_executed_last(tmp_path: Path) -> None:
    after = (SHELL, "-c", f"cp {tmp_path}/exit {tmp_path}/after")
    running = launch(wanted(tmp_path, "sleep 0.1", after=after))
    running.reap()
    running.close()
    assert (tmp_path / "after").read_text() == (tmp_path / "exit").read_text()


def test_no_descriptor_reaches_the_container(tmp_path: Path) -> None:
    leak = os.open("/", os.O_RDONLY)
    os.set_inheritable(leak, True)
    try:
        ended(launch(wanted(tmp_path, "sh -c 'sleep 0.1; ls -l /proc/self/fd'")))
    finally:
        os.close(leak)
    log = (tmp_path / "log").read_text()
    numbers = {int(line.split(" -> ")[0].split()[-1]) for line in log.splitlines() if " -> " in line}
    assert numbers <= {0, 1, 2, 3}  # 3 is what ls itself has open
