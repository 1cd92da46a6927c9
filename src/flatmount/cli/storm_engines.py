"""`flatmount storm --engine`: real containers in place of root file systems."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable

from flatmount.cli.common import open_store, root_directory, run_directory, whole
from flatmount.cli.containers import recovered
from flatmount.errors import EXIT_FAILED, EXIT_FINE, UsageError
from flatmount.report.starts import page, render
from flatmount.rootfs.image import probe_store, require_root
from flatmount.rootfs.mounting import recover
from flatmount.store import Store, StoredImage
from flatmount.storm.starts import NAMES, run_starts
from flatmount.storm.starts_results import StartSettings, StartsReport

ROOTFS = "rootfs"
Progress = Callable[[str], None]


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add `--engine` and what belongs to it."""
    parser.add_argument(
        "--engine",
        default=ROOTFS,
        metavar="A,B,...",
        help=f"start real containers, up to their first instruction, by engines of {', '.join(NAMES)}; those that are "
        "not installed are left out and named (default: %(default)s, no containers)",
    )
    parser.add_argument("--waves", metavar="W", help="with --engine: so many times --containers (default: 1)")
    parser.add_argument("--hold", action="store_true", help="with --engine: keep them running while later waves start")
    parser.add_argument("--no-probe", action="store_true", help="with --engine: no health check beside the containers")
    parser.add_argument("--layout", metavar="DIR", help="the image as an OCI layout, for containerd and podman")
    parser.add_argument("--containerd", metavar="DIR", help="other binaries of containerd than those on PATH")


def refuse_engine_options(args: argparse.Namespace) -> None:
    """Options that say something about real containers, where there are none. Raises: UsageError."""
    for name in ("waves", "hold", "no_probe", "layout", "containerd"):
        if getattr(args, name):
            raise UsageError(
                f"--{name.replace('_', '-')} is about real containers", hint=f"--engine, of {', '.join(NAMES)}"
            )


def run_engines(
    args: argparse.Namespace,
    progress: Progress,
    image_of: Callable[[argparse.Namespace, Store, Progress], StoredImage],
) -> int:
    """Run the storm and show what it measured."""
    if args.html is not None and not os.path.isdir(os.path.dirname(os.path.abspath(args.html))):
        raise UsageError(f"{args.html}: its directory does not exist", hint="make it first")
    containers = whole(args.containers, "--containers", least=1, most=10000)
    settings = StartSettings(
        engines=tuple(dict.fromkeys(args.engine.split(","))),
        containers=containers,
        concurrency=whole(args.concurrency or args.containers, "--concurrency", least=1, most=1024),
        waves=whole(args.waves or "1", "--waves", least=1, most=10000),
        repeats=whole(args.repeats, "--repeats", least=1, most=1000),
        hold=args.hold,
        background=whole(args.background, "--background", least=0, most=90000),
        timeout_s=float(whole(args.timeout, "--timeout", least=1, most=3600)),
        on_host=args.on_host,
        probe=not args.no_probe,
        store=root_directory(args),
    )
    require_root("storm")
    if args.layout is not None and not os.path.isfile(os.path.join(args.layout, "oci-layout")):
        raise UsageError(f"--layout {args.layout} is no OCI layout", hint="name a directory with oci-layout in it")
    run = run_directory()
    with open_store(args, create=args.image is None) as store:
        for told in recover(run, store):
            print(f"flatmount: {told}", file=sys.stderr)
        recovered(store)
        report = run_starts(
            store,
            image_of(args, store, progress),
            settings,
            facts=probe_store(store).facts,
            run=run,
            layout=None if args.layout is None else os.path.abspath(args.layout),
            containerd=args.containerd,
            progress=progress,
        )
    progress("")
    _write(report, args.json)
    if args.html is not None:
        with open(args.html, "w", encoding="utf-8") as file:
            file.write(page(report))
    fine = report.waves and not report.left and not any(wave.failed for wave in report.waves)
    return EXIT_FINE if fine else EXIT_FAILED


def _write(report: StartsReport, path: str | None) -> None:
    if path == "-":
        json.dump(report.to_json(), sys.stdout, indent=1)
        sys.stdout.write("\n")
        return
    sys.stdout.write(render(report))
    if path is not None:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(report.to_json(), file, indent=1)
