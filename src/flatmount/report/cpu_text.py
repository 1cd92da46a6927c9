"""Processors, locks, bursts, the model and its advice for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from flatmount.cpu.advise import Advice
from flatmount.cpu.model import Model, Parameter, Prediction, Source
from flatmount.cpu.noise import Disturbance
from flatmount.cpu.published import Fact
from flatmount.cpu.results import DISTURBED, TOO_FEW, BenchResult, BurstFigure, Comparison, Spread
from flatmount.cpu.topology import Topology, format_list
from flatmount.cpu.validation import Point, Validation

_WIDTH = 100


def figure(value: float) -> str:
    """Three digits that count, without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - len(str(int(abs(value)))) + 1) if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def spread(value: Spread, factor: float = 1.0) -> str:
    """Median and range, and the modes where there is more than one."""
    text = f"{figure(value.median * factor)} ({figure(value.low * factor)}-{figure(value.high * factor)})"
    if len(value.modes) > 1:
        text += " modes " + ", ".join(f"{figure(m.value * factor)} {m.share:.0%}" for m in value.modes)
    return text


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, words: bool = False) -> str:
    """Columns under their heads; the first is flush left, the others flush right unless they are `words`."""
    lines = [list(heads), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    place = str.ljust if words else str.rjust

    def drawn(line: Sequence[str]) -> str:
        others = (place(cell, width) for cell, width in zip(line[1:], widths[1:], strict=True))
        return "  ".join([line[0].ljust(widths[0]), *others]).rstrip()

    return "\n".join(map(drawn, lines))


def topology_text(topology: Topology) -> str:
    """The machine as a picture: sockets, nodes, caches, cores with their siblings, and what is limited or hidden."""
    lines = textwrap.wrap(topology.summary(), _WIDTH, subsequent_indent="  ")
    for number, package in enumerate(topology.packages):
        lines.append(f"socket {topology.cpu(package[0]).package if package else number}")
        for node in topology.nodes:
            inside = [cpu for cpu in node.cpus if cpu in package]
            if inside:
                lines.append(f"  node {node.number}{_distances(node.number, topology)}")
                lines.extend(_caches(topology, inside))
    if topology.offline:
        lines.append(f"offline: {format_list(topology.offline)}")
    allowed = set(topology.allowed)
    if len(allowed) < len(topology.cpus):
        lines.append(f"this process may use {format_list(allowed)} only (affinity or control group)")
    if topology.quota_cpus is not None:
        lines.append(f"its control group's quota is {figure(topology.quota_cpus)} processors")
    if topology.smt_control:
        state = {True: "on", False: "off", None: "not said"}[topology.smt]
        lines.append(f"SMT: {state} ({topology.smt_control})")
    if topology.governor:
        lines.append(f"frequency governor: {topology.governor}")
    if topology.hypervisor:
        lines.append(f"virtual: {topology.hypervisor}")
    for hidden in topology.hidden:
        lines.extend(textwrap.wrap(f"hidden: {hidden}", _WIDTH, subsequent_indent="  "))
    return "\n".join(lines)


def _distances(number: int, topology: Topology) -> str:
    node = next(node for node in topology.nodes if node.number == number)
    others = [
        f"{distance} to node {other.number}"
        for other, distance in zip(topology.nodes, node.distances, strict=False)
        if other.number != number
    ]
    return f" (distance {', '.join(others)})" if others else ""


def _caches(topology: Topology, inside: Sequence[int]) -> Iterable[str]:
    size = f" {topology.l3_bytes >> 20} MiB" if topology.l3_bytes else ""
    for number, domain in enumerate(topology.l3_domains):
        cores = [core for core in topology.cores if core[0] in domain and core[0] in inside]
        if cores:
            drawn = " ".join(f"[{'|'.join(map(str, core))}]" for core in cores)
            head = f"    L3 {number}{size}  "
            yield from textwrap.wrap(head + drawn, _WIDTH, subsequent_indent=" " * len(head))


def bench_text(bench: BenchResult) -> str:
    """All figures of a bench, with ranges and what was left out."""
    parts = [
        f"{bench.topology.summary()}, Linux {bench.topology.kernel}, a pause takes {figure(bench.pause_ns)} ns",
        f"took {figure(bench.took_s)} s of {bench.budget_s:g} s, {bench.repeats} interleaved repeats",
    ]
    if bench.locks:
        heads = ["lock", "placement", "threads", "ns a section", "hand-offs", "fairness", "p50 ns", "p99 ns", "max us"]
        parts.append(table(heads, (_lock_row(bench, i) for i in range(len(bench.locks)))))
        hiding = {f.kind.value for f in bench.locks if f.threads > 1 and f.hand_off is not None and f.hand_off < 0.5}
        if hiding:
            parts.append(
                _wrapped(
                    f"{', '.join(sorted(hiding))}: mostly kept by the processor that had the lock, so that these "
                    "figures hide what a hand-off costs and have no rank beside fair locks"
                )
            )
    if bench.matrix:
        rows = ([f"{c.a} - {c.b}", spread(c.ns), f"{c.home}", f"{c.node}"] for c in bench.matrix)
        parts.append(table(["core to core", "ns one way", "home", "node"], rows))
    if bench.bursts:
        parts.append(table(["burst", "ms", "operations/s", "median container"], map(burst_row, bench.bursts)))
    parts += [_wrapped(f"hidden: {line}") for line in bench.topology.hidden]
    parts += [_wrapped(f"left out: {line}") for line in bench.left_out]
    parts += _disturbed(bench.disturbance)
    return "\n\n".join(parts)


def _lock_row(bench: BenchResult, index: int) -> Sequence[str]:
    f = bench.locks[index]
    retries = f" {f.retries:.1%} retried" if f.retries is not None else ""
    return [
        f.kind.value,
        f.placement,
        f"{f.threads}",
        spread(f.ns),
        f"{f.hand_off:.1%}" if f.hand_off is not None else f"-{retries}",
        f"{f.fairness:.2f}",
        figure(f.p50_ns) if f.p50_ns is not None else "",
        figure(f.p99_ns) if f.p99_ns is not None else "",
        figure(f.max_ns / 1e3) if f.max_ns is not None else "",
    ]


def burst_row(f: BurstFigure) -> Sequence[str]:
    """One burst as cells: what, milliseconds, mount operations a second, when the median container was done."""
    where = f" at {f.placement}" if f.placement else ""
    rate = f"{f.operations_per_s:,.0f}"
    return [f"{f.burst}{where}", spread(f.wall_s, 1e3), rate, f"{min(1.0, f.half_s / f.wall_s.median):.0%}"]


def _disturbed(disturbance: Disturbance) -> list[str]:
    return [_wrapped(line)] if (line := disturbance.line()) else []


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, _WIDTH, subsequent_indent="  "))


