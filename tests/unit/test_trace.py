"""Trace events and what is counted from them, on lines as kernels print them."""

from __future__ import annotations

import json

import pytest

from flatmount.errors import UsageError
from flatmount.observe.events import parse_event
from flatmount.observe.mount_calls import Effect, effect_of
from flatmount.observe.tiny_image import exiting_program
from flatmount.observe.trace import Tally
from flatmount.observe.trace_results import Absent, CallCount, ProcessCalls, TraceReport, TraceRun, fits
from flatmount.report.trace import render_trace
from flatmount.storm.results import HostFacts

HOST = HostFacts("6.18", "x86_64", "cpu", 2, 1 << 30, "3.11", "0.1")

# 6.18 with TGIDs, 5.15 with the irq column, one whose thread group the kernel forgot, a name with a dash and a space.
RUNC = """\
            runc-100     (    100) [001]   10.000001: task_newtask: pid=101 comm=runc clone_flags=4100 oom_score_adj=0
            runc-101     (    101) [000]   10.000002: sched_process_exec: filename=/usr/sbin/runc pid=101 old_pid=101
            runc-101     (    101) [000]   10.000010: sys_unshare(unshare_flags: 0x20000)
            runc-101     (    101) [000]   10.000110: sys_unshare -> 0x0
            runc-101     (    101) [000]   10.000200: sched_process_exec: filename=/proc/self/fd/6 pid=101 old_pid=101
            runc-101     (    101) [000]   10.000300: sys_mount(dev_name: 0, dir_name: 1, flags: 0x44000, data: 0)
            runc-101     (    101) [000]   10.000310: sys_mount -> 0x0
            runc-102     (    101) [001]   10.000320: sys_mount(dev_name: 0, dir_name: 1, flags: 0x1000, data: 0)
            runc-102     (    101) [001]   10.000340: sys_mount -> 0x0
            runc-101     (    101) [000]   10.000350: sys_umount(name: 0x5629c96262e0, flags: 2)
            runc-101     (    101) [000]   10.000360: sys_umount -> 0xffffffffffffffea
"""


def tally(text: str, length: int | None = 30) -> Tally:
    counted = Tally(length_of=lambda process: length)
    for line in text.splitlines():
        counted.take(line)
    return counted


@pytest.mark.parametrize(
    ("line", "thread", "process", "comm", "time_ns"),
    [
        (
            "           mount-12424   (  12424) [001] d..1.  2962.823310: sys_mount -> 0x0",
            12424,
            12424,
            "mount",
            823310,
        ),
        ("           mount-12424   [001] .... 2962.823310: sys_mount -> 0x0", 12424, None, "mount", 823310),
        ("  my proc-1-7   (-------) [255] 2962.000001: sys_mount -> 0x0", 7, None, "my proc-1", 1),
    ],
)
def test_lines_of_several_kernels(line: str, thread: int, process: int | None, comm: str, time_ns: int) -> None:
    event = parse_event(line)
    assert event is not None
    assert (event.thread, event.process, event.comm) == (thread, process, comm)
    assert event.time_ns == 2962 * 10**9 + time_ns * 1000
    assert event.returned == 0


@pytest.mark.parametrize("line", ["", "# tracer: nop", " => do_mount", "CPU:1 [LOST 12 EVENTS]"])
def test_what_is_no_event(line: str) -> None:
    assert parse_event(line) is None


def test_a_runtime_is_counted_by_process_effect_and_success() -> None:
    (process,) = tally(RUNC).processes()
    assert (process.process, process.command) == (101, "runc")
    assert process.calls == (
        CallCount("unshare", Effect.COPY, 1, 0, 100.0, 100.0),
        CallCount("mount", Effect.CHANGE, 1, 0, 10.0, 10.0),
        CallCount("mount", Effect.ATTACH, 1, 0, 20.0, 20.0),
        CallCount("umount", Effect.DETACH, 0, 1, 10.0, 10.0),
    )


def test_a_copied_table_is_measured_at_the_nearest_ancestor_that_lives() -> None:
    counted = Tally(length_of={100: 40}.get)
    for line in RUNC.splitlines():
        counted.take(line)
    assert (counted.copies, counted.table_lengths) == (1, [40])
    assert (tally(RUNC, None).copies, tally(RUNC, None).table_lengths) == (1, [])


