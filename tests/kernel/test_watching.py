"""Watching mounts that are made for it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from flatmount.cli.main import main
from flatmount.errors import MissingFeature
from flatmount.observe import watch as watch_module
from flatmount.observe.lock_watch import LockWatch
from flatmount.observe.watch import Watch
from tests.waiting import until

# Six processes that attach and detach in one table, until they are killed with their parent.
CONTENDED = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
for number in range(6):
    point = f"{sys.argv[1]}/{number}"
    os.mkdir(point)
    if number < 5 and os.fork():
        continue
    libc.prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    while os.path.exists(sys.argv[1]):
        libc.mount(b"none", point.encode(), b"tmpfs", 0, None)
        libc.umount2(point.encode(), 2)
"""


def test_events_peak_and_who_causes_them(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "MOST_CAUSES", 1000)  # whoever else is busy on this machine
    script = f"cd {ram}; mkdir a; for i in 1 2 3 4 5; do mount -t tmpfs x a; done; umount a"
    with Watch(locks=False) as watch:
        subprocess.run(["sh", "-c", script], check=True)
        sample = watch.sample()
    subprocess.run(["umount", "-q", *([ram / "a"] * 4)], check=True)
    assert (sample.attached, sample.detached, sample.polled) == (5, 1, False)
    rates: Counter[str] = Counter()
    for cause in sample.causes or ():
        rates[cause.process] += round(cause.operations_per_s * sample.seconds)
    assert rates["mount"] >= 5 and rates["umount"] >= 1
    assert sample.lost == 0 and sample.unseen == ()
    assert sample.init_cpu_share is not None


def test_without_events_two_looks_are_compared(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise MissingFeature("count mount events: Invalid argument", hint="it takes Linux 6.15")

    monkeypatch.setattr(watch_module, "MountEvents", refuse)
    with Watch(locks=False) as watch:
        subprocess.run(["mount", "-t", "tmpfs", "x", ram], check=True)
        sample = watch.sample()
        subprocess.run(["umount", ram], check=True)
        again = watch.sample()
    assert sample.polled and (sample.attached, again.detached) == (1, 1)
    assert "two looks are compared" in sample.unseen[0]


def test_mount_locks_are_learned_and_counted_without_stacks(ram: Path) -> None:
    churned = ram / "churn"
    churned.mkdir()
    locks = LockWatch()
    command = [sys.executable, "-c", CONTENDED, str(ram / "churn")]
    with subprocess.Popen(command) as churn:
        try:
            deadline, seen = time.monotonic() + 60, 0
            while not seen and time.monotonic() < deadline:
                # A lesson is due five times a minute at most; here each call may have one.
                locks._lessons.clear()
                time.sleep(0.2)
                seen = sum(one.waits for one in locks.sample(time.monotonic(), busy=True) or ())
        finally:
            churned.rename(ram / "stop")
            locks.close()
            churn.wait(30)
    assert seen


def test_metrics_over_http_and_as_a_file(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = tmp_path / "flatmount.prom"
    command = [sys.executable, "-m", "flatmount", "watch", "--interval", "0.2s", "--prometheus", f":{port}"]
    with subprocess.Popen([*command, "--textfile", str(path)], stdout=subprocess.PIPE) as watch:
        try:
            until(path.exists)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
                text = answer.read().decode()
        finally:
            watch.terminate()
            out, _ = watch.communicate(timeout=60)
    assert "flatmount_mounts " in text and "flatmount_mounts " in path.read_text()
    assert (watch.returncode, out) == (0, b"")
    assert [one.name for one in tmp_path.iterdir()] == ["flatmount.prom"]


def test_a_signal_in_the_middle_of_a_file_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(draft: str, path: str) -> None:
        assert Path(draft).exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["watch", "--textfile", str(tmp_path / "flatmount.prom"), "--interval", "0.1s", "--no-locks"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert list(tmp_path.iterdir()) == []


def test_lines_of_json() -> None:
    command = [sys.executable, "-m", "flatmount", "watch", "--jsonl", "--interval", "0.2s", "--for", "0.5s"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    samples = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(samples) == 3
    assert all(sample["mounts"] > 0 for sample in samples)
