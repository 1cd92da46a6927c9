"""The table for a terminal and the page: widths, colour, completeness, nothing loaded, geometry."""

from __future__ import annotations

import dataclasses
import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_storm import sample_report

from flatmount.report.html import page
from flatmount.report.svg import Axis, Bar, Series, bar_chart, line_chart, thinned
from flatmount.report.text import render, wants_colour
from flatmount.storm.results import StormReport

ESCAPES = re.compile(r"\x1b\[\d+m")


def nothing_measured() -> StormReport:
    return dataclasses.replace(sample_report(), results=())


@pytest.mark.parametrize("width", [50, 72, 80, 100, 120, 200])
def test_no_line_is_wider_than_asked_and_columns_stand_in_line(width: int) -> None:
    lines = render(sample_report(), width=width).splitlines()
    assert max(map(len, lines)) <= width
    table = lines[: lines.index("")]
    assert len(table) == 6
    ends = {match.end() for match in re.finditer(r"\S+", table[-1])}
    for row in table[2:]:
        numbers = [match.end() for match in re.finditer(r"\S+", row)][1:]
        assert set(numbers) <= ends


def test_a_narrow_terminal_keeps_rate_and_failures() -> None:
    head = render(sample_report(), width=30).splitlines()[0].split()
    assert head == ["strategy", "starts", "failed"]


def test_a_wide_terminal_gets_every_column() -> None:
    head = render(sample_report(), width=200).splitlines()[0]
    for column in ("times", "range", "p50", "p99", "max", "mount ops", "table", "probe p99", "watchers"):
        assert column in head
    without = dataclasses.replace(sample_report(), settings=dataclasses.replace(sample_report().settings, watchers=0))
    assert "watchers" not in render(without, width=200)


def test_colour_changes_no_column() -> None:
    plain = render(sample_report(), width=90)
    coloured = render(sample_report(), width=90, colour=True)
    assert "\x1b[" in coloured
    assert "\x1b[" not in plain
    assert [line.rstrip() for line in ESCAPES.sub("", coloured).splitlines()] == plain.splitlines()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "wanted"),
    [
        (Terminal(), {"TERM": "xterm"}, True),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": ""}, True),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (Terminal(), {}, False),
        (io.StringIO(), {"TERM": "xterm"}, False),
    ],
)
def test_colour_is_for_terminals_without_no_color(
    stream: io.StringIO, environment: dict[str, str], wanted: bool
) -> None:
    assert wants_colour(stream, environment) is wanted


def test_notes_say_whether_the_accounts_agree() -> None:
    report = sample_report(strategies=("common-parent", "flat"))
    assert "not counted by the kernel: count mount events: Invalid argument" in render(report, width=300)
    counted = tuple(run for run in report.results if run.repeat == 0)
    assert "the kernel counted the same" in render(dataclasses.replace(report, results=counted), width=300)
    first = counted[0]
    off = dataclasses.replace(first.mount_operations, kernel=1401)
    wrong = dataclasses.replace(first, mount_operations=off)
    text = render(dataclasses.replace(report, results=(wrong, *counted[1:])), width=300)
    assert "common-parent (repeat 1): planned 1,400, executed 1,400, the kernel counted 1,401" in text


def test_notes_name_failures_and_what_was_left_behind() -> None:
    report = sample_report()
    assert "per-layer: move_mount merged: Device or resource busy" in render(report, width=300)
    run = report.results[0]
    left = dataclasses.replace(run, mount_table=dataclasses.replace(run.mount_table, after=run.mount_table.before + 7))
    text = render(dataclasses.replace(report, results=(left, *report.results[1:])), width=300)
    assert "per-layer (repeat 1) left 7 mounts behind." in text


def test_nothing_measured_renders() -> None:
    assert render(nothing_measured()) == "Medians of 3 repeats; ratios within a repeat.\n\nNothing was measured.\n"
    assert "Nothing was measured." in page(nothing_measured())