def test_a_number_that_was_another_processs_thread_is_nobodys_name() -> None:
    lines = """\
              sh-9731    (   9731) [000]  1.368154: task_newtask: pid=9738 comm=sh clone_flags=4100 oom_score_adj=0
           <...>-9738    (   8688) [000]  1.368331: sched_process_exec: filename=/usr/bin/mount pid=9738 old_pid=9738
           mount-9738    (   9738) [000]  1.369700: task_newtask: pid=9739 comm=mount clone_flags=10000 oom_score_adj=0
           <...>-9739    (   8688) [000]  1.369713: sys_mount(dev_name: 0, dir_name: 1, type: 2, flags: 0, data: 0)
           mount-9739    (   9738) [000]  1.369798: sys_mount -> 0x0
"""
    (process,) = tally(lines).processes()
    assert (process.process, process.command) == (9738, "mount")


def test_clone3_copies_are_seen_by_the_new_task() -> None:
    line = "sh-5 (5) [000] 1.000000: task_newtask: pid=6 comm=sh clone_flags=20000 oom_score_adj=0"
    counted = tally(line)
    assert counted.copies == 1
    assert counted.processes()[0].calls == (CallCount("clone", Effect.COPY, 1, 0, 0.0, 0.0),)


@pytest.mark.parametrize(
    ("name", "arguments", "effect"),
    [
        ("mount", {"flags": 0}, Effect.ATTACH),
        ("mount", {"flags": 0x5000}, Effect.ATTACH),
        ("mount", {"flags": 0xC0ED0020}, Effect.CHANGE),
        ("mount", {"flags": 0x1021}, Effect.CHANGE),
        ("open_tree", {"flags": 0x80001}, Effect.PREPARE),
        ("open_tree", {"flags": 0x80000}, None),
        ("unshare", {"unshare_flags": 0x10000000}, None),
        ("pivot_root", {}, Effect.ATTACH),
    ],
)
def test_effects_follow_from_flags(name: str, arguments: dict[str, int], effect: Effect | None) -> None:
    assert effect_of(name, arguments) is effect


def run(subject: str, layers: int | None, operations: int, **facts: object) -> TraceRun:
    calls = (CallCount("mount", Effect.ATTACH, operations, 0, 1.0, 1.0),)
    values: dict[str, object] = {
        "subject": subject,
        "layers": layers,
        "command": ("x",),
        "exit_code": 0,
        "seconds": 0.1,
        "processes": (ProcessCalls(1, "x", calls),),
        "copies": 1,
        "table_lengths": (30,),
        "attached": 3,
        "detached": 2,
        "events_reason": None,
        "lost": 0,
        "missing": (),
    }
    return TraceRun(**(values | facts))  # type: ignore[arg-type]


def test_constant_and_growing_engines_are_told_apart_in_words() -> None:
    runs = [run("a", layers, 73 + 4 * layers) for layers in (5, 50, 120)]
    runs += [run("b", layers, 57) for layers in (5, 50, 120)]
    growing, constant = fits(runs)
    assert growing.grows and growing.straight
    assert (round(growing.base), round(growing.per_layer, 2)) == (73, 4.0)
    assert growing.sentence() == "a grows with layers: 73 mount operations for a container and 4.00 more for each layer"
    assert constant.sentence() == "b is constant: 57 mount operations for a container, whatever its layers"


def test_a_bend_and_failed_runs_are_not_hidden() -> None:
    (bent,) = fits([run("a", 5, 10), run("a", 50, 10), run("a", 120, 1000), run("a", 60, 5000, exit_code=1)])
    assert bent.grows and not bent.straight and "not on a line" in bent.sentence()
    assert fits([run("a", 5, 10), run("a", 5, 11)]) == ()


def test_reports_come_back_from_json_and_say_what_is_missing() -> None:
    runs = (run("command", None, 2), run("a", 5, 10, lost=7, missing=("enter_open_tree_attr",)))
    report = TraceReport("2026-01-31T12:00:00Z", HOST, runs, (Absent("podman", "not installed"),))
    assert TraceReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    text = render_trace(report)
    assert "a at 5 layers: 7 events were lost" in text
    assert "podman: not traced: not installed" in text
    assert "enter_open_tree_attr" in text
    assert "saw 3 attached and 2 detached" in text
    with pytest.raises(UsageError, match="not the results of a trace"):
        TraceReport.from_json({"schema": "flatmount.storm/1"})


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_tiny_program_is_one_loadable_elf_segment(machine: str) -> None:
    program = exiting_program(machine)
    assert program[:5] == b"\x7fELF\x02"
    assert len(program) < 200