def model_text(model: Model, predictions: Sequence[Prediction], limit_s: float, cliffs: dict[str, str]) -> str:
    """Parameters with their source, predictions with their range, and where the cliff is."""
    parts = [
        table(["", "parameter", "value", "range", "unit", "source"], map(_parameter_row, model.parameters)),
        table(["burst", "s", "range", f"later than {limit_s:g} s"], map(_prediction_row, predictions)),
        "\n".join(f"cliff, {name}: {said}" for name, said in cliffs.items()),
    ]
    notes = sorted({p.note for p in model.parameters if p.note and p.source is Source.UNKNOWN})
    return "\n\n".join([*parts, *(_wrapped(f"not identified: {note}") for note in notes)])


def _parameter_row(p: Parameter) -> Sequence[str]:
    ranged = f"{figure(p.low)}-{figure(p.high)}" if p.low is not None and p.high is not None else ""
    value = figure(p.value) if p.value is not None else "-" if p.source is Source.UNKNOWN else "counted"
    return [p.name, p.meaning, value, ranged, p.unit, p.source.value]


def _prediction_row(p: Prediction) -> Sequence[str]:
    return [str(p.burst), figure(p.seconds), f"{figure(p.low)}-{figure(p.high)}", f"{p.late:.0%}"]


def validation_text(validation: Validation) -> str:
    """The error over what was held out, by strategy, with the worst point; and the formula against the simulation."""
    worst = validation.worst
    groups = sorted({(p.burst.strategy, p.burst.copies) for p in validation.points})
    rows = [
        [f"{strategy}{f', {copies} copies' if copies else ''}", f"{validation.group(strategy, copies) or 0:.1%}"]
        for strategy, copies in groups
    ]
    simulated = sorted(abs(p.error) for p in validation.simulated)
    floor = validation.repeatability
    parts = [
        f"calibrated on {', '.join(str(f.burst) for f in validation.calibrated)}",
        f"held out: {len(validation.points)} bursts in {validation.took_s:g} s; median error "
        f"{validation.median_error:.1%}, interpolation through 24 points {validation.interpolation_error:.1%}"
        + (f"; two halves of the same repeats differ by {floor:.1%}" if floor is not None else ""),
        table(["strategy", "median error"], rows),
        f"worst: {_point_line(worst)}",
    ]
    if simulated:
        most = max(validation.simulated, key=lambda p: abs(p.error))
        parts.append(
            f"formula against simulation: median {simulated[len(simulated) // 2]:.1%}, "
            f"most {most.error:+.1%} ({most.burst})"
        )
    if validation.not_run:
        parts.append(f"no time was left for {', '.join(map(str, validation.not_run))}")
    return "\n\n".join(map(_wrapped_unless_table, [*parts, *_disturbed(validation.disturbance)]))


def _wrapped_unless_table(text: str) -> str:
    return text if "\n" in text else _wrapped(text)


def _point_line(point: Point) -> str:
    measured = spread(point.measured, 1e3)
    return f"{point.burst}: measured {measured} ms, predicted {figure(point.predicted * 1e3)} ms ({point.error:+.0%})"


def published_text(facts: Sequence[Fact]) -> str:
    """Every published fact with what the model says."""
    rows = ([f.subject, f.statement, f.said, f.verdict.value] for f in facts)
    return table(["", "published", "model", "verdict"], rows, words=True)


def advice_text(advice: Sequence[Advice]) -> str:
    """Numbered advice: what, what it is worth, how that is known, and how to do it."""
    parts = []
    for number, one in enumerate(advice, 1):
        lines = [f"{number}. {one.title}" + ("" if one.worth_it else " - not here")]
        gain = f"{one.gain}, " if one.gain is not None else ""
        lines.append(f"   {gain}{one.evidence.value}: {one.why}")
        lines += [f"   > {line}" for line in one.how if one.worth_it]
        parts.append("\n".join(textwrap.fill(line, _WIDTH, subsequent_indent="     ") for line in lines))
    return "\n".join(parts)


def comparison_text(found: Sequence[Comparison]) -> str:
    """Two benches figure by figure."""
    rows = [[c.figure, c.unit, spread(c.first), spread(c.second), c.verdict] for c in found]
    told = [c for c in found if c.verdict != TOO_FEW]
    disturbed = sum(c.verdict == DISTURBED for c in told)
    but = f"; {disturbed} of the others were disturbed" if disturbed else ""
    same = sum(c.verdict in ("same", "indistinguishable") for c in told)
    heads = ["figure", "unit", "first", "second", "verdict"]
    return f"{table(heads, rows)}\n\n{same} of {len(told)} figures have ranges that overlap{but}"
