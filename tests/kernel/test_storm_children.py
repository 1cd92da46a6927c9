"""The health probe and the watchers as real processes: what they see, what they cost, and that they end."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from own_namespace import in_own_namespace, mount, umount

from flatmount.errors import FlatmountError
from flatmount.kernel.mounts import mount_count
from flatmount.storm.child import Child
from flatmount.storm.probe import HealthProbe
from flatmount.storm.watcher import Watchers, WatcherTotals
from tests.waiting import until


def children() -> set[int]:
    """Processes that this test's thread started and that were not waited for."""
    with open("/proc/thread-self/children") as file:
        return set(map(int, file.read().split()))


def bytes_read(pid: int) -> int:
    return int(Path(f"/proc/{pid}/io").read_text().split()[1])


def wait_until_gone(pids: list[int]) -> None:
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            assert poll.poll(60_000), f"process {pid} is still there"
        finally:
            os.close(pidfd)


def test_the_probe_has_ten_rounds_and_fifty_samples_a_second() -> None:
    with HealthProbe() as probe:
        for _ in range(30):
            start = time.monotonic_ns()
            time.sleep(1.0)
            end = time.monotonic_ns()
            window = probe.between(start, end)
            seconds = (end - start) / 1e9
            assert all(0 <= at <= seconds for at, _ in (*window.rounds, *window.mounts))
            assert all(0 < ms < 60_000 for _, ms in window.rounds)
            due = [at for at, _ in window.rounds if at > 0]  # others were due before, and late
            assert int(seconds * 10) <= len(due) <= int(seconds * 10) + 1
            assert all(later - sooner == pytest.approx(0.1, abs=1e-6) for sooner, later in pairwise(due))
            assert len(window.mounts) <= seconds * 50 + 5
            if len(window.mounts) >= 20:  # a busy machine misses some
                break
        else:
            pytest.fail("no second has half of its samples")
    assert not children()


@in_own_namespace
def test_the_probe_sees_the_table_of_the_thread_that_started_it(tmp_path: Path) -> None:
    before = mount_count()
    with HealthProbe() as probe:
        start = time.monotonic_ns()

        def seen() -> list[int]:
            return [count for _, count in probe.between(start, time.monotonic_ns()).mounts]

        mount("t", str(tmp_path), "tmpfs")
        until(lambda: before + 1 in seen())
        umount(str(tmp_path))
        until(lambda: seen()[-1] == before)
        assert set(seen()) <= {before, before + 1}


def test_a_stall_counts_in_every_round_that_had_to_wait() -> None:
    with HealthProbe() as probe:
        (pid,) = children()
        os.kill(pid, signal.SIGSTOP)
        until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        start = time.monotonic_ns()
        time.sleep(0.75)
        stalled_ms = (time.monotonic_ns() - start) / 1e6
        os.kill(pid, signal.SIGCONT)
        window = probe.between(start, start + 700_000_000)
    late = [(at, ms) for at, ms in window.rounds if at > 0]
    assert len(late) == 7
    # The first round waited for nearly the whole stall, each later one for a tenth of a second less.
    assert late[0][0] <= 0.1
    assert all(ms >= stalled_ms - at * 1000 for at, ms in late)
    assert all(sooner[1] - later[1] <= 101 for sooner, later in pairwise(late))


@in_own_namespace
def test_watchers_read_the_table_again_at_changes_and_say_what_it_cost(tmp_path: Path) -> None:
    with Watchers(2) as watchers:
        pids, table = children(), Path("/proc/thread-self/mountinfo").read_bytes()
        for _ in range(20):
            due = {pid: bytes_read(pid) + len(table) for pid in pids}
            mount("t", str(tmp_path), "tmpfs")
            umount(str(tmp_path))
            until(lambda due=due: all(bytes_read(pid) >= due[pid] for pid in pids))
        totals = watchers.stop()
    assert 2 * 10 <= totals.rereads <= 2 * 40
    assert totals.entries >= totals.rereads * (mount_count() - 1)
    assert totals.bytes > totals.entries * 20
    assert 0 < totals.cpu_s < 5
    assert not children()


def test_watchers_of_a_quiet_table_do_nothing() -> None:
    @in_own_namespace
    def quiet() -> None:
        with Watchers(1) as watchers:
            time.sleep(0.1)
            assert watchers.stop().rereads == 0

    quiet()
    with Watchers(0) as none:
        assert none.stop() == WatcherTotals(0, 0, 0, 0.0)


def test_nothing_outlives_a_parent_that_is_killed() -> None:
    code = (
        "import time\n"
        "from flatmount.storm.probe import HealthProbe\n"
        "from flatmount.storm.watcher import Watchers\n"
        "with HealthProbe(), Watchers(2):\n"
        "    print(open('/proc/thread-self/children').read(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        parent.kill()
        parent.wait()
    wait_until_gone(pids)


def test_ctrl_c_is_left_to_the_parent() -> None:
    with HealthProbe():
        (pid,) = children()
        assert os.getpgid(pid) != os.getpgid(0)


def test_a_child_that_dies_or_says_nothing_is_one_line() -> None:
    child = Child("flatmount.storm.no_such_module")
    try:
        with pytest.raises(FlatmountError, match="no_such_module ended with 1"):
            child.wait_for_output()
    finally:
        child.close()
    with HealthProbe() as probe:
        (pid,) = children()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(FlatmountError, match=r"probe ended with -9"):
            probe.between(time.monotonic_ns(), time.monotonic_ns() + 10**9)
    child = Child("flatmount.storm.watcher")
    try:
        child.wait_for_output()
        child.new_lines()
        with pytest.raises(FlatmountError, match=r"wrote nothing for 0\.05 s"):
            child.wait_for_output(0.05)
    finally:
        child.close()
        child.close()
    assert not children()
