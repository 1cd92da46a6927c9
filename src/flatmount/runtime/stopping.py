"""Ending a container in order: its signal, some time, and then by force."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

from flatmount.runtime.oci import signal_number
from flatmount.runtime.records import Containers, Record, State
from flatmount.runtime.starter import kill

_LIVES = (State.RUNNING, State.CREATING)
_POLL_S = 0.01


def stop(containers: Containers, record: Record, *, seconds: float = 10.0, number: int | None = None) -> None:
    """Send the container's first process its stop signal; after `seconds` kill everything in it.

    Returns when its end is written down; one that ended already is fine. Raises: FlatmountError.
    """
    if containers.state(record) not in _LIVES:
        return
    pid = containers.pid(record)
    if pid is not None:
        _send(containers, record, pid, signal_number(record.stop_signal) if number is None else number)
        deadline = time.monotonic() + seconds
        while containers.state(record) in _LIVES and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    if containers.state(record) in _LIVES:
        kill(containers, record)


def _send(containers: Containers, record: Record, pid: int, number: int) -> None:
    """To that process and no later one of the same pid: it is still the container's if the shim waits for it."""
    with suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            if containers.state(record) is State.RUNNING:
                signal.pidfd_send_signal(fd, number)
        finally:
            os.close(fd)
