"""Storms of real containers, as far as they are data: messages, results, and the text a person gets."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatmount.errors import FlatmountError
from flatmount.report.starts import page, render
from flatmount.storm.engines.containerd import field, fields
from flatmount.storm.results import HostFacts, ImageFacts, LatencyMs, ProbeMs
from flatmount.storm.starts_results import Skipped, StartSettings, StartsReport, WaveResult


@given(st.lists(st.tuples(st.integers(1, 40), st.one_of(st.binary(min_size=1), st.integers(1, 1 << 60)))))
def test_what_is_written_as_a_message_is_read_again(entries: list[tuple[int, bytes | int]]) -> None:
    message = b"".join(field(number, value) for number, value in entries)
    for wanted in {number for number, _ in entries}:
        expected = [value for number, value in entries if number == wanted and isinstance(value, bytes)]
        assert list(fields(message, wanted)) == expected


def test_messages_are_the_bytes_that_others_write() -> None:
    assert field(1, "testing") == bytes.fromhex("0a0774657374696e67")
    assert field(1, 150) == bytes.fromhex("089601")
    assert field(3, "") == field(3, 0) == b""
    with pytest.raises(FlatmountError):
        list(fields(b"\x0b", 1))


def wave(engine: str, number: int, running: int, p50: float) -> WaveResult:
    latencies = LatencyMs.of([p50])
    return WaveResult(
        engine=engine, repeat=0, wave=number, running_before=running, containers=1, failed=0, failures=(), wall_s=1.0,
        starts_per_s=1.0, latency_ms=latencies, probe_ms=ProbeMs.of([2.0]), mounts_before=3, mounts_standing=4,
        undo_s=None, latencies_ms=(p50,),
    )  # fmt: skip


def test_a_report_has_a_line_for_each_engine_and_wave_and_names_what_was_left_out() -> None:
    settings = StartSettings(("flatmount", "podman"), 1, 1, 2, 1, True, 0, 30.0, False, True, "/store")
    report = StartsReport(
        "2026-01-31T12:00:00Z",
        HostFacts("6", "x86_64", "c", 2, 1, "3", "0"),
        ImageFacts("tiny", 5, 7),
        settings,
        (Skipped("podman", "there is no podman; install podman"),),
        (wave("flatmount", 0, 0, 50.0), wave("flatmount", 1, 1, 55.0)),
        16,
        ("flatmount: c1 could not be ended: <busy>",),
    )
    lines = render(report).splitlines()
    assert [line.split()[:4] for line in lines if line.startswith("flatmount")] == [
        ["flatmount", "0", "1.0", "50.0"],
        ["flatmount", "1", "1.0", "55.0"],
    ]
    assert "podman was left out: there is no podman; install podman" in lines
    assert "the runtime of flatmount started in copies of 16 mounts" in lines
    assert "left behind: flatmount: c1 could not be ended: <busy>" in lines
    assert "<h2>Left behind</h2><ul><li>flatmount: c1 could not be ended: &lt;busy&gt;</li></ul>" in page(report)
    assert StartsReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert json.loads(json.dumps(report.to_json()))["schema"] == "flatmount.starts/1"