class Reader(HTMLParser):
    """Checks that every element is closed, and keeps what a test asks for."""

    VOID = frozenset(("meta", "br"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_whole_and_loads_nothing() -> None:
    text = page(sample_report())
    reader = Reader(text)
    names = [tag for tag, _ in reader.tags]
    assert not {"script", "link", "img", "iframe", "object"} & set(names)
    for tag, attributes in reader.tags:
        assert not {"src", "href", "onload", "onclick"} & attributes.keys(), tag
    assert "url(" not in text
    assert "://" not in text
    assert "@import" not in text
    assert names.count("table") >= sum(1 for tag, attributes in reader.tags if attributes.get("role") == "img")
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_every_chart_is_well_formed_and_labelled() -> None:
    charts = re.findall(r'<svg viewBox="0 0 860.*?</svg>', page(sample_report()), re.S)
    assert len(charts) == 5
    for chart in charts:
        root = ElementTree.fromstring(chart)
        assert root.attrib["aria-label"]
        assert len({group.attrib["class"] for group in root.iter("g")}) == 4


def test_names_cannot_break_out_of_the_page() -> None:
    report = sample_report()
    evil = '"><script>alert(1)</script>'
    report = dataclasses.replace(
        report,
        taken_at=evil,
        host=dataclasses.replace(report.host, kernel=evil, cpu_model=evil),
        image=dataclasses.replace(report.image, name=evil),
        settings=dataclasses.replace(report.settings, uppers=evil),
        results=tuple(
            dataclasses.replace(
                run,
                strategy=evil,
                failures=(evil,),
                mount_operations=dataclasses.replace(run.mount_operations, kernel=None, kernel_reason=evil),
            )
            for run in report.results
        ),
    )
    reader = Reader(page(report))
    assert "script" not in {tag for tag, _ in reader.tags}
    assert any(evil in word for word in reader.words)


def test_strategies_that_have_no_colour_of_their_own_get_different_ones() -> None:
    report = sample_report(strategies=("flat", "detached"))
    renamed = {"flat": "erofs", "detached": "chown"}
    report = dataclasses.replace(
        report, results=tuple(dataclasses.replace(r, strategy=renamed[r.strategy]) for r in report.results)
    )
    colours = re.findall(r"\.s\d \{ --c: (#\w+); --dash", page(report))
    assert len(colours) == len(set(colours)) == 2


# What is measured is 0 or at least a microsecond in milliseconds.
@given(st.lists(st.just(0.0) | st.floats(1e-3, 1e9), min_size=1, max_size=20), st.booleans())
def test_an_axis_holds_its_values_and_has_round_ticks_inside(values: list[float], log: bool) -> None:
    axis = (Axis.logarithmic if log else Axis.linear)("x", values)
    assert all(0 <= axis.share(value) <= 1 for value in values)
    if log:
        positive = [value for value in values if value > 0]
        assert not positive or (axis.low <= min(positive) * 1.001 and axis.high >= max(positive) * 0.999)
    else:
        assert (axis.low, axis.high >= max(values) * (1 - 1e-9)) == (0, True)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 20
    assert ticks == sorted(set(ticks))
    assert all(-1e-9 <= axis.share(tick) <= 1 + 1e-9 for tick in ticks)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), max_size=400), st.integers(10, 50))
def test_thinning_keeps_extremes_and_order(points: list[tuple[float, float]], limit: int) -> None:
    points.sort()
    kept = thinned(points, limit)
    assert len(kept) <= max(limit, 10) + 2
    assert list(kept) == sorted(kept)
    assert set(kept) <= set(points)
    if points:
        assert max(y for _, y in kept) == max(y for _, y in points)
        assert min(y for _, y in kept) == min(y for _, y in points)


def test_a_bar_is_as_long_as_its_value() -> None:
    chart = bar_chart("b", [Bar("a", "half", 5, "5"), Bar("b", "whole", 10, "10", 9, 10)], Axis("x", 0, 10))
    half, whole = (float(width) for width in re.findall(r'class="bar"[^>]* width="([\d.]+)"', chart))
    assert whole == pytest.approx(2 * half, abs=0.2)
    assert chart.count('class="range"') == 1


def test_a_line_goes_through_its_points_and_one_point_is_a_dot() -> None:
    x, y = Axis("x", 0, 10), Axis("y", 0, 10)
    line = Series("s", "t", ((0, 0), (10, 10)))
    chart = line_chart("c", [line, Series("d", "t", ((5, 5),))], x, y, height=300)
    ((x0, y0, x1, y1),) = re.findall(r'd="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', chart)
    ((cx, cy),) = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)
    assert float(cx) == pytest.approx((float(x0) + float(x1)) / 2, abs=0.2)
    assert float(cy) == pytest.approx((float(y0) + float(y1)) / 2, abs=0.2)
    assert float(y0) > float(y1)
    assert "H" in line_chart("c", [line], x, y, stepped=True)
