"""From perf's text to a profile, and from a profile to what people and other tools read."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from flatmount.cli.main import main
from flatmount.errors import EXIT_USAGE, UsageError
from flatmount.observe.mount_calls import Effect
from flatmount.observe.perf import CpuSample, Samples, Wait
from flatmount.observe.profile import cpu_stacks, folded, lock_waits, moments, wait_stacks
from flatmount.observe.profile_results import (
    ProcessOperations,
    Profile,
    lock_totals,
    mount_lock_ms,
    unclassified_share,
    work_shares,
)
from flatmount.observe.symbols import Lock, Work
from flatmount.observe.trace_results import CallCount
from flatmount.report.flame import flame_graph, folded_text, speedscope, weights
from flatmount.report.profile import compare, page, render_comparison, render_profile, sentence
from flatmount.storm.results import HostFacts

# As perf 6.1 prints it on 6.18; a semaphore, within it the scheduler's lock, a mutex that spins first, a grace period.
SCRIPT = """\
storm-1   10/11   100.000000000: lock:contention_begin: 0xffff01 (flags=WRITE)
\tffffffff82203efe rwsem_down_write_slowpath
\tffffffff8220389b down_write
\tffffffff821fa76d vfs_open_tree
\tffffffff81000130 entry_SYSCALL_64_after_hwframe

storm-1   10/11   100.000010000: lock:contention_begin: 0xffff02 (flags=SPIN)
\tffffffff82203efe __pv_queued_spin_lock_slowpath
\tffffffff8220389b _raw_spin_lock
\tffffffff821fa76d __schedule
\tffffffff821fa76d rwsem_down_write_slowpath

storm-1   10/11   100.000012000:   lock:contention_end: 0xffff02 (ret=0) ffffffff82203f4b __pv_queued_spin_lock_slowpath
storm-1   10/11   100.000500000:   lock:contention_end: 0xffff01 (ret=0) ffffffff82203f4b rwsem_down_write_slowpath
storm-1   10/11   100.001000000: lock:contention_begin: 0xffff03 (flags=SPIN|MUTEX)
\tffffffff82203efe __mutex_lock.constprop.0
\tffffffff8220389b exp_funnel_lock
\tffffffff821fa76d synchronize_rcu_expedited

storm-1   10/11   100.001100000: lock:contention_begin: 0xffff03 (flags=MUTEX)
\tffffffff82203efe __mutex_lock.constprop.0
\tffffffff8220389b exp_funnel_lock
\tffffffff821fa76d synchronize_rcu_expedited

storm-1   10/11   100.001150000:    sched:sched_switch: prev_comm=storm-1 prev_pid=11 prev_prio=120 \
prev_state=D ==> next_comm=a b next_pid=5 next_prio=120
\tffffffff821facd8 __schedule
\tffffffff8220389b exp_funnel_lock
\tffffffff821fa76d synchronize_rcu_expedited

     a b    5/5    100.001200000:    sched:sched_switch: prev_comm=a b prev_pid=5 prev_prio=120 \
prev_state=S ==> next_comm=storm-1 next_pid=11 next_prio=120 ffffffff821facd8 __schedule
storm-1   10/11   100.001300000:   lock:contention_end: 0xffff03 (ret=0) ffffffff82203f4b __mutex_lock.constprop.0
storm-1   10/11   100.002000000:    sched:sched_switch: prev_comm=storm-1 prev_pid=11 prev_prio=120 \
prev_state=D ==> next_comm=swapper/0 next_pid=0 next_prio=120
\tffffffff821facd8 __schedule
\tffffffff821fa76d synchronize_rcu_expedited
\tffffffff821fa76d namespace_unlock

 swapper    0/0    100.002700000:    sched:sched_switch: prev_comm=swapper/0 prev_pid=0 prev_prio=120 \
prev_state=R ==> next_comm=storm-1 next_pid=11 next_prio=120 ffffffff821facd8 __schedule
storm-1   10/11   100.003000000:   cpu-clock/freq=199/:
\tffffffff821ec41e copy_tree
\tffffffff821ec41e copy_mnt_ns

 swapper    0/0    100.003100000:   cpu-clock/freq=199/:
\tffffffff821ec41e pv_native_safe_halt

   user  77/77    100.003200000:   cpu-clock/freq=199/:
