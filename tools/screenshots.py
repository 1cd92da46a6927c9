"""Pictures of every page for the docs, by a browser without a network.

    python tools/screenshots.py RESULTS OUTPUT

RESULTS has files as the verbs write them: storm.json, profile.json, trace.json, doctor.json, starts.json, cpu.json and
watch.jsonl; for one that is not there the tests' own sample is taken, and said. OUTPUT gets a PNG for each.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from flatmount.report.files import page, read_results
from tests import sample_results
from tests.browser import Browser, browser

_WIDTH = 1000
_MOST_BYTES = 150_000


@dataclass(frozen=True)
class Picture:
    """What of a page is shown: from a heading on (the top for ""), so many pixels."""

    name: str
    results: tuple[str, ...]
    heading: str = ""
    height: int = 900
    dark: bool = False


_PICTURES = (
    Picture("storm", ("storm",), height=1000),
    Picture("storm-dark", ("storm",), height=1000, dark=True),
    Picture("storm-locks", ("storm",), "Who waits for the mount locks", 520),
    Picture("profile", ("profile",), height=1000),
    Picture("trace", ("trace",), height=900),
    Picture("doctor", ("doctor",), height=900),
    Picture("watch", ("watch",), height=1000),
    Picture("starts", ("starts",), height=900),
    Picture("processors", ("cpu",), height=1000),
    Picture("side-by-side", ("storm", "storm-before"), height=700),
)


def main(results: Path, output: Path) -> None:
    """Take all pictures. Raises: SystemExit for one that is too large."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home, browser(Path(home)) as tab:
        for picture in _PICTURES:
            paths = [_found(results, name, Path(home)) for name in picture.results]
            shown = Path(home) / "page.html"
            shown.write_text(page([read_results(str(path)) for path in paths]), encoding="utf-8")
            taken = _taken(tab, shown, picture)
            if len(taken) > _MOST_BYTES:
                raise SystemExit(f"{picture.name} has {len(taken):,} bytes, more than {_MOST_BYTES:,}")
            (output / f"{picture.name}.png").write_bytes(taken)
            print(f"{picture.name}.png  {len(taken):,} bytes")


def _found(results: Path, name: str, home: Path) -> Path:
    for candidate in (results / f"{name}.json", results / f"{name}.jsonl"):
        if candidate.exists():
            return candidate
    print(f"{name}: the tests' sample")
    sample = home / f"{name}.json"
    sample_results.save(name.partition("-")[0], sample)
    return sample


def _taken(tab: Browser, shown: Path, picture: Picture) -> bytes:
    tab.open(shown, width=_WIDTH, dark=picture.dark)
    top = 0
    if picture.heading:
        find = f"[...document.querySelectorAll('h2')].find(one => one.textContent === {picture.heading!r})"
        top = int(tab.run(f"{find}.getBoundingClientRect().top + window.scrollY - 24"))
    height = min(picture.height, int(tab.run("document.documentElement.scrollHeight")) - top)
    return tab.screenshot(height=height, top=top)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
