"""The native front's data between threads, as ThreadSanitizer sees it."""

from __future__ import annotations

import subprocess
from pathlib import Path

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "native"
OPTIONS = ("-std=gnu11", "-O1", "-g", "-D_GNU_SOURCE=1", "-fsanitize=thread", "-I", str(NATIVE))
LIBRARIES = ("-lnghttp2", "-ldl", "-lpthread")


def test_no_two_threads_meet_unguarded(tmp_path: Path) -> None:
    """Committers start while others write, lists grow while they are worked off, answers are kept and forgotten."""
    names = ("committer", "front", "kept", "message")
    sources = [HERE / "front_threads.c", NATIVE / "upper.c", *(NATIVE / f"front/{name}.c" for name in names)]
    program, place = tmp_path / "front_threads", tmp_path / "place"
    subprocess.run(["cc", *OPTIONS, "-o", program, *sources, *LIBRARIES], check=True)
    place.mkdir()
    done = subprocess.run([program, place], stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
