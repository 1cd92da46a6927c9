"""Stacks for people and for other tools: flame graphs as inline SVG, folded stacks, speedscope's JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from flatmount.observe.profile_results import Profile
from flatmount.observe.symbols import Lock, Work

WIDTH = 1200
_ROW = 18
_CHARACTER = 6.6
_LEAST_SHARE = 0.0008  # of the width: one pixel
_MARKED = {Lock.NAMESPACE_SEM, Lock.MOUNT_LOCK, Work.SPINNING, Work.UNDER_LOCK}
_BESIDE = {Lock.GRACE_PERIOD, Work.GRACE_PERIOD}

Weighted = tuple[str, float, Lock | Work]  # folded stack, weight, what it is


@dataclass(slots=True)
class _Frame:
    name: str
    weight: float = 0.0
    marked: float = 0.0
    beside: float = 0.0
    below: dict[str, _Frame] = field(default_factory=dict)


def weights(profile: Profile) -> tuple[tuple[Weighted, ...], tuple[Weighted, ...]]:
    """Stacks on the processors by milliseconds of samples, and stacks of waits by milliseconds."""
    period_ms = 1000 / profile.sample_hz
    return (
        tuple((one.folded, one.samples * period_ms, one.work) for one in profile.cpu),
        tuple((one.folded, one.total_us / 1e3, one.lock) for one in profile.wait_stacks),
    )


def flame_graph(label: str, stacks: Iterable[Weighted], unit: str) -> str:
    """A flame graph, root at the bottom, as an `svg` element.

    Frames have one of three classes: `hot` where at least half of their weight is about mount locks, `grace` where it
    is grace periods, `cool` else. A pointer over a frame shows its name, weight and share.
    """
    root = _tree(stacks)
    if not root.weight:
        return ""
    depth = _depth(root)
    height = (depth + 1) * _ROW
    drawn: list[str] = []

    def place(frame: _Frame, left: float, row: int) -> None:
        share = frame.weight / root.weight
        width = share * WIDTH
        top = height - (row + 1) * _ROW
        kind = "hot" if frame.marked * 2 >= frame.weight else "grace" if frame.beside * 2 >= frame.weight else "cool"
        room = int(width / _CHARACTER) - 1
        text = frame.name if len(frame.name) <= room else frame.name[: room - 1] + "…" if room > 3 else ""
        shown = f'<text x="{left + 3:.1f}" y="{top + 13}">{escape(text)}</text>' if text else ""
        title = f"{frame.name}: {frame.weight:,.1f} {unit}, {share:.1%}"
        drawn.append(
            f'<g class="{kind}"><title>{escape(title)}</title>'
            f'<rect x="{left:.1f}" y="{top}" width="{max(width - 0.4, 0.3):.1f}" height="{_ROW - 1}"/>{shown}</g>'
        )
        for child in sorted(frame.below.values(), key=lambda one: one.name):
            if child.weight / root.weight >= _LEAST_SHARE:
                place(child, left, row + 1)
            left += child.weight / root.weight * WIDTH

    place(root, 0.0, 0)
    return (
        f'<svg class="flame" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(drawn)}</svg>"
    )


def folded_text(stacks: Iterable[Weighted], scale: float = 1000.0) -> str:
    """Folded stacks, one a line with a whole number: microseconds, with the default scale for milliseconds."""
    return "".join(f"{text} {round(weight * scale)}\n" for text, weight, _ in stacks if round(weight * scale))


def speedscope(profile: Profile, name: str) -> dict[str, Any]:
    """Both sets of stacks as speedscope reads them. See: speedscope's file format schema, `sampled` profiles."""
    frames: dict[str, int] = {}
    cpu, waits = weights(profile)

    def part(title: str, stacks: Sequence[Weighted]) -> dict[str, Any]:
        samples = [[frames.setdefault(frame, len(frames)) for frame in text.split(";")] for text, _, _ in stacks]
        values = [round(weight, 4) for _, weight, _ in stacks]
        return {
            "type": "sampled",
            "name": title,
            "unit": "milliseconds",
            "startValue": 0,
            "endValue": round(sum(values), 4),
            "samples": samples,
            "weights": values,
        }

    profiles = [part("on processors", cpu), part("waiting for locks", waits)]
    return {
        "$schema": "https://www.speedscope.app/file-format-schema.json",
        "name": name,
        "exporter": f"flatmount {profile.host.flatmount}",
        "shared": {"frames": [{"name": frame} for frame in frames]},
        "profiles": profiles,
    }


def _tree(stacks: Iterable[Weighted]) -> _Frame:
    root = _Frame("all")
    for text, weight, what in stacks:
        frame = root
        _add(frame, weight, what)
        for name in text.split(";"):
            frame = frame.below.setdefault(name, _Frame(name))
            _add(frame, weight, what)
    return root


def _add(frame: _Frame, weight: float, what: Lock | Work) -> None:
    frame.weight += weight
    frame.marked += weight if what in _MARKED else 0.0
    frame.beside += weight if what in _BESIDE else 0.0


def _depth(root: _Frame) -> int:
    least = root.weight * _LEAST_SHARE

    def below(frame: _Frame) -> int:
        return 1 + max((below(child) for child in frame.below.values() if child.weight >= least), default=0)

    measure: Callable[[_Frame], int] = below
    return measure(root)
