"""Two drawings that only processors need: their topology, and a matrix of latencies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from flatmount.cpu.results import Cell
from flatmount.cpu.topology import Topology
from flatmount.report.svg import WIDTH

_BOX, _GAP, _PAD, _HEAD = 28, 4, 10, 20
_LEGEND = 46


def topology_picture(topology: Topology) -> str:
    """Sockets, nodes, caches and cores as nested boxes, an `svg` element."""
    drawn: list[str] = []
    top = 0.0
    for package in topology.packages:
        height: float = _HEAD
        inner: list[str] = []
        for node in topology.nodes:
            inside = [cpu for cpu in node.cpus if cpu in package]
            if inside:
                boxes, used = _node(topology, node.number, inside, top + height)
                inner.append(boxes)
                height += used + _GAP
        height += _PAD
        drawn.append(_frame(0, top, WIDTH, height, f"socket {topology.cpu(package[0]).package}"))
        drawn += inner
        top += height + _PAD
    if topology.offline:
        drawn.append(f'<text x="0" y="{top + 14}">offline: {len(topology.offline)} processors</text>')
        top += _HEAD
    label = escape(topology.summary())
    return f'<svg viewBox="-1 -1 {WIDTH + 2} {top + 2:.0f}" role="img" aria-label="{label}">{"".join(drawn)}</svg>'


def _node(topology: Topology, number: int, inside: Sequence[int], top: float) -> tuple[str, float]:
    """A node's boxes and how high they are."""
    drawn = []
    height: float = _HEAD
    width = WIDTH - 2 * _PAD
    for domain_number, domain in enumerate(topology.l3_domains):
        cores = [core for core in topology.cores if core[0] in domain and core[0] in inside]
        if not cores:
            continue
        siblings = max(map(len, cores))
        across = max(1, int((width - 4 * _PAD) // (_BOX + _GAP)))
        rows = math.ceil(len(cores) / across)
        needed = _HEAD + rows * (siblings * (_BOX - 8) + _GAP) + _PAD
        size = f", {topology.l3_bytes >> 20} MiB" if topology.l3_bytes else ""
        drawn.append(_frame(2 * _PAD, top + height, width - 2 * _PAD, needed, f"L3 {domain_number}{size}"))
        for i, core in enumerate(cores):
            x = 3 * _PAD + i % across * (_BOX + _GAP)
            y = top + height + _HEAD + i // across * (siblings * (_BOX - 8) + _GAP)
            drawn += [_cpu(topology, cpu, x, y + k * (_BOX - 8)) for k, cpu in enumerate(core)]
        height += needed + _GAP
    return _frame(_PAD, top, width, height, f"node {number}") + "".join(drawn), height


def _frame(x: float, y: float, width: float, height: float, title: str) -> str:
    return (
        f'<rect class="box" x="{x}" y="{y:.0f}" width="{width}" height="{height:.0f}" rx="4"/>'
        f'<text class="small" x="{x + 6}" y="{y + 14:.0f}">{escape(title)}</text>'
    )


def _cpu(topology: Topology, number: int, x: float, y: float) -> str:
    off = "" if number in topology.allowed else " off"
    return (
        f'<rect class="cpu{off}" x="{x}" y="{y:.0f}" width="{_BOX}" height="{_BOX - 8}" rx="2"/>'
        f'<text class="small" x="{x + _BOX / 2}" y="{y + 15:.0f}" text-anchor="middle">{number}</text>'
    )


def heat_map(order: Sequence[int], cells: Sequence[Cell]) -> str:
    """Latencies between processors in that order as an `svg` element; the darker, the longer, by powers."""
    measured = {frozenset((cell.a, cell.b)): cell.ns.median for cell in cells}
    shown = [cpu for cpu in order if any(cpu in pair for pair in measured)]
    low, high = min(measured.values()), max(measured.values())
    side = min(72.0, (WIDTH - _LEGEND) / max(1, len(shown)))
    drawn = []
    for row, a in enumerate(shown):
        drawn.append(_axis_label(a, _LEGEND - 6, _LEGEND / 2 + (row + 0.5) * side + 4, "end", side))
        drawn.append(_axis_label(a, _LEGEND + (row + 0.5) * side, _LEGEND / 2 - 6, "middle", side))
        for column, b in enumerate(shown):
            ns = measured.get(frozenset((a, b))) if a != b else None
            if ns is not None:
                x, y = _LEGEND + column * side, _LEGEND / 2 + row * side
                drawn.append(_heat(x, y, side, _depth(ns, low, high), f"{ns:.0f}"))
    height = _LEGEND / 2 + side * len(shown) + 4
    label = f"core-to-core latency, {low:.0f} to {high:.0f} ns"
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}">{"".join(drawn)}</svg>'


def _depth(ns: float, low: float, high: float) -> float:
    return 0.5 if high <= low * 1.01 else 0.15 + 0.85 * math.log(ns / low) / math.log(high / low)


def _axis_label(number: int, x: float, y: float, anchor: str, side: float) -> str:
    return f'<text class="small" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{number}</text>' if side >= 12 else ""


def _heat(x: float, y: float, side: float, depth: float, text: str) -> str:
    shown = f'<text x="{x + side / 2:.1f}" y="{y + side / 2 + 4:.1f}" text-anchor="middle">{text}</text>'
    rect = f'<rect x="{x:.1f}" y="{y:.1f}" width="{side - 1:.1f}" height="{side - 1:.1f}" fill-opacity="{depth:.2f}"/>'
    return f'<g class="heat k0">{rect}</g>{shown if side >= 24 else ""}'
