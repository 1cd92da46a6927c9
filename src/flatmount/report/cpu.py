"""Processors, locks, bursts and the model as one page that loads nothing, with a table for every picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from flatmount.cpu.noise import Disturbance
from flatmount.cpu.results import BenchResult, Burst, BurstFigure, Kind, LockFigure
from flatmount.cpu.topology import Topology, format_list
from flatmount.cpu.validation import Validation
from flatmount.report.cpu_svg import heat_map, topology_picture
from flatmount.report.cpu_text import figure, spread
from flatmount.report.style import style_of, style_sheet
from flatmount.report.svg import Axis, Bar, Series, bar_chart, line_chart

LIMIT_S = 30.0
_MOST_ROWS = 16  # longer tables are folded
_STRATEGIES = ("per-layer", "common-parent", "flat")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
# Colour on white, colour on black and dash for locks and placements; the same palette as the strategies', and more.
_LOOKS = (
    ("#c2410c", "#fb8a57", "none"),
    ("#7c3aed", "#b69cf7", "7 4"),
    ("#1d6fd1", "#66b2ff", "2 3.5"),
    ("#0b7f6b", "#3fd0b0", "none"),
    ("#64748b", "#a3b1c6", "9 3 2 3"),
    ("#a16207", "#e5b84b", "5 2"),
    ("#be185d", "#f48fb9", "1 3"),
)
_MEASURED, _PREDICTED, _CALIBRATED, _LIMIT = "measured", "predicted", "calibrated", "limit"
_SHEET = """
.heat { fill: var(--c); }
.box { fill: none; stroke: var(--rule); stroke-width: 1.2; }
.cpu { fill: var(--panel); stroke: var(--soft); stroke-width: 1; }
.cpu.off { fill: none; stroke-dasharray: 2 2; }
svg text.small { font-size: 10.5px; }
.limit { --c: #b42318; --dash: 4 4; }
.measured { --c: #1d6fd1; --dash: none; }
.predicted { --c: #64748b; --dash: 6 3; }
.calibrated { --c: #c2410c; --dash: none; }
.calibrated .dot { r: 5px; stroke: var(--ink); stroke-width: 1.4; }
p.warning { color: #b42318; }
summary { color: var(--soft); font-size: .9rem; cursor: pointer; margin-top: .6rem; }
"""

Row = Sequence[str]


def topology_page(topology: Topology) -> str:
    """The picture of a machine as a whole HTML document."""
    return _document(topology.summary(), [_header(topology, "What this machine is made of"), _topology(topology)])


def page(bench: BenchResult, validation: Validation | None = None) -> str:
    """The whole HTML document of a bench, and of a validation of the model where there is one. Works without a network,
    in light and dark, and on paper."""
    sections = [
        _header(bench.topology, "Processors and mount locks", bench.disturbance),
        _topology(bench.topology),
        _bursts(bench),
        _table_growth(bench),
        _model(validation),
        _lock_latency(bench),
        _throughput(bench),
        _hand_off(bench),
        _matrix(bench),
        _left_out(bench),
    ]
    return _document(f"Processors: {bench.topology.summary()}", sections)


def _document(title: str, sections: Iterable[str]) -> str:
    looks = [f".k{i} {{ --c: {light}; --dash: {dash}; }}" for i, (light, _, dash) in enumerate(_LOOKS)]
    dark = [f".k{i} {{ --c: {colour}; }}" for i, (_, colour, _) in enumerate(_LOOKS)]
    dark += [".limit, p.warning { --c: #ff8a7a; color: #ff8a7a; }", ".measured { --c: #66b2ff; }"]
    dark += [".predicted { --c: #a3b1c6; }", ".calibrated { --c: #fb8a57; }"]
    sheet = (
        f"{style_sheet(_STRATEGIES)}{_SHEET}{''.join(looks)}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ {''.join(dark)} }}"
    )
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{sheet}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _header(topology: Topology, title: str, disturbance: Disturbance | None = None) -> str:
    warning = disturbance.line() if disturbance else ""
    warned = f'<p class="warning">{escape(warning)}</p>' if warning else ""
    return (
        f'<header><p class="kicker">Linux {escape(topology.kernel)}, {escape(topology.architecture)}</p>'
        f'<h1>{escape(title)}</h1><p class="outcome">{escape(topology.summary())}.</p>{warned}</header>'
    )


def _section(title: str, text: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{''.join(parts)}</section>"


def _chart(drawing: str) -> str:
    return f'<figure class="scroll">{drawing}</figure>'


def _table(heads: Row, rows: Iterable[Row]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    whole = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    if len(lines) <= _MOST_ROWS:
        return whole
    return f"<details><summary>table of {len(lines)} rows</summary>{whole}</details>"


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    drawn = (
        f'<li class="{style}"><svg viewBox="0 0 30 10"><path class="line" d="M0 5H30"/></svg>{escape(name)}</li>'
        for style, name in entries
    )
    return f'<ul class="legend">{"".join(drawn)}</ul>'


def _topology(topology: Topology) -> str:
    facts = [f"This process may use {format_list(topology.allowed)}."]
    if topology.offline:
        facts.append(f"Offline: {format_list(topology.offline)}.")
    if topology.quota_cpus is not None:
        facts.append(f"Its control group's quota is {figure(topology.quota_cpus)} processors.")
    facts += [f"Hidden: {line}." for line in topology.hidden]
    rows = [
        [f"{cpu.number}", f"{cpu.package}", f"{cpu.node}", f"{cpu.l3}", f"{cpu.core}", f"{cpu.core_id}"]
        for cpu in topology.cpus
    ]
    heads = ["processor", "socket", "NUMA node", "L3", "core", "core_id"]
    return _section(
        "Topology",
        " ".join(facts),
        _chart(topology_picture(topology)),
        _table(heads, rows),
    )


def _bursts(bench: BenchResult) -> str:
    parts = []
    for copies in (0, 2):
        chosen = {strategy: _sweep(bench.bursts, strategy, copies) for strategy in _STRATEGIES}
        if any(len(found) > 1 for found in chosen.values()):
            parts.append(_burst_chart(chosen, copies))
    if not parts:
        return ""
    return _section(
        "A burst of containers",
        "Seconds until the last of C containers is up, all started together. Layer by layer the cost grows with the "
        "square of C: each clone of a layer looks at every mount beside it, and they get more. Merged, nothing "
        "is cloned, and the cost grows with C alone.",
        *parts,
        _table(["burst", "ms", "range", "repeats"], (_burst_row(f) for f in bench.bursts)),
    )


def _sweep(bursts: Sequence[BurstFigure], strategy: str, copies: int) -> list[BurstFigure]:
    """The figures that differ in their number of containers only, for the number of layers that has most of them."""
    plain = [
        f for f in bursts if not f.placement and f.burst == Burst(strategy, f.burst.containers, f.burst.layers, copies)
    ]
    by_layers: dict[int, list[BurstFigure]] = {}
    for found in plain:
        by_layers.setdefault(found.burst.layers, []).append(found)
    longest = max(by_layers.values(), key=len, default=[])
    return sorted(longest, key=lambda f: f.burst.containers)


def _burst_chart(chosen: dict[str, list[BurstFigure]], copies: int) -> str:
    containers = [f.burst.containers for found in chosen.values() for f in found]
    times = [f.wall_s.median for found in chosen.values() for f in found]
    layers = next(f.burst.layers for found in chosen.values() for f in found)
    x = Axis.logarithmic("containers started together", containers)
    y = Axis.logarithmic("seconds", [*times, LIMIT_S])
    series = [Series(_LIMIT, "health checks time out", ((x.low, LIMIT_S), (x.high, LIMIT_S)))]
    series += [
        Series(style_of(i), strategy, tuple((f.burst.containers, f.wall_s.median) for f in found))
        for i, (strategy, found) in enumerate(chosen.items())
        if found
    ]
    label = f"{layers} layers, {f'{copies} namespace copies each' if copies else 'no namespace copies'}"
    named = [(one.style, one.title) for one in series]
    return f"<p>{escape(label)}</p>{_legend(named)}{_chart(line_chart(label, series, x, y, dots=True))}"


def _burst_row(f: BurstFigure) -> Row:
    where = f" at {f.placement}" if f.placement else ""
    ranged = f"{figure(f.wall_s.low * 1e3)}-{figure(f.wall_s.high * 1e3)}"
    return [f"{f.burst}{where}", figure(f.wall_s.median * 1e3), ranged, f"{f.wall_s.count}"]


def _table_growth(bench: BenchResult) -> str:
    chosen: dict[str, list[BurstFigure]] = {}
    for f in bench.bursts:
        if (f.burst.containers, f.burst.layers, f.burst.copies, f.burst.admit) == (20, 20, 0, None):
            chosen.setdefault(f.burst.strategy, []).append(f)
    rows = [
        [str(f.burst), f"{f.mounts_before}", figure(f.operations_per_s), figure(f.wall_s.median * 1e3)]
        for found in chosen.values()
        for f in found
    ]
    if not any(len(found) > 1 for found in chosen.values()):
        return ""
    series = [
        Series(
            style_of(_STRATEGIES.index(name)),
            name,
            tuple(sorted((float(f.mounts_before), f.burst.containers / f.wall_s.median) for f in found)),
        )
        for name, found in chosen.items()
        if name in _STRATEGIES
    ]
    x = Axis.logarithmic("mounts in the table before", [p[0] for one in series for p in one.points])
    y = Axis.logarithmic("containers a second", [p[1] for one in series for p in one.points])
    return _section(
        "Against the length of the mount table",
        "Containers of 20 layers a second, 20 together, beside mounts that have nothing to do with them.",
        _legend((one.style, one.title) for one in series),
        _chart(line_chart("containers a second against mounts", series, x, y, dots=True)),
        _table(["burst", "mounts", "mount operations/s", "ms"], rows),
    )


def _model(validation: Validation | None) -> str:
    if validation is None:
        return ""
    points = [(p.measured.median * 1e3, p.predicted * 1e3, _MEASURED, str(p.burst)) for p in validation.points]
    for f in validation.calibrated:
        predicted = validation.model.predict(f.burst).seconds
        points.append((f.wall_s.median * 1e3, predicted * 1e3, _CALIBRATED, f"calibrated: {f.burst}"))
    values = [value for point in points for value in point[:2]]
    x, y = Axis.logarithmic("measured, ms", values), Axis.logarithmic("predicted, ms", values)
    series = [Series(_PREDICTED, "exactly right", ((x.low, x.low), (x.high, x.high)))]
    series += [Series(style, title, ((measured, predicted),)) for measured, predicted, style, title in points]
    worst = validation.worst
    text = (
        f"Six bursts calibrate the model, {len(validation.points)} others were held out. Median error "
        f"{validation.median_error:.1%} (interpolation: {validation.interpolation_error:.1%}); the worst point is "
        f"{worst.burst}, {worst.error:+.0%}. {_floor(validation)}{validation.disturbance.line()}"
    )
    named = [(_MEASURED, "held out"), (_CALIBRATED, "calibrated"), (_PREDICTED, "exactly right")]
    parameters = [
        [p.name, p.meaning, figure(p.value) if p.value is not None else "-", p.unit, p.source.value]
        for p in validation.model.parameters
    ]
    heads = ["burst", "measured, ms", "predicted", "error"]
    rows = [
        [str(p.burst), spread(p.measured, 1e3), figure(p.predicted * 1e3), f"{p.error:+.0%}"] for p in validation.points
    ]
    return _section(
        "The model against measurement",
        text,
        _legend(named),
        _chart(line_chart("predicted against measured", series, x, y, height=420)),
        _table(["", "parameter", "value", "unit", "source"], parameters),
        _table(heads, rows),
    )


def _floor(validation: Validation) -> str:
    floor = validation.repeatability
    return f"Two halves of the same repeats differ by {floor:.1%} in the median. " if floor is not None else ""


def _lines(bench: BenchResult) -> list[tuple[str, list[LockFigure]]]:
    """Fair locks by placement where there are several, else all kinds: never more lines than can be told apart."""
    if len(bench.placements) > 1:
        return [
            (placement.title, [f for f in bench.locks if f.placement == placement.name and f.kind is Kind.TICKET])
            for placement in bench.placements
        ]
    return [(kind.value, [f for f in bench.locks if f.kind is kind]) for kind in Kind]


def _lock_latency(bench: BenchResult) -> str:
    lines = [(name, found) for name, found in _lines(bench) if found]
    if not lines:
        return ""
    series = [
        Series(f"k{i % len(_LOOKS)}", name, tuple((float(f.threads), f.ns.median * f.threads) for f in found))
        for i, (name, found) in enumerate(lines)
    ]
    x, y = _axes(series, "threads", "ns for a section, as each thread sees it")
    heads = ["lock", "placement", "threads", "ns a section", "p50 ns", "p99 ns", "max ns"]
    rows = [
        [f.kind.value, f.placement, f"{f.threads}", spread(f.ns), *map(_or_none, (f.p50_ns, f.p99_ns, f.max_ns))]
        for f in bench.locks
    ]
    return _section(
        "Latency of a lock",
        "Each of N threads takes the same lock again and again. Time for a section as a thread sees it; latencies in "
        "the table come from runs of their own.",
        _legend((one.style, one.title) for one in series),
        _chart(line_chart("latency against threads", series, x, y, dots=True)),
        _table(heads, rows),
    )


def _axes(series: Sequence[Series], x: str, y: str) -> tuple[Axis, Axis]:
    points = [point for one in series for point in one.points]
    most = max((p[0] for p in points), default=2.0)
    # Threads begin at one and end where the machine does, be that less than a decade.
    return Axis(x, 1.0, max(2.0, most), log=True), Axis.logarithmic(y, [p[1] for p in points])


def _or_none(value: float | None) -> str:
    return figure(value) if value is not None else ""


def _throughput(bench: BenchResult) -> str:
    lines = [(name, found) for name, found in _lines(bench) if found]
    if not lines:
        return ""
    series = [
        Series(f"k{i % len(_LOOKS)}", name, tuple((float(f.threads), 1e3 / f.ns.median) for f in found))
        for i, (name, found) in enumerate(lines)
    ]
    peaks = [(name, max((1e3 / f.ns.median, f.threads) for f in found)) for name, found in lines]
    rows = [[name, figure(peak), f"{threads}"] for name, (peak, threads) in peaks]
    x, y = _axes(series, "threads", "million sections a second")
    return _section(
        "Throughput and its peak",
        "All threads together. More threads than at the peak only wait.",
        _legend((one.style, one.title) for one in series),
        _chart(line_chart("throughput against threads", series, x, y, dots=True)),
        _table(["", "peak, million/s", "at threads"], rows),
    )


def _short(kind: Kind) -> str:
    """A bar has room for seventeen letters to its left."""
    return "test-test-and-set" if kind is Kind.TTAS else kind.value


def _hand_off(bench: BenchResult) -> str:
    most = {f.placement: f.threads for f in sorted(bench.locks, key=lambda f: f.threads)}
    chosen = [f for f in bench.locks if f.hand_off is not None and 1 < f.threads == most[f.placement]]
    if not chosen:
        return ""
    bars = [
        Bar(
            f"k{i % len(_LOOKS)}",
            _short(f.kind) if len(bench.placements) == 1 else f"{_short(f.kind)} {f.placement}",
            1e3 / f.ns.median,
            f"{1e3 / f.ns.median:.3g}  ({f.hand_off or 0:.0%} moved)",
        )
        for i, f in enumerate(chosen)
    ]
    axis = Axis.linear("million sections a second", [bar.value for bar in bars])
    rows = [
        [bar.name, f"{f.threads}", figure(bar.value), f"{f.hand_off or 0:.1%}", f"{f.fairness:.2f}"]
        for bar, f in zip(bars, chosen, strict=True)
    ]
    return _section(
        "Throughput beside hand-offs",
        "A lock that the same processor takes again and again is fast because its cache line never moves. Only locks "
        "that change hands tell what a hand-off costs; in brackets, how many of the sections did.",
        _chart(bar_chart("throughput and hand-offs", bars, axis)),
        _table(["lock", "threads", "million/s", "handed off", "fairness"], rows),
    )


def _matrix(bench: BenchResult) -> str:
    if not bench.matrix:
        return ""
    rows = [
        [f"{c.a} - {c.b}", spread(c.ns), f"{c.home}", f"{c.node}", "moved" if c.moved else ""] for c in bench.matrix
    ]
    table = _table(["processors", "ns one way", "page touched by", "page on node", ""], rows)
    return _section(
        "Core to core",
        "One cache line sent to and fro, one way, in the order of the topology; a fresh page for each pair, first "
        "touched by the first of the two. Latency does not rank machines: contended cost has to be measured.",
        _chart(heat_map(bench.topology.in_order, bench.matrix)),
        table,
    )


def _left_out(bench: BenchResult) -> str:
    notes = [*bench.left_out, f"a spin-wait hint takes {figure(bench.pause_ns)} ns"]
    if bench.topology.governor:
        notes.append(f"frequency governor: {bench.topology.governor}")
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<footer>Left out, and noted<ul>{items}</ul></footer>"
