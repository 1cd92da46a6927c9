"""What people are told: help, hints, and which limits a storm asks for."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flatmount.cli.main import parser
from flatmount.errors import MAKE_USER_NAMESPACE, MappingError, StoreError, from_os_error
from flatmount.plan.mapping import Mapping
from flatmount.report.text import render
from flatmount.store import Owners
from flatmount.storm import burst, limits
from flatmount.storm.engine import stoppable
from flatmount.storm.summary import summary
from tests.unit.sample_storm import sample_report


def test_help_names_the_variables_and_not_their_values(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLATMOUNT_ROOT", "/somewhere/else")
    for arguments in (["--help"], ["image", "list", "--help"], ["storm", "--help"]):
        with pytest.raises(SystemExit):
            parser().parse_args(arguments)
    said = capsys.readouterr().out
    assert "/somewhere/else" not in said
    assert "$FLATMOUNT_ROOT or\n" in said or "$FLATMOUNT_ROOT or /var/lib/flatmount" in said
    assert "FLATMOUNT_RUN " in said
    assert "\n  flatmount storm demo --containers 200 --html storm.html\n" in said


@pytest.mark.parametrize("options", [[], ["--debug"]])
def test_a_verb_brings_its_own_modules_only(options: list[str], tmp_path: Path) -> None:
    program = (
        "import sys\nfrom flatmount.cli.main import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
        "    print(sorted({'urllib3', 'flatmount.cli.storm', 'flatmount.cli.image'} & set(sys.modules)))"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, *options, "image", "list", "--root", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.stdout == "['flatmount.cli.image']\n", said.stderr
    assert "no store" in said.stderr
    assert ("Traceback" in said.stderr) == bool(options)


def test_no_room_for_a_user_namespace_is_no_full_disk() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    told = from_os_error(full, MAKE_USER_NAMESPACE)
    assert "user.max_user_namespaces" in told.hint
    assert not isinstance(told, StoreError)
    assert "free space" in from_os_error(full, "write").hint


@pytest.mark.parametrize(
    ("mapping", "hint"),
    [
        ("1:100000:65535", "use a mapping that covers uid 0"),
        ("0:100000:1000", "use a mapping that covers uid 65534"),
        ("1:100000:1000", "use a mapping that covers uid 0 and reaches uid 65534"),
    ],
)
def test_a_mapping_that_is_too_small_is_told_which_id_it_lacks(mapping: str, hint: str) -> None:
    owners = Owners(((0, 0), (65534, 65534)), ((0, 0),))
    with pytest.raises(MappingError) as refusal:
        owners.require(Mapping.parse(mapping, None))
    assert refusal.value.hint == hint


def test_a_probe_of_few_rounds_is_in_no_column() -> None:
    report = sample_report(containers=2, strategies=("flat",))
    (entry,) = summary(report).strategies
    assert entry.quotable_probe_ms is None
    head, _, row = render(report, width=200).splitlines()[:3]
    at = head.index("probe p99")
    assert row[at : at + len("probe p99")].strip() == "–"


def test_the_soft_limit_is_raised_and_never_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = [256, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda which: tuple(limit))
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: limit.__setitem__(slice(None), new))
    limits.allow_descriptors(1000, 10)
    assert limit == [limits.needed_descriptors(1000, 10), 4096]
    limits.allow_descriptors(10, 10)
    assert limit[0] == limits.needed_descriptors(1000, 10)
    limits.allow_descriptors(1000, 100, layers=500)
    assert limit == [4096, 4096]
    with pytest.raises(limits.FlatmountError, match="hard limit is 4096") as refusal:
        limits.allow_descriptors(5000, 100)
    assert "ulimit -Hn" in refusal.value.hint


def test_a_hang_up_stops_a_storm_unless_it_is_ignored() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with stoppable() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.event.wait(5)
            assert stop.number == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stoppable() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.event.wait(0.05)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_error_of_the_system_while_undoing_is_that_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn:
        name = "one"
        target = "/roots/one"
        mapping = None
        container = None
        rootfs = None

        def undo(self) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    one = Stubborn()
    one.container = one.rootfs = one  # type: ignore[assignment]
    monkeypatch.setattr(burst, "adopt_thread", lambda: None)
    left = burst.Burst(started=[one])  # type: ignore[list-item]
    _, _, problems = burst.undo_burst(left, None, concurrency=1)  # type: ignore[arg-type]
    assert len(problems) == 1
    assert "EMFILE" in problems[0].why
    assert problems[0].target == "/roots/one"
