"""Learning the mount locks' addresses from stacks, and what is shown of a sample."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from flatmount.cli.main import main
from flatmount.errors import EXIT_USAGE
from flatmount.observe.lock_watch import StackLines
from flatmount.observe.symbols import Lock
from flatmount.observe.watch_results import CauseRate, LockRate, Sample
from flatmount.report.watch import Screen, one_line, prometheus

# Recorded on 6.18: events of two processors come between each other; a wait for the scheduler's lock among them.
LINES = """\
          python-32323   (  32323) [001]   5725.857524: contention_begin: ffff888627d2ba80 (flags=SPIN)
          python-32323   (  32323) [001]   5725.857547: <stack trace>
 => trace_event_raw_event_contention_begin
 => __pv_queued_spin_lock_slowpath
 => _raw_spin_lock
 => __schedule
       flatmount-6981    (   6792) [000]   5725.860064: contention_begin: ffffffff8300b784 (flags=SPIN)
       flatmount-6970    (   6792) [001]   5725.860088: contention_begin: ffffffff830f60b8 (flags=WRITE)
       flatmount-6981    (   6792) [000]   5725.860089: <stack trace>
 => trace_event_raw_event_contention_begin
 => __pv_queued_spin_lock_slowpath
 => _raw_spin_lock
 => mntput_no_expire
       flatmount-6970    (   6792) [001]   5725.860090: <stack trace>
 => trace_event_raw_event_contention_begin
 => rwsem_down_write_slowpath
 => down_write
 => vfs_open_tree
"""
NAMESPACE_SEM, MOUNT_LOCK = "ffffffff830f60b8", "ffffffff8300b784"


def learned(*texts: str) -> dict[str, Lock]:
    lines = StackLines()
    for text in texts:
        lines.take(text.splitlines())
        lines.finish()
    return lines.addresses()


def test_an_address_is_known_when_it_was_seen_twice() -> None:
    assert learned(LINES) == {}
    assert learned(LINES, LINES) == {NAMESPACE_SEM: Lock.NAMESPACE_SEM, MOUNT_LOCK: Lock.MOUNT_LOCK}


def test_an_address_that_was_another_lock_too_is_not_believed() -> None:
    other = LINES.replace("vfs_open_tree", "vfs_rename")
    assert learned(LINES, LINES, other) == {MOUNT_LOCK: Lock.MOUNT_LOCK}


SAMPLE = Sample(
    at="2026-01-31T12:00:00Z",
    seconds=1.0,
    mounts=1234,
    peak=2000,
    attached=30,
    detached=20,
    attached_per_s=3.0,
    detached_per_s=2.0,
    polled=False,
    causes=(
        CauseRate("runc", 0, "", "", "", 3.0),
        CauseRate('od"d', 77, "ab" * 32, "pod-uid", "/kubepods/x", 1.5),
        CauseRate('od"d', 78, "ab" * 32, "pod-uid", "/kubepods/x", 1.0),
    ),
    locks=(LockRate("namespace_sem", 5, 1.25),),
    health_ms=0.04,
    init_name="systemd",
    init_cpu_share=0.02,
    own_cpu_share=0.005,
    lost=0,
    unseen=(),
)


def test_the_page_fits_and_says_everything() -> None:
    screen = Screen()
    screen.draw(SAMPLE)
    text = screen.draw(replace(SAMPLE, mounts=1300, lost=3, unseen=("causes: no root",)), 72)
    assert all(len(line) <= 72 for line in text.splitlines())
    for part in (
        "1,300",
        "peak 2,000",
        "namespace_sem",
        "pod pod-uid",
        "runc (ended)",
        "costs 0.5%",
        "not seen: causes",
    ):
        assert part in text
    nothing = replace(SAMPLE, causes=None, locks=None, init_cpu_share=None, polled=True)
    assert "compared looks" in screen.draw(nothing)
    assert "nobody mounts" in screen.draw(replace(SAMPLE, causes=()))


def test_a_line_for_pipes() -> None:
    assert one_line(SAMPLE).endswith("runc 3/s")
    assert one_line(replace(SAMPLE, causes=None)).endswith("ms")
    assert json.loads(json.dumps(SAMPLE.to_json()))["schema"] == "flatmount.watch/1"


def test_prometheus_text_has_bounded_unique_series() -> None:
    text = prometheus(SAMPLE)
    series = [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(series) == len(set(series))
    assert all(re.fullmatch(r'flatmount_\w+(\{(\w+="(\\.|[^"\\])*",?)*\})?', one) for one in series)
    assert 'flatmount_cause_operations_per_second{process="od\\"d",container="abababababab",pod="pod-uid"} 2.5' in text
    assert 'flatmount_mount_events_total{kind="attached"} 30' in text
    assert "flatmount_lock" not in prometheus(replace(SAMPLE, locks=None))


@pytest.mark.parametrize(
    "words", [["--interval", "x"], ["--prometheus", "9477"], ["--prometheus", ":0"], ["--textfile", "/none/x.prom"]]
)
def test_bad_calls(words: list[str]) -> None:
    assert main(["watch", *words, "--for", "1s"]) == EXIT_USAGE
