"""`flatmount storm --profile`: a burst of each strategy with an incident recording of it, and what it waited for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace

from flatmount.observe.profile import Recorder
from flatmount.observe.profile_results import LockTotal, Profile, lock_totals, work_shares
from flatmount.observe.symbols import MOUNT_LOCKS, Lock, Work
from flatmount.plan.facts import HostFacts
from flatmount.store import Store, StoredImage
from flatmount.storm.engine import run_storm
from flatmount.storm.results import StormReport, StrategyLocks


def with_locks(
    report: StormReport,
    store: Store,
    image: StoredImage,
    *,
    facts: HostFacts,
    run: str,
    uppers: str | None,
    progress: Callable[[str], None],
) -> StormReport:
    """The report, with what each strategy waited for in one more burst that is recorded and not timed.

    As `run_storm`: the calling thread moves into a private copy of its mount namespace unless the storm is on the
    host's table. A recording makes bursts slower, so none of its figures are rates. Raises: as `run_storm`.
    """
    found: list[StrategyLocks] = []
    not_undone = list(report.not_undone)
    for name in report.settings.strategies:
        settings = replace(report.settings, strategies=(name,), repeats=1, watchers=0)
        progress(f"{name}: who waits for what")
        with Recorder(sys.argv) as recorder:
            recorder.start()
            recorder.watch_table_of(os.getpid())
            burst = run_storm(
                store, image, settings, facts=facts, run=run, uppers=uppers, progress=lambda text: None, account=False
            )
            profile = recorder.stop(root_process=os.getpid(), same_program=True)
        started = sum(len(result.latencies_ms) for result in burst.results)
        found.append(locks_of(name, started, profile))
        not_undone += burst.not_undone
    return replace(report, locks=tuple(found), not_undone=tuple(not_undone))


def locks_of(strategy: str, containers: int, profile: Profile) -> StrategyLocks:
    """What a profile says of the processes that it calls the command's."""
    totals = lock_totals(profile.waits, command_only=True)
    shares = work_shares(profile.cpu, command_only=True)
    locks = [one for one in totals if one.lock is not Lock.GRACE_PERIOD]
    return StrategyLocks(
        strategy=strategy,
        containers=containers,
        namespace_sem_ms=_ms(totals, Lock.NAMESPACE_SEM),
        mount_lock_ms=_ms(totals, Lock.MOUNT_LOCK),
        other_locks_ms=round(sum(one.total_ms for one in locks if one.lock not in (*MOUNT_LOCKS, Lock.UNKNOWN)), 3),
        unclassified_ms=_ms(totals, Lock.UNKNOWN),
        grace_period_ms=_ms(totals, Lock.GRACE_PERIOD),
        grace_periods=sum(one.waits for one in totals if one.lock is Lock.GRACE_PERIOD),
        waits=sum(one.waits for one in locks if one.lock in MOUNT_LOCKS),
        samples=sum(one.samples for one in profile.cpu if one.of_command),
        cpu_spinning=round(shares.get(Work.SPINNING, 0.0), 5),
        cpu_under_lock=round(shares.get(Work.UNDER_LOCK, 0.0), 5),
        cpu_grace_period=round(shares.get(Work.GRACE_PERIOD, 0.0), 5),
        lost=profile.lost,
        missing=profile.missing,
    )


def _ms(totals: tuple[LockTotal, ...], lock: Lock) -> float:
    return round(sum(one.total_ms for one in totals if one.lock is lock), 3)
