"""Bursts of real mounts: what they count and leave behind, and the model's verbs on them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from flatmount.cli.main import main
from flatmount.cpu import validate as validate_module
from flatmount.cpu.bench import burst_figure, run_bench
from flatmount.cpu.burst import STRATEGIES, Bench, BurstRun, check, stage
from flatmount.cpu.model import CALIBRATION, fit, work_of
from flatmount.cpu.results import Burst
from flatmount.cpu.validate import validate
from flatmount.cpu.validation import load_validation
from flatmount.errors import MissingFeature, OperationFailed, UsageError
from flatmount.kernel import _native
from flatmount.kernel.namespaces import apart


def on_stage(*bursts: Burst, layers: int = 12) -> list[BurstRun]:
    """Run the bursts and check that nothing of them is left in the namespace."""

    def run() -> list[BurstRun]:
        with stage(layers) as bench:
            # What keeps for as long as the stage does is there after the first burst.
            bench.run(Burst("flat", 1, 1, 1))
            mounts, descriptors = _native.count_mounts(0), len(os.listdir("/proc/self/fd"))
            found = [bench.run(burst) for burst in bursts]
            assert _native.count_mounts(0) == mounts + max((b.background for b in bursts), default=0)
            assert len(os.listdir("/proc/self/fd")) == descriptors
            return found

    before = set(os.listdir("/tmp"))
    result = apart(run)
    assert not {name for name in set(os.listdir("/tmp")) - before if name.startswith("flatmount-burst-")}
    return result


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("copies", [0, 2])
def test_a_burst_counts_what_its_plan_says(strategy: str, copies: int) -> None:
    (found,) = on_stage(Burst(strategy, 6, 12, copies))
    assert 0 < found.woken_s < found.latencies_s[0]
    assert found.mount_operations == 6 * work_of(strategy, 12).operations
    assert found.mounts_after - found.mounts_before == 6
    assert len(found.latencies_s) == 6 and 0 < found.latencies_s[0] <= found.latencies_s[-1] == found.wall_s


def test_every_switch_of_a_burst() -> None:
    bursts = (
        Burst("per-layer", 5, 4, admit=1),
        Burst("per-layer", 5, 4, admit=2, copies=1),
        Burst("flat", 5, 4, copies=2, template=True),
        Burst("detached", 5, 4, one_range=True),
        Burst("common-parent", 5, 4, background=30),
    )
    found = on_stage(*bursts)
    assert [run.burst for run in found] == list(bursts)
    assert found[-1].mounts_before >= 30 + found[0].mounts_before


def test_one_at_a_time_is_one_after_the_other() -> None:
    (found,) = on_stage(Burst("per-layer", 4, 10, admit=1))
    # One thread has run them all: no two can have ended in the same moment, and the first not at the end.
    assert len(set(found.latencies_s)) == 4 and found.latencies_s[0] < found.wall_s


def test_nothing_is_seen_in_the_callers_namespace() -> None:
    before, namespace = _native.count_mounts(0), os.readlink("/proc/thread-self/ns/mnt")
    on_stage(Burst("per-layer", 5, 5))
    assert (_native.count_mounts(0), os.readlink("/proc/thread-self/ns/mnt")) == (before, namespace)


@pytest.mark.parametrize(
    ("burst", "message"),
    [
        (Burst("magic", 1, 1), "no burst of strategy 'magic'"),
        (Burst("flat", 0, 1), "0 containers"),
        (Burst("flat", 1, 13), "13 layers"),
        (Burst("flat", 1, 1, admit=0), "would never start"),
        (Burst("per-layer", 1000, 12, background=100_000_000), "fs.mount-max"),
    ],
)
def test_bursts_that_cannot_be_meant(burst: Burst, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check(burst, 12)
    assert message in caught.value.line()


def test_background_only_grows() -> None:
    with pytest.raises(UsageError, match="are there already"):
        on_stage(Burst("flat", 1, 1, background=5), Burst("flat", 1, 1, background=2))


def test_the_first_failed_operation_is_named() -> None:
    def run() -> None:
        with stage(3) as bench:
            os.rename(f"{bench.data}/layers/1", f"{bench.data}/layers/gone")
            bench.run(Burst("per-layer", 2, 3))

    with pytest.raises(OperationFailed, match=r"open_tree .*layers/1/fs: No such file"):
        apart(run)


def test_without_privilege_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("flatmount.cpu.burst.enter_private_mounts", refused)
    with pytest.raises(MissingFeature, match="mount namespace of its own") as caught:
        apart(lambda: enter(3))
    assert "root" in caught.value.hint
    monkeypatch.setattr("flatmount.cpu.schedule._LEAST_FOR_BURSTS_S", 1.0)
    result = run_bench(3.0)
    assert result.locks and not result.bursts
    assert any(line.startswith("bursts: the burst needs a mount namespace") for line in result.left_out)


def enter(layers: int) -> None:
    with stage(layers) as bench:
        assert isinstance(bench, Bench)


def test_quiet_repeats_are_preferred() -> None:
    found = on_stage(*[Burst("flat", 2, 2)] * 4)
    figure = burst_figure(found)
    assert 1 <= figure.wall_s.count <= 4 and figure.burst == Burst("flat", 2, 2)


def test_a_small_validation_end_to_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(validate_module, "HELD_OUT", (Burst("flat", 5, 5), Burst("per-layer", 5, 5, 2)))
    monkeypatch.setattr(validate_module, "_REPEATS", ((0.0, 1),))
    monkeypatch.setattr(validate_module, "_TRIES", 1)
    monkeypatch.setattr(validate_module, "_MOST_RUNS", 5)
    out = tmp_path / "validation.json"
    # 0 or 1: whether the goal was reached depends on how busy the machine is, which is not for a test to say.
    assert main(["cpu", "model", "validate", "--budget", "60s", "--output", str(out), "--json"]) in (0, 1)
    data = json.loads(capsys.readouterr().out)
    assert len(data["points"]) == 2 and data["worst"]["burst"]["layers"] == 5
    found = load_validation(str(out))
    assert [f.burst for f in found.calibrated] == list(CALIBRATION)
    assert all(f.woken_s > 0 for f in found.calibrated) and found.model.woken_s > 0
    assert data["repeatability"] is None  # a single repeat says nothing of the next
    assert found.topology.allowed == tuple(sorted(os.sched_getaffinity(0)))
    if len(found.topology.allowed) < 4:
        assert found.model.transfers == ()


def test_a_validation_without_time_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate_module, "_REPEATS", ((0.0, 1),))
    monkeypatch.setattr(validate_module, "HELD_OUT", (Burst("flat", 7, 7),))
    monkeypatch.setattr(validate_module, "CORNERS", ())
    with pytest.raises(Exception, match="before a held-out burst ran"):
        validate(0.0)


def test_the_floor_is_what_two_halves_of_the_repeats_differ_by() -> None:
    (run,) = on_stage(Burst("flat", 2, 2))
    runs = [dataclasses.replace(run, wall_s=wall_s) for wall_s in (1.0, 1.2, 1.1, 1.3, 0.9)]
    assert validate_module.repeatability(runs) == pytest.approx(1 - 1.0 / 1.25)
    assert validate_module.repeatability(runs[:1]) is None


def test_a_bench_with_bursts_fits_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatmount.cpu.schedule._LEAST_FOR_BURSTS_S", 1.0)
    result = run_bench(8.0)
    model = fit(result)
    assert model.predict(Burst("per-layer", 100, 50)).seconds > model.predict(Burst("flat", 100, 50)).seconds


def test_a_burst_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["cpu", "burst", "--containers", "4", "--layers", "3", "--copies", "2", "--repeats", "2"]
    assert main([*arguments, "--admit", "2", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [b["burst"]["strategy"] for b in data["bursts"]] == list(STRATEGIES)
    assert main([*arguments, "--strategies", "flat"]) == 0
    assert "flat C=4 L=3 2 copies" in capsys.readouterr().out
