"""`flatmount storm`: many containers at once, by each strategy in turn, and what that does to the machine."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable

from flatmount.cli.common import open_store, run_directory, store_root_option, whole
from flatmount.cli.flatten import tell_if_not_ready
from flatmount.cli.image_demo import import_demo
from flatmount.cli.storm_engines import ROOTFS, add_engine_options, refuse_engine_options, run_engines
from flatmount.cli.storm_profile import with_locks
from flatmount.errors import EXIT_FAILED, EXIT_FINE, UsageError
from flatmount.plan.facts import HostFacts
from flatmount.report.html import page
from flatmount.report.text import render, wants_colour
from flatmount.rootfs.image import choose_for, probe_store, require_root
from flatmount.rootfs.mounting import recover
from flatmount.store import Store, StoredImage
from flatmount.storm.engine import run_storm
from flatmount.storm.results import Settings, StormReport
from flatmount.strategies import AUTO

COMPARED = ("per-layer", "common-parent", "detached", "flat")
DEMO = "demo"
DEMO_LAYERS = 60
_DESCRIPTION = """\
Assemble the root file systems of many containers of one image at once, each with user ids of its own, by each
strategy in turn; read a file and write one inside each before it counts as started. Runs in a mount namespace of its
own. Without IMAGE it takes the demo image, and makes it if need be.
"""
_EXAMPLES = """examples:
  flatmount storm demo --containers 200 --html storm.html
  flatmount storm demo --copies 2 --watchers 2 --background 1000
  flatmount storm demo --profile --html storm.html    # and what each strategy waits for, by lock
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "storm",
        help="start many containers at once by each strategy, and measure",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="an image of the store")
    parser.add_argument("--containers", default="100", metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--concurrency", metavar="C", help="how many at a time (default: all at once)")
    parser.add_argument(
        "--strategies",
        default=",".join(COMPARED),
        metavar="A,B,...",
        help=f"which, of {', '.join((*COMPARED, AUTO))} (default: %(default)s)",
    )
    parser.add_argument("--repeats", default="3", metavar="R", help="of the whole round (default: %(default)s)")
    parser.add_argument("--timeout", default="30", metavar="S", help="seconds after which a start failed (default: 30)")
    parser.add_argument("--copies", default="0", metavar="K", help="copies of the mount namespace for each container")
    parser.add_argument("--watchers", default="0", metavar="K", help="processes that re-read the table at each change")
    parser.add_argument("--background", default="0", metavar="M", help="mounts that are there before")
    parser.add_argument("--admit", metavar="K", help="let at most K be assembled at a time; the others wait")
    parser.add_argument(
        "--ranges",
        choices=("fresh", "ahead"),
        default="fresh",
        help="user namespaces made as part of a start, or before (default: %(default)s)",
    )
    parser.add_argument("--uppers", metavar="DIR", help="where uppers go (default: a tmpfs of the storm's own)")
    parser.add_argument("--on-host", action="store_true", help="mount in the host's table, for all to see")
    parser.add_argument("--profile", action="store_true", help="also record who waits for the mount locks, by strategy")
    add_engine_options(parser)
    parser.add_argument("--seed", metavar="N", help="picks the files that are read (default: made up, and printed)")
    parser.add_argument("--json", metavar="FILE", help="write everything measured as JSON; - for standard output")
    parser.add_argument("--html", metavar="FILE", help="write a page that shows it")
    store_root_option(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.engine != ROOTFS:
        if args.profile:
            raise UsageError("--profile is about strategies", hint="flatmount profile -- flatmount storm --engine ...")
        return run_engines(args, progress_line(), _image)
    refuse_engine_options(args)
    containers = whole(args.containers, "--containers", least=1, most=60000)
    seed = (
        random.SystemRandom().randrange(10**6) if args.seed is None else whole(args.seed, "--seed", least=0, most=10**9)
    )
    require_root("storm")
    for path in (args.json, args.html):
        if path not in (None, "-") and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise UsageError(f"{path}: its directory does not exist", hint="make it first")
    if args.uppers is not None and not os.path.isdir(args.uppers):
        raise UsageError(f"--uppers {args.uppers} is not a directory", hint="make it first")
    run = run_directory()
    progress = progress_line()
    with open_store(args, create=args.image is None) as store:
        for told in recover(run, store):
            print(f"flatmount: {told}", file=sys.stderr)
        image = _image(args, store, progress)
        facts = probe_store(store).facts
        strategies = _strategies(args.strategies, lambda: _auto(store, image, facts))
        settings = Settings(
            containers=containers,
            concurrency=whole(args.concurrency or args.containers, "--concurrency", least=1, most=4096),
            strategies=strategies,
            repeats=whole(args.repeats, "--repeats", least=1, most=1000),
            timeout_s=float(whole(args.timeout, "--timeout", least=1, most=3600)),
            copies=whole(args.copies, "--copies", least=0, most=16),
            watchers=whole(args.watchers, "--watchers", least=0, most=64),
            background=whole(args.background, "--background", least=0, most=90000),
            on_host=args.on_host,
            ranges=args.ranges,
            admit=None if args.admit is None else whole(args.admit, "--admit", least=1, most=4096),
            uppers=args.uppers or "tmpfs of the storm",
            store=store.root,
            seed=seed,
        )
        report = run_storm(store, image, settings, facts=facts, run=run, uppers=args.uppers, progress=progress)
        if args.profile:
            report = with_locks(report, store, image, facts=facts, run=run, uppers=args.uppers, progress=progress)
    progress("")
    _write(report, args.json, args.html)
    fine = not report.not_undone and not any(result.failed for result in report.results)
    return EXIT_FINE if fine else EXIT_FAILED


def _auto(store: Store, image: StoredImage, facts: HostFacts) -> str:
    choice = choose_for(AUTO, store, image, facts)
    tell_if_not_ready(AUTO, choice, store, image)
    return choice.name


def _strategies(text: str, auto: Callable[[], str]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(auto() if name == AUTO else name for name in text.split(",")))
    for name in names:
        if name not in COMPARED:
            raise UsageError(f"the storm does not compare {name!r}", hint=f"it takes {', '.join((*COMPARED, AUTO))}")
    return names


def _image(args: argparse.Namespace, store: Store, progress: Callable[[str], None]) -> StoredImage:
    if args.image is not None:
        return store.image(args.image)
    known = next((image for image in store.images() if image.name == DEMO), None)
    return known or import_demo(store, layers=DEMO_LAYERS, name=DEMO, progress=progress)


def _write(report: StormReport, json_path: str | None, html_path: str | None) -> None:
    if json_path == "-":
        json.dump(report.to_json(), sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        width = shutil.get_terminal_size((120, 24)).columns
        print(render(report, width=width, colour=wants_colour(sys.stdout)))
        print(f"seed {report.settings.seed}")
    if json_path not in (None, "-"):
        with open(json_path, "w", encoding="utf-8") as file:
            json.dump(report.to_json(), file, indent=1)
    if html_path is not None:
        with open(html_path, "w", encoding="utf-8") as file:
            file.write(page(report))
        print(f"the page is {os.path.abspath(html_path)}", file=sys.stderr if json_path == "-" else sys.stdout)


def progress_line() -> Callable[[str], None]:
    """Something that tells a terminal what is going on, on one line that the next overwrites."""
    if not sys.stderr.isatty():
        return lambda text: None
    begun = time.monotonic()

    def show(text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        line = f"{time.monotonic() - begun:6.1f} s  {text}"[:width] if text else ""
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()

    return show
