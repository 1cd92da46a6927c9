"""The process: socket, signals, readiness, watchdog, metrics. Started, killed and started again at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import shutil
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from flatmount.config import Snapshotter
from flatmount.errors import FlatmountError, MissingFeature, UsageError
from flatmount.kernel.probes import probe
from flatmount.plan.facts import HostFacts
from flatmount.rootfs.workplace import ensure_run_directory
from flatmount.snapshotter._front import BOUNDS_S
from flatmount.snapshotter.activation import inherited_socket, notify, watchdog_s
from flatmount.snapshotter.metrics import exposition
from flatmount.snapshotter.model import Form
from flatmount.snapshotter.service import Service
from flatmount.snapshotter.snapshots import HELPER, Snapshots
from flatmount.store.database import Database
from flatmount.store.disk import Disk
from flatmount.store.reserve import Reserve

log = logging.getLogger("flatmount.snapshotter")

# A stop may take a second altogether, and the book and the server need some of it.
_GRACE_S = 0.4
_HEALTH_EVERY_S = 5.0
_BACKLOG = 1024
# The event loop and the book's threads take turns at the interpreter's lock; at its own 5 ms each turn of one is a wait
# that a client notices.
_SWITCH_EVERY_S = 0.001
_GARBAGE_AFTER = 20_000
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, message, and whatever else the record carries."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        seconds, rest = divmod(record.created, 1)
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(rest * 1000):03}Z"
        line = {"time": when, "level": record.levelname.lower(), "msg": record.getMessage()}
        line |= {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a service is: its store, its run directory and its socket, all absolute."""

    root: str
    run: str
    socket: str


def run(place: Place, settings: Snapshotter) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code. No mount is undone at the end.

    Raises: FlatmountError, when it cannot begin.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger("flatmount")
    root.addHandler(handler)
    root.setLevel(settings.log_level.upper())
    try:
        code = asyncio.run(_serve(place, settings))
        if any(thread.name.startswith("work") for thread in threading.enumerate()):
            # A tree that is deleted or merged this moment may take minutes, and the interpreter would wait for it.
            # What it leaves is what a kill leaves, and the next start takes that away.
            handler.flush()
            os._exit(code)
        return code
    finally:
        root.removeHandler(handler)


async def _serve(place: Place, settings: Snapshotter) -> int:
    sys.setswitchinterval(_SWITCH_EVERY_S)
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    ensure_run_directory(place.run)
    disk = await asyncio.to_thread(lambda: Disk.open(place.root, create=True))
    try:
        path, reserve = os.path.join(disk.base, "state.db"), Reserve(disk.base)
        await asyncio.to_thread(lambda: Database.create(path, reserve=reserve).close())
        facts = (await asyncio.to_thread(probe, disk.data)).facts
        if not facts.idmapped_layers:
            log.warning("this host cannot id-map layers: containers with a user range of their own will be refused")
        form, reason = chosen_form(settings.form, facts, shutil.which("mount.fuse3", path=_helper_path()))
        snapshots = Snapshots(disk, place.run, facts, form)
        await snapshots.start()
        service = Service(snapshots, settings.deadline_s)
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(_serving(service, place.socket))
            if settings.metrics:
                await stack.enter_async_context(await _metrics_server(settings.metrics, service, snapshots))
            tending = asyncio.create_task(_tend(service, snapshots))
            stack.callback(tending.cancel)
            # What there is now stays; looking through it for garbage again and again would make calls wait.
            gc.freeze()
            gc.set_threshold(_GARBAGE_AFTER)
            notify("READY=1\nSTATUS=serving")
            log.info("serving", extra={"socket": place.socket, "store": place.root, "form": form.value, "why": reason})
            await stopping.wait()
            notify("STOPPING=1")
            log.info("stopping")
        await snapshots.close()
    finally:
        disk.close()
    return 0


def chosen_form(name: str, facts: HostFacts, mount_fuse3: str | None) -> tuple[Form, str]:
    """The form that a configuration names, and why: `auto` takes the cheapest that works here.

    That is `overlay` wherever any form works: docs/containerd.md has the figures, and it needs the least of the kernel
    (overlayfs over id-mapped layers, 5.19, which the others need as well). Without that no form has user ranges, and
    `overlay` serves the containers that have none.

    Args:
        mount_fuse3: where the program is that containerd runs for `helper`; None where it is not.

    Raises: UsageError; MissingFeature for `helper` without what runs it.
    """
    if name == "auto":
        if facts.idmapped_layers:
            return Form.OVERLAY, "layers can be id-mapped here, and it is the cheapest by measurement"
        return Form.OVERLAY, "layers cannot be id-mapped here: only containers without a user range will start"
    try:
        form = Form(name)
    except ValueError:
        raise UsageError(f"there is no form {name!r}", hint="one of auto, overlay, bind, helper") from None
    if form is Form.HELPER and mount_fuse3 is None:
        raise MissingFeature("mount.fuse3 is not on PATH", hint="install fuse3, or take another form")
    if form is Form.HELPER and not os.access(HELPER, os.X_OK):
        raise MissingFeature(f"{HELPER} cannot be executed", hint="install flatmount again, or take another form")
    return form, "configured"


