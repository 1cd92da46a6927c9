"""`flatmount watch`: a node's mounts as they come and go, who makes them, and what that costs."""

from __future__ import annotations

import argparse
import http.server
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus

from flatmount.cli.profile import seconds_of
from flatmount.errors import EXIT_FINE, FlatmountError, UsageError
from flatmount.observe.watch import Watch
from flatmount.observe.watch_results import Sample
from flatmount.report.watch import Screen, one_line, prometheus

_CLEAR = "\x1b[H\x1b[2J"
_EXAMPLES = """\
examples:
  flatmount watch
  flatmount watch --jsonl --for 1m > minute.jsonl
  flatmount watch --prometheus :9477
  flatmount watch --textfile /var/lib/node_exporter/flatmount.prom --interval 15
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "watch",
        help="mounts as they come and go, and who makes them",
        description="Show once a second the length of the mount table, its changes, who causes them by process, "
        "container and pod, waits for the mount locks, and PID 1's processor time. Changes nothing; sees more as root.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--interval", default="1s", metavar="TIME", help="between two looks (default: 1s)")
    parser.add_argument("--for", dest="period", metavar="TIME", help="end after this time")
    parser.add_argument("--jsonl", action="store_true", help="one JSON object a line")
    parser.add_argument("--prometheus", metavar="[ADDRESS]:PORT", help="serve /metrics (without an address: locally)")
    parser.add_argument("--textfile", metavar="FILE", help="write for node_exporter's textfile collector")
    parser.add_argument("--no-locks", action="store_true", help="leave waits for the mount locks out")
    parser.set_defaults(run=_run)


class _Latest:
    """The text of the last sample, for whoever asks over the network."""

    def __init__(self) -> None:
        self.text = ""


def _run(args: argparse.Namespace) -> int:
    interval = seconds_of(args.interval, "--interval")
    period = seconds_of(args.period, "--for") if args.period else None
    address = _address(args.prometheus) if args.prometheus else None
    if args.textfile and not os.path.isdir(os.path.dirname(os.path.abspath(args.textfile))):
        raise UsageError(f"{args.textfile}: its directory does not exist", hint="make it first")
    latest, screen = _Latest(), Screen()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service manager ends us so; nothing may be left
    quiet = bool(args.prometheus or args.textfile) and not args.jsonl
    with _served(address, latest), Watch(locks=not args.no_locks) as watch:
        due = time.monotonic()
        until = None if period is None else due + period
        try:
            while until is None or due < until:
                due += interval
                time.sleep(max(0.0, min(due, until or due) - time.monotonic()))
                sample = watch.sample()
                _tell(sample, args, latest, None if quiet else screen)
        except KeyboardInterrupt:
            return EXIT_FINE
    return EXIT_FINE


def _tell(sample: Sample, args: argparse.Namespace, latest: _Latest, screen: Screen | None) -> None:
    if args.prometheus or args.textfile:
        latest.text = prometheus(sample)
    if args.textfile:
        draft = f"{args.textfile}.{os.getpid()}"
        try:
            with open(draft, "w", encoding="utf-8") as file:
                file.write(latest.text)
            os.replace(draft, args.textfile)
        except BaseException:  # a signal ends us at any line
            with suppress(FileNotFoundError):
                os.unlink(draft)
            raise
    if args.jsonl:
        json.dump(sample.to_json(), sys.stdout)
        sys.stdout.write("\n")
    elif screen is not None and sys.stdout.isatty():
        sys.stdout.write(_CLEAR + screen.draw(sample, shutil.get_terminal_size((100, 24)).columns))
    elif screen is not None:
        sys.stdout.write(one_line(sample) + "\n")
    sys.stdout.flush()


@contextmanager
def _served(address: tuple[str, int] | None, latest: _Latest) -> Iterator[None]:
    if address is None:
        yield
        return

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 5

        def do_GET(self) -> None:
            found = self.path.partition("?")[0] == "/metrics"
            body = latest.text.encode() if found else b"/metrics\n"
            self.send_response(HTTPStatus.OK if found else HTTPStatus.NOT_FOUND)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *values: object) -> None:
            """Say nothing: the page is on the same terminal."""

    try:
        server = http.server.ThreadingHTTPServer(address, Handler)
    except OSError as error:
        raise FlatmountError(
            f"listen on {address[0]}:{address[1]}: {error.strerror}", hint="name another port"
        ) from error
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 1.0}, daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"--prometheus {text!r} is not [ADDRESS]:PORT", hint="write :9477 or 0.0.0.0:9477")
    return host.strip("[]") or "127.0.0.1", int(port)
