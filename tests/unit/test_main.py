"""The command line as a whole: which verbs a call loads."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flatmount.cli import main


@pytest.mark.parametrize(
    ("call", "verbs"),
    [
        (["run", "--rm", "web"], ("run",)),
        (["--debug", "ps"], ("ps",)),
        (["run", "web", "stop"], ("run",)),
        (["--help"], main._VERBS),
        ([], main._VERBS),
        (["no-such-verb"], main._VERBS),
    ],
)
def test_a_call_loads_its_own_verb_and_help_loads_all(call: list[str], verbs: tuple[str, ...]) -> None:
    assert tuple(main._needed(call)) == verbs


def test_no_other_verbs_module_is_loaded() -> None:
    script = "import sys; from flatmount.cli.main import main; main(['store', '--help'])"
    script = f"import atexit, sys; atexit.register(lambda: print(*sys.modules)); {script}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {name for name in done.stdout.split() if name.startswith("flatmount.cli.")}
    assert "flatmount.cli.store" in loaded
    assert not loaded & {f"flatmount.cli.{verb}" for verb in main._VERBS if verb not in ("store", "run")}
