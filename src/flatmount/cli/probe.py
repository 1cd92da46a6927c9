"""`flatmount probe`: what this host can do, each feature tried."""

from __future__ import annotations

import argparse
import os
import tempfile

from flatmount.cli.common import print_json, root_directory, store_options
from flatmount.errors import EXIT_FAILED, EXIT_FINE, FlatmountError
from flatmount.kernel.probes import Probes, probe
from flatmount.strategies import AUTO, choose


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "probe",
        help="what this kernel and the store's file system can do",
        description="Try each feature in a mount namespace that is thrown away. "
        "Id-mapped mounts are tried on the store's file system (or where the store would be).",
        epilog="example: flatmount probe --root /srv/flatmount",
    )
    store_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    probes = _probe_at(root_directory(args))
    try:
        choice = choose(AUTO, probes.facts, flat_ready=True, layers=1)
        strategy, reason = choice.name, choice.reason
    except FlatmountError as error:
        strategy, reason = "", error.line()
    if args.json:
        features = {
            feature.name: {"available": feature.available, "since": feature.since, "said": feature.said}
            for feature in probes.features
        }
        print_json(
            "probe", {"directory": probes.directory, "features": features, "auto": strategy or None, "reason": reason}
        )
    else:
        print(f"on {probes.directory}")
        for feature in probes.features:
            said = f"  {feature.said}" if feature.said else ""
            print(f"  {'yes' if feature.available else 'no ':<4}{feature.title:<48} Linux {feature.since}{said}")
        print(f"auto takes {strategy}: {reason}" if strategy else reason)
    return EXIT_FINE if strategy else EXIT_FAILED


def _probe_at(root: str) -> Probes:
    """Probe in the store, or beside where it would be: in a directory made for it in the nearest parent there is."""
    data = os.path.join(root, "v1", "data")
    if os.path.isdir(data):
        return probe(data)
    while not os.path.isdir(root):
        root = os.path.dirname(root)
    with tempfile.TemporaryDirectory(prefix=".flatmount-probe-", dir=root) as directory:
        return probe(directory)