"""


@pytest.fixture
def samples() -> Samples:
    taken = Samples()
    taken.take(SCRIPT.splitlines(keepends=True))
    return taken


def test_waits_are_told_apart_and_counted_once(samples: Samples) -> None:
    assert [(wait.lock, wait.took_ns // 1000) for wait in samples.waits] == [
        (Lock.SCHEDULER, 2),
        (Lock.NAMESPACE_SEM, 500),
        (Lock.GRACE_PERIOD, 300),
        (Lock.GRACE_PERIOD, 700),
    ]
    assert {(wait.process, wait.name) for wait in samples.waits} == {(10, "storm-1")}


def test_idle_processors_are_no_sample(samples: Samples) -> None:
    assert samples.cpu == [
        CpuSample(10, "storm-1", 100_003_000_000, ("copy_tree", "copy_mnt_ns")),
        CpuSample(77, "user", 100_003_200_000, ()),
    ]


def test_stacks_are_folded_root_first() -> None:
    assert (
        folded("a;b", ("__traceiter_x", "leaf.isra.0", "caller", "do_syscall_64", "entry_SYSCALL_64_after_hwframe"))
        == "a:b;caller;leaf"
    )
    assert folded("x", ()) == "x;[user]"


def test_the_recording_in_tenths_of_a_second() -> None:
    wait = Wait(1, "x", 150_000_000, 2_000_000, Lock.MOUNT_LOCK, ())
    taken = [(0, 30, 1000, None), (100_000_000, 31, 51_000, None)]
    first, second, *_ = moments(taken, [wait], 0, 0.15)
    assert (first.mounts, first.cpu_pressure, first.mount_lock_ms) == (30, 50.0, 0.0)
    assert (second.mounts, second.cpu_pressure, second.mount_lock_ms) == (31, None, 2.0)


HOST = HostFacts("6.18", "x86_64", "cpu", 2, 1 << 30, "3.11", "0.1")


@pytest.fixture
def profile(samples: Samples) -> Profile:
    calls = (CallCount("umount", Effect.DETACH, 4, 1, 5000.0, 2000.0),)
    return Profile(
        taken_at="2026-01-31T12:00:00Z",
        host=HOST,
        seconds=1.5,
        command=(),
        exit_code=None,
        sample_hz=199,
        waits=lock_waits(samples.waits, frozenset((10,))),
        cpu=cpu_stacks((one.name, one.stack, one.process == 10) for one in samples.cpu),
        wait_stacks=wait_stacks(samples.waits),
        operations=(ProcessOperations(10, "<storm>", "pod x", True, calls),),
        moments=moments([(100_000_000_000, 30, 0, 0)], samples.waits, 100_000_000_000, 1.5),
        missing=("mount calls: no tracefs",),
        lost=3,
        cost_cpu_s=0.25,
    )


def test_sums(profile: Profile) -> None:
    totals = lock_totals(profile.waits)
    assert totals[0] == type(totals[0])(Lock.GRACE_PERIOD, 2, 1.0, 0.7)
    assert mount_lock_ms(totals) == 0.5
    assert unclassified_share(totals) == 0.0
    assert lock_totals(profile.waits, command_only=True) == totals
    other = replace(profile.waits[0], lock=Lock.UNKNOWN, of_command=False, total_us=500.0)
    assert unclassified_share(lock_totals((*profile.waits, other))) == pytest.approx(500 / 1002)
    assert work_shares(profile.cpu) == {Work.UNDER_LOCK: 0.5, Work.ELSE: 0.5}
    assert work_shares(()) == {}


def test_profiles_come_back_from_json(profile: Profile) -> None:
    assert Profile.from_json(json.loads(json.dumps(profile.to_json()))) == profile
    with pytest.raises(UsageError, match="not a profile"):
        Profile.from_json({})


def test_the_text_says_what_matters(profile: Profile) -> None:
    text = render_profile(profile)
    assert "namespace_sem 0.50 ms" in text and "1.00 ms for grace periods" in text
    assert "left out: mount calls: no tracefs" in text
    assert "3 mount call events were lost" in text
    assert sentence(replace(profile, waits=())) == "No wait for a lock was recorded."


def test_the_page_loads_nothing_and_escapes(profile: Profile) -> None:
    html = page(profile)
    assert "<script" not in html and "src=" not in html and "url(" not in html
    assert "&lt;storm&gt;" in html and "<storm>" not in html
    assert html.count("<svg") >= 4
    assert 'class="hot"' in html and 'class="grace"' in html
    assert page(replace(profile, cpu=(), wait_stacks=(), waits=(), operations=(), moments=profile.moments[:1]))


def test_other_tools_get_their_formats(profile: Profile) -> None:
    cpu, waits = weights(profile)
    assert "storm-1;synchronize_rcu_expedited;exp_funnel_lock;__mutex_lock 300\n" in folded_text(waits)
    assert re.fullmatch(r"(\S.* \d+\n)+", folded_text(cpu))
    scope = speedscope(profile, "x")
    names = [frame["name"] for frame in scope["shared"]["frames"]]
    for part in scope["profiles"]:
        assert len(part["samples"]) == len(part["weights"])
        assert all(0 <= frame < len(names) for sample in part["samples"] for frame in sample)
        assert part["endValue"] == pytest.approx(sum(part["weights"]))


def test_a_flame_graph_of_nothing_is_nothing() -> None:
    assert flame_graph("x", (), "ms") == ""


def test_two_profiles_side_by_side(profile: Profile, tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    after = replace(profile, waits=tuple(replace(one, total_us=one.total_us / 50) for one in profile.waits))
    assert "0.50 ms before, 0.010 ms after, 2.0% of before" in render_comparison(profile, after)
    waits = {one["lock"]: one for one in compare(profile, after)["waits"]}
    assert waits["namespace_sem"]["before"]["total_ms"] == 0.5
    for name, one in (("a", profile), ("b", after)):
        with open(f"{tmp_path}/{name}.json", "w", encoding="utf-8") as file:
            json.dump(one.to_json(), file)
    assert main(["profile", "diff", f"{tmp_path}/a.json", f"{tmp_path}/b.json"]) == 0
    assert "The mount locks" in capsys.readouterr().out
    assert main(["profile", "diff", f"{tmp_path}/a.json"]) == EXIT_USAGE
    assert main(["profile", "diff", f"{tmp_path}/a.json", f"{tmp_path}/none.json"]) == EXIT_USAGE


@pytest.mark.parametrize("words", [["--for", "soon"], ["--for", "0s"], ["nonsense"], ["--html", "/none/x.html"]])
def test_bad_calls(words: list[str]) -> None:
    assert main(["profile", *words]) == EXIT_USAGE