def _helper_path() -> str:
    # containerd runs it, from a PATH that may have less than ours or more; where mount(8)'s helpers are is known.
    return os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))


@contextlib.asynccontextmanager
async def _serving(service: Service, path: str) -> AsyncIterator[None]:
    """Serve on the socket that systemd holds for us, or on one of our own at `path`, for root only.

    systemd's outlives the process, so that clients wait while it is restarted instead of being refused.
    """
    given = inherited_socket()
    listening = given if given is not None else _own_socket(path)
    try:
        service.serve(listening)
    except OSError as error:
        listening.close()
        raise FlatmountError(f"cannot serve on {path}: {error.strerror}") from error
    try:
        yield
    finally:
        if given is None:
            # Nobody new, while what runs comes to its end.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        await service.close(_GRACE_S)


def _own_socket(path: str) -> socket.socket:
    _clear_socket(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(listening.fileno(), 0o600)  # what the file that bind(2) makes has; a umask would be every thread's
        listening.bind(path)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise FlatmountError(
            f"cannot listen on {path}: {error.strerror or error}", hint="is its directory there, and writable?"
        ) from error
    return listening


def _clear_socket(path: str) -> None:
    """Remove a socket that nobody listens on any more. Raises: UsageError for anything else at that path."""
    os.makedirs(os.path.dirname(path), mode=0o711, exist_ok=True)
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise UsageError(f"{path} exists and is no socket", hint="name another --socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as knock:
        try:
            knock.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise UsageError(f"somebody listens on {path} already", hint="stop that process, or name another --socket")


async def _tend(service: Service, snapshots: Snapshots) -> None:
    """Keep the watchdog fed while the event loop turns, and the health service honest about the disk."""
    every_s = min(_HEALTH_EVERY_S, watchdog_s() or _HEALTH_EVERY_S)
    checking: asyncio.Task[None] | None = None
    while True:
        notify("WATCHDOG=1")
        if checking is None or checking.done():
            if checking is not None and not checking.cancelled():
                service.healthy = checking.exception() is None
            checking = asyncio.create_task(snapshots.check())
            await asyncio.wait([checking], timeout=every_s)
        healthy = checking.done() and checking.exception() is None
        if healthy is not service.healthy:
            log.warning("the store answers again" if healthy else "the store does not answer")
            service.healthy = healthy
        await asyncio.sleep(every_s)


async def _metrics_server(address: str, service: Service, snapshots: Snapshots) -> asyncio.Server:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"metrics address {address!r} is not HOST:PORT", hint="as in 127.0.0.1:9400")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(TimeoutError, ConnectionError, ValueError, asyncio.IncompleteReadError):
            request = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            wanted = request.split(b" ", 2)[1:2] == [b"/metrics"]
            body = (_exposition(service, snapshots) if wanted else "see /metrics\n").encode()
            status = b"200 OK" if wanted else b"404 Not Found"
            head = b"HTTP/1.1 %b\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: %d\r\n"
            writer.write(head % (status, len(body)) + b"Connection: close\r\n\r\n" + body)
            await asyncio.wait_for(writer.drain(), 5)
        writer.close()

    return await asyncio.start_server(answer, host, int(port))


def _exposition(service: Service, snapshots: Snapshots) -> str:
    gauges: dict[str, tuple[str, dict[str, float]]] = {
        "range_mounts": ("id-mapped trees attached, one for each user range", {"": snapshots.ranges.attached}),
        "root_mounts": ("root file systems assembled and attached", {"": snapshots.roots.mounted}),
        "flat_trees": ("chains that have a flat tree", {"": len(snapshots.flattening.flats)}),
        "flat_trees_failed": ("flat trees that could not be made", {"": snapshots.flattening.failed}),
    }
    gauges["snapshots"] = ("snapshots by kind", {f'{{kind="{k}"}}': n for k, n in snapshots.counts().items()})
    return exposition(service.answered(), BOUNDS_S, gauges)
