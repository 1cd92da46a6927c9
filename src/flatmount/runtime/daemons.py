"""Daemons that a trace or a proof starts for itself, with their output in a file."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

from flatmount.errors import FlatmountError

_START_S = 30.0


def start_program(
    command: Sequence[str], log: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a daemon whose output goes to the file `log`. The process is the caller's to end."""
    with open(log, "wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=environment)


def wait_for(there: Callable[[], bool], process: subprocess.Popen[bytes], log: str) -> None:
    """Wait until a daemon is there. Raises: FlatmountError with its last line, when it ends or takes too long."""
    deadline = time.monotonic() + _START_S
    while not there():
        if process.poll() is not None or time.monotonic() > deadline:
            with open(log, encoding="utf-8", errors="replace") as file:
                said = file.read().strip().splitlines()
            raise FlatmountError(f"it does not start: {said[-1] if said else 'it said nothing'}", hint=f"see {log}")
        time.sleep(0.02)


def end_program(process: subprocess.Popen[bytes]) -> None:
    """End a daemon, and wait for it."""
    process.terminate()
    try:
        process.wait(_START_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
