"""systemd's side of a service: the socket it holds for us, readiness, and the watchdog.

See: sd_listen_fds(3), sd_notify(3).
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

_FIRST = 3


def inherited_socket() -> socket.socket | None:
    """The listening socket that systemd passed, ours to close; None when there is none."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS", "0") == "0":
        return None
    os.set_inheritable(_FIRST, False)
    return socket.socket(fileno=_FIRST)


def notify(state: str) -> None:
    """Tell the service manager, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender, suppress(OSError):
            sender.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)


def watchdog_s() -> float | None:
    """How often the watchdog wants to hear of us: a third of its limit."""
    limit = os.environ.get("WATCHDOG_USEC", "")
    return int(limit) / 3e6 if limit.isdigit() and int(limit) else None
