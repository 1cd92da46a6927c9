"""systemd's side of a service: the socket it holds for us, readiness, and the watchdog.

See: sd_listen_fds(3), sd_notify(3).
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress

_FIRST = 3
_CHUNK = 1 << 16


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


class Relay:
    """Hands connections of an inherited socket on to the server's own.

    gRPC's server cannot take over a listening descriptor. The inherited socket outlives the process, so that clients
    wait while it is restarted instead of being refused.
    """

    def __init__(self, listening: socket.socket, path: str) -> None:
        """Take over `listening`; the server listens at `path`."""
        self._listening = listening
        self._path = path
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Begin to accept."""
        self._server = await asyncio.start_unix_server(self._serve, sock=self._listening)

    async def close(self) -> None:
        """Accept no more and drop what is open. The socket stays systemd's."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        with suppress(OSError, asyncio.CancelledError):
            to_server_reader, to_server = await asyncio.open_unix_connection(self._path)
            try:
                await asyncio.gather(_copy(reader, to_server), _copy(to_server_reader, writer))
            finally:
                to_server.close()
        writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    with suppress(OSError):
        writer.write_eof()
