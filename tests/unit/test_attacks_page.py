"""docs/attacks.md names tests: each of them exists, and some are the page's own."""

from __future__ import annotations

import re
from pathlib import Path

TOP = Path(__file__).parents[2]


def test_every_test_on_the_page_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (TOP / "docs/attacks.md").read_text(encoding="utf-8")))
    found: set[str] = set()
    for path in (TOP / "tests").rglob("test_*.py"):
        found.update(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert len(named) > 30
    assert named - found == set()


def test_nothing_reads_the_images_user_database() -> None:
    """Who a container's user is, is asked by runtimes; in an image a file called passwd is a file."""
    for part in ("image", "store"):
        for path in (TOP / "src/flatmount" / part).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "etc/passwd" not in text or path.name.startswith("demo"), path
