"""Every page in a real browser without a network: nothing asked for, no complaint, a table for each figure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flatmount.cli.main import main
from flatmount.cpu.topology import Topology
from flatmount.report.cpu import topology_page
from tests import sample_results
from tests.browser import Browser, browser

NARROW, WIDE = 390, 1100
# Sections with a picture (a legend's lines are none) and no table.
WITHOUT_TABLE = """
[...document.querySelectorAll('section')]
    .filter(section => section.querySelector('svg[role="img"]') && !section.querySelector('table'))
    .map(section => section.querySelector('h2').textContent)
"""
BROKEN = """<!doctype html><meta http-equiv="Content-Security-Policy" content="default-src 'none'">
<title>x</title><img src="http://192.0.2.1/x.png"><script>nothing()</script>"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind of page, as `flatmount report` writes it: alone, and two side by side."""
    directory = tmp_path_factory.mktemp("pages")
    found = {}
    for name in sample_results.RESULTS:
        saved = directory / f"{name}.json"
        sample_results.save(name, saved)
        for way, files in (("", [saved]), (" beside another", [saved, saved])):
            page = directory / f"{name}{way}.html"
            assert main(["report", *map(str, files), "--html", str(page)]) == 0
            found[f"{name}{way}"] = page
    topology: Topology = sample_results.RESULTS["cpu"].topology
    found["topology"] = directory / "topology.html"
    found["topology"].write_text(topology_page(topology))
    return found


def test_pages_ask_for_nothing_and_complain_about_nothing(tab: Browser, pages: dict[str, Path]) -> None:
    for name, page in pages.items():
        for dark in (False, True):
            seen = tab.open(page, width=WIDE, dark=dark)
            assert seen.requests == [page.as_uri().replace(" ", "%20")], name
            assert seen.complaints == [], name
            paper = tab.run("getComputedStyle(document.documentElement).backgroundColor")
            assert (paper == "rgb(255, 255, 255)") is not dark, name
        assert tab.run(WITHOUT_TABLE) == [], name
        assert tab.run("document.querySelectorAll('h1').length") == 1, name
        assert tab.printed().startswith(b"%PDF"), name


def test_pages_fit_a_narrow_screen(tab: Browser, pages: dict[str, Path]) -> None:
    for name, page in pages.items():
        tab.open(page, width=NARROW)
        assert tab.run("document.documentElement.scrollWidth") <= NARROW, name


def test_text_stays_readable(tab: Browser, pages: dict[str, Path]) -> None:
    """Text against the paper it is on: a contrast of 4.5 at least, light and dark."""
    script = """(() => {
        const light = text => { const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b };
        const paper = light(getComputedStyle(document.documentElement).backgroundColor);
        const bad = [];
        for (const element of document.querySelectorAll('p, td, th, li, h1, h2, dt, dd, summary, span')) {
            const ink = light(getComputedStyle(element).color);
            const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
            if (contrast < 4.5) bad.push(element.tagName + '.' + element.className + ' ' + contrast.toFixed(2));
        }
        return [...new Set(bad)];
    })()"""
    for name, page in pages.items():
        for dark in (False, True):
            tab.open(page, dark=dark)
            assert tab.run(script) == [], (name, dark)


def test_a_page_that_is_broken_would_be_seen(tab: Browser, tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text(BROKEN)
    seen = tab.open(page)
    assert len(seen.complaints) >= 2
    assert any("Content Security Policy" in text for text in seen.complaints)
