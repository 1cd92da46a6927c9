"""A profile for a terminal and as a page that loads nothing; and what differs between two."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape
from typing import Any

from flatmount.observe.profile_results import (
    LockTotal,
    Profile,
    lock_totals,
    mount_lock_ms,
    unclassified_share,
    work_shares,
)
from flatmount.observe.symbols import MOUNT_LOCKS, Lock, Work
from flatmount.report.flame import Weighted, flame_graph, weights
from flatmount.report.page import Row, document, facts, header, legend, plain_table, scroll, section, tiles
from flatmount.report.style import style_of
from flatmount.report.svg import Axis, Point, Series, line_chart, thinned
from flatmount.storm.summary import figure

_MOST_ROWS, _MOST_STACKS = 15, 10
_MOST_POINTS = 600
_SERIES = ("namespace_sem", "mount_lock", "grace periods")


def sentence(profile: Profile) -> str:
    """What the recording says, in one sentence."""
    totals = _totals(profile)
    mount, grace = mount_lock_ms(totals), _of(totals, Lock.GRACE_PERIOD)
    if not totals:
        return "No wait for a lock was recorded."
    locks = sum(one.total_ms for one in totals if one.lock is not Lock.GRACE_PERIOD)
    share = mount / locks if locks else 0.0
    unknown = unclassified_share(totals)
    who = "the command" if profile.command else "all tasks together"
    return (
        f"In {profile.seconds:.1f} s {who} waited {figure(locks)} ms for locks, {share:.0%} of it for the mount locks "
        f"(namespace_sem {figure(_of(totals, Lock.NAMESPACE_SEM))} ms, mount_lock "
        f"{figure(_of(totals, Lock.MOUNT_LOCK))} ms), and beside that {figure(grace)} ms for grace periods; "
        f"{unknown:.1%} of the lock waiting is unclassified."
    )


def render_profile(profile: Profile) -> str:
    """The profile as text, ending with a newline."""
    lines = [sentence(profile), ""]
    rows = [[str(one.lock), f"{one.waits:,}", figure(one.total_ms), figure(one.longest_ms)] for one in _totals(profile)]
    if profile.command:
        machine = {one.lock: one for one in lock_totals(profile.waits)}
        rows = [[*row, figure(machine[Lock(row[0])].total_ms)] for row in rows]
    heads = ["waited for", "waits", "total ms", "longest ms", "whole machine ms"]
    lines += _columns(heads if profile.command else heads[:-1], rows)
    shares = work_shares(profile.cpu)
    if shares:
        lines += ["", "on processors: " + ", ".join(f"{work} {share:.1%}" for work, share in shares.items())]
    operations = _operation_rows(profile)[:_MOST_ROWS]
    if operations:
        lines += ["", *_columns(["process", "where", "call", "times", "failed", "mean us", "longest us"], operations)]
    lines.append("")
    lines += [f"left out: {what}" for what in profile.missing]
    if profile.lost:
        lines.append(f"{profile.lost:,} mount call events were lost: their counts are too low")
    lines.append(f"looking cost {profile.cost_cpu_s:.2f} s of processor time in {profile.seconds:.1f} s")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def page(profile: Profile) -> str:
    """The whole HTML document. Works without a network, in light and dark, and on paper."""
    title = f"Profile: {' '.join(profile.command)}" if profile.command else f"Profile of {profile.seconds:.0f} seconds"
    cpu, waits = weights(profile)
    where = f"Linux {profile.host.kernel} · {profile.host.cpus} CPUs · {profile.seconds:.1f} s"
    head = header(f"{profile.taken_at} · {where}", title, sentence(profile))
    return document(
        title,
        _SERIES,
        [
            head,
            _tiles(profile),
            _flame(
                "Waiting for locks",
                "Milliseconds that tasks waited, by the stack that waited. Red: mount locks; grey: grace periods, "
                "which are no lock. A pointer over a frame shows its time.",
                flame_graph("Waits by stack", waits, "ms"),
                waits,
            ),
            _lock_section(profile),
            _flame(
                "On the processors",
                f"Kernel stacks, sampled {profile.sample_hz} times a second on every busy processor. Red: spinning on "
                "a mount lock, or working under one.",
                flame_graph("Samples by stack", cpu, "ms"),
                cpu,
            ),
            _work_section(profile),
            _over_time(profile),
            _operations(profile),
            _facts(profile),
        ],
    )


def compare(before: Profile, after: Profile) -> dict[str, Any]:
    """Two profiles side by side, as plain data: waits by lock, and shares of the processors' time.

    Waits are those of the commands where commands were profiled, else of the whole machine.
    """
    totals = [{one.lock: one for one in _totals(profile)} for profile in (before, after)]
    shares = [work_shares(profile.cpu) for profile in (before, after)]
    locks = [lock for lock in Lock if any(lock in one for one in totals)]
    return {
        "before": {"command": list(before.command), "seconds": before.seconds},
        "after": {"command": list(after.command), "seconds": after.seconds},
        "waits": [
            {
                "lock": str(lock),
                "before": dataclasses.asdict(totals[0][lock]) if lock in totals[0] else None,
                "after": dataclasses.asdict(totals[1][lock]) if lock in totals[1] else None,
            }
            for lock in locks
        ],
        "processors": {
            str(work): {"before": shares[0].get(work, 0.0), "after": shares[1].get(work, 0.0)} for work in Work
        },
    }


def render_comparison(before: Profile, after: Profile) -> str:
    """Two profiles side by side as text, ending with a newline."""
    data = compare(before, after)
    rows = []
    for one in data["waits"]:
        old = one["before"]["total_ms"] if one["before"] else 0.0
        new = one["after"]["total_ms"] if one["after"] else 0.0
        rows.append([one["lock"], figure(old), figure(new), f"{new - old:+,.1f}", f"{new / old:.3f}" if old else "–"])
    lines = _columns(["waited for", "before ms", "after ms", "difference", "ratio"], rows)
    old_ms, new_ms = (mount_lock_ms(_totals(profile)) for profile in (before, after))
    ratio = f", {new_ms / old_ms:.1%} of before" if old_ms else ""
    lines += ["", f"The mount locks: {figure(old_ms)} ms before, {figure(new_ms)} ms after{ratio}."]
    for work, pair in data["processors"].items():
        lines.append(f"{work}: {pair['before']:.1%} of processor time before, {pair['after']:.1%} after")
    return "\n".join(lines) + "\n"


def _totals(profile: Profile) -> tuple[LockTotal, ...]:
    """By lock: of the command where there is one, else of the whole machine."""
    return lock_totals(profile.waits, command_only=bool(profile.command))


def _of(totals: Sequence[LockTotal], lock: Lock) -> float:
    return sum(one.total_ms for one in totals if one.lock is lock)


def _tiles(profile: Profile) -> str:
    totals = _totals(profile)
    who = "by the command" if profile.command else "all tasks together"
    shares = work_shares(profile.cpu)
    calls = sum(call.done for one in profile.operations for call in one.calls)
    shown = [
        (f"{figure(mount_lock_ms(totals))} ms", f"waited for mount locks, {who}"),
        (f"{figure(_of(totals, Lock.GRACE_PERIOD))} ms", f"waited for grace periods, which are no lock, {who}"),
        (
            f"{shares.get(Work.SPINNING, 0.0) + shares.get(Work.UNDER_LOCK, 0.0):.1%}",
            "of busy processor time on mount locks: spinning, or working under one",
        ),
        (f"{calls:,}", "mount calls, detached ones included"),
    ]
    return tiles(shown)


def _flame(head: str, text: str, graph: str, stacks: Sequence[Weighted]) -> str:
    if not graph:
        return section(head, text, "<p>Nothing was recorded.</p>")
    whole = sum(weight for _, weight, _ in stacks)
    rows: list[Row] = [
        [f"<code>{escape(_leaves(folded))}</code>", escape(str(what)), figure(weight), f"{weight / whole:.1%}"]
        for folded, weight, what in stacks[:_MOST_STACKS]
    ]
    table = plain_table(["the stack's end, deepest first", "what|", "ms|", "share|"], rows)
    return section(head, text, scroll(graph) + table)


def _leaves(folded: str) -> str:
    return " ‹ ".join(folded.split(";")[:-5:-1])


def _lock_section(profile: Profile) -> str:
    rows: list[Row] = [
        [escape(str(one.lock)), f"{one.waits:,}", figure(one.total_ms), figure(one.longest_ms)]
        for one in _totals(profile)
    ]
    foremost = [one for one in profile.waits if one.lock in (*MOUNT_LOCKS, Lock.GRACE_PERIOD)][:_MOST_ROWS]
    by_process: list[Row] = [
        [f"{escape(one.name)} [{one.process}]", escape(str(one.lock)), f"{one.waits:,}", figure(one.total_us / 1e3)]
        for one in foremost
    ]
    return section(
        "By lock, and by process",
        "The kernel's contention events from their beginning to their end, told apart by the functions of the stack. "
        + ("The first table is the command's, the second the whole machine's." if profile.command else ""),
        plain_table(["waited for", "waits|", "total|ms", "longest|ms"], rows)
        + plain_table(["process", "waited for", "waits|", "total|ms"], by_process),
    )


def _work_section(profile: Profile) -> str:
    rows = [[escape(str(work)), f"{share:.1%}"] for work, share in work_shares(profile.cpu).items()]
    return section("Share of processor time", "", plain_table(["doing", "share|"], rows))


def _over_time(profile: Profile) -> str:
    columns = ("namespace_sem_ms", "mount_lock_ms", "grace_period_ms")
    points: list[tuple[Point, ...]] = [
        thinned([(one.at_s, float(getattr(one, name))) for one in profile.moments], _MOST_POINTS) for name in columns
    ]
    series = [
        Series(style_of(index), name, line) for index, (name, line) in enumerate(zip(_SERIES, points, strict=True))
    ]
    x = Axis.linear("seconds", [one.at_s for one in profile.moments])
    y = Axis.linear("ms waited in a tenth of a second", [value for line in points for _, value in line])
    mounts = [(one.at_s, float(one.mounts)) for one in profile.moments if one.mounts is not None]
    table = ""
    if mounts:
        table = scroll(
            line_chart(
                "Mounts over time",
                [Series(style_of(0), "mounts", thinned(mounts, _MOST_POINTS))],
                x,
                Axis.linear("mounts in the table", [value for _, value in mounts]),
                stepped=True,
                height=200,
            )
        )
    step = max(1, len(profile.moments) // _MOST_ROWS)
    rows: list[Row] = [
        [
            f"{one.at_s:.1f}",
            "–" if one.mounts is None else f"{one.mounts:,}",
            figure(one.namespace_sem_ms),
            figure(one.mount_lock_ms),
            figure(one.grace_period_ms),
            *("–" if value is None else f"{value:.0f}" for value in (one.cpu_pressure, one.memory_pressure)),
        ]
        for one in profile.moments[::step]
    ]
    heads = ["at|s", "mounts|", *(f"{name}|ms" for name in _SERIES), "CPU pressure|%", "memory pressure|%"]
    return section(
        "Over time",
        "Waiting in each tenth of a second, of all tasks together, and the length of the mount table.",
        legend((style_of(index), name) for index, name in enumerate(_SERIES))
        + scroll(line_chart("Waits over time", series, x, y))
        + table
        + plain_table(heads, rows),
    )


def _operations(profile: Profile) -> str:
    rows: Sequence[Row] = [[escape(cell) for cell in row] for row in _operation_rows(profile)[: 2 * _MOST_ROWS]]
    if not rows:
        return ""
    heads = ["process", "where", "call", "times|", "failed|", "mean|us", "longest|us"]
    return section(
        "Mount calls", "By process and call, the most time first; grace periods included.", plain_table(heads, rows)
    )


def _operation_rows(profile: Profile) -> list[list[str]]:
    flat = [(call.total_us, one, call) for one in profile.operations for call in one.calls]
    flat.sort(key=lambda item: -item[0])
    return [
        [
            f"{one.name} [{one.process}]",
            one.place or "ended",
            f"{call.call} ({call.effect})",
            f"{call.done:,}",
            f"{call.failed:,}",
            figure(total / max(call.done + call.failed, 1)),
            figure(call.longest_us),
        ]
        for total, one, call in flat
    ]


def _facts(profile: Profile) -> str:
    known = [
        ("processor", profile.host.cpu_model),
        ("looking cost", f"{profile.cost_cpu_s:.2f} s of processor time"),
        ("unclassified lock waiting", f"{unclassified_share(_totals(profile)):.2%}"),
        ("events lost", f"{profile.lost:,}"),
        *(("left out", what) for what in profile.missing),
    ]
    return facts({"How it was taken": known})


def _columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (heads, *rows)
    ]
