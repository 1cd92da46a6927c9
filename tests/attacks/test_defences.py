"""Each defence is switched off in a copy of the code, and the tests that docs/attacks.md names fail without it.

A test that passes without the defence it is there for proves nothing. All of them in `make soak`, a seeded tenth in
`make test`; those of the native code are built anew, and only there.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attacks.defences import DEFENCES, Defence
from tests.conftest import SOAK

TOP = Path(__file__).parents[2]
_TIMEOUT_S = 240


def test_every_defence_is_where_it_is_said_to_be() -> None:
    """When code moves, its entry in tests/attacks/defences.py moves along."""
    for defence in DEFENCES:
        for file, text, _ in defence.edits:
            count = (TOP / file).read_text(encoding="utf-8").count(text)
            assert count == 1, f"{defence.what}: {count} times in {file}: {text!r}"
        for test in defence.tests:
            file, _, name = test.partition("::")
            assert f"def {name.partition('[')[0]}(" in (TOP / "tests" / file).read_text(encoding="utf-8"), test


def test_the_page_says_of_each_test_whether_its_defence_was_switched_off() -> None:
    """A test in the table is one that fails without a defence, or the page says why there is nothing to switch off."""
    page = (TOP / "docs/attacks.md").read_text(encoding="utf-8")
    failing = {test.partition("::")[2].partition("[")[0] for defence in DEFENCES for test in defence.tests}
    for line in page.splitlines():
        named = re.findall(r"`(test_\w+)`", line)
        if line.startswith("|") and named:
            switched = line.rstrip("| ").rpartition("|")[2].strip()
            assert (switched == "fails") == bool(set(named) & failing), line


def without(defence: Defence, place: Path) -> Path:
    """A copy of the code without the defence; what is native is built anew."""
    copy = place / "copy"
    shutil.copytree(TOP / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    if defence.native:
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "native"):
            source = TOP / name
            shutil.copytree(source, copy / name) if source.is_dir() else shutil.copy(source, copy / name)
    for file, text, instead in defence.edits:
        path = copy / file
        path.write_text(path.read_text(encoding="utf-8").replace(text, instead), encoding="utf-8")
    if defence.native:
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(build, cwd=copy, check=True, timeout=_TIMEOUT_S, capture_output=True)
    return copy


def chosen(seed: int) -> tuple[Defence, ...]:
    if SOAK:
        return DEFENCES
    quick = [defence for defence in DEFENCES if not defence.native and "test_kills" not in defence.tests[0]]
    return tuple(random.Random(seed).sample(quick, len(DEFENCES) // 10))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_without_its_defence_a_test_fails(tmp_path: Path, seed: int) -> None:
    survived = []
    for number, defence in enumerate(chosen(seed)):
        copy = without(defence, tmp_path / str(number))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--timeout=60"]
        # In their own order: what they leave behind when they fail is for no other test.
        done = subprocess.run(
            [*command, *(f"tests/{test}" for test in defence.tests)],
            cwd=TOP,
            env={**os.environ, "PYTHONPATH": str(copy / "src"), "FLATMOUNT_SOAK": ""},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        shutil.rmtree(copy)
        print(f"{defence.what}: {done.stdout.splitlines()[-1] if done.stdout else done.stderr}")
        if done.returncode != 1:
            survived.append((defence.what, done.returncode, done.stdout[-1500:], done.stderr[-500:]))
    assert not survived, survived
