"""What `flatmount image pull` draws on a terminal."""

from __future__ import annotations

import io

import pytest

from flatmount.cli.image_pull import Bars, bar
from flatmount.image.registry_fetch import Fetched
from flatmount.store import Progressed


class Source:
    """Stands for an image that is being fetched."""

    def __init__(self, *layers: Fetched) -> None:
        self.layers = layers

    def fetched(self) -> tuple[Fetched, ...]:
        return self.layers


def fetched(position: int, done: int, total: int, active: bool = True) -> Fetched:
    return Fetched(position, f"sha256:{position:064x}", done, 0, total, active)


def test_a_bar() -> None:
    assert bar(0, 100) == "[........................]        0 B of 100 B"
    assert bar(50, 100) == "[############............]       50 B of 100 B"
    assert bar(1 << 20, 1 << 20) == "[########################]    1.0 MiB of 1.0 MiB"
    assert bar(0, 0).count("#") == 24


def test_a_line_for_each_active_layer_and_one_for_the_whole() -> None:
    bars = Bars(Source(fetched(0, 10, 10, False), fetched(1, 5, 10), fetched(2, 0, 10, False)))  # type: ignore[arg-type]
    assert [line.split()[0] for line in bars.lines(80)] == ["000000000000", "fetched"]
    assert "15 B of 30 B" in bars.lines(80)[-1]
    bars.unpacking(Progressed(2, 3, "sha256:0", 5, 10))
    assert bars.lines(100)[-1].endswith("unpacking layer 2 of 3")


def test_no_line_is_wider_than_the_terminal_and_not_all_are_shown() -> None:
    bars = Bars(Source(*(fetched(number, 5, 10) for number in range(30))))  # type: ignore[arg-type]
    lines = bars.lines(40)
    assert len(lines) == 9
    assert all(len(line) < 40 for line in lines)


def test_what_was_drawn_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = io.StringIO()
    monkeypatch.setattr("sys.stderr", drawn)
    bars = Bars(Source(fetched(0, 5, 10)))  # type: ignore[arg-type]
    bars._show(bars.lines(80))
    bars._show([])
    assert drawn.getvalue().startswith("\r\x1b[J")
    assert drawn.getvalue().endswith("\r\x1b[2A\x1b[J")
