"""`flatmount probe`: what this host can do, each feature tried."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from typing import Any

from flatmount.cli.common import print_json, root_directory, run_directory, store_options
from flatmount.errors import EXIT_FAILED, EXIT_FINE, FlatmountError
from flatmount.kernel.mounts import mount_count
from flatmount.kernel.namespaces import small_source
from flatmount.kernel.probes import Probes, probe
from flatmount.runtime.oci import DEFAULT
from flatmount.runtime.template import MOST_MOUNTS, make
from flatmount.strategies import AUTO, choose


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "probe",
        help="what this kernel and the store's file system can do",
        description="Try each feature in a mount namespace that is thrown away. "
        "Id-mapped mounts are tried on the store's file system (or where the store would be). Then say how many mounts "
        "the small mount namespace has in which `run` starts a runtime, and what it is made from.",
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
            "probe",
            {
                "directory": probes.directory,
                "features": features,
                "auto": strategy or None,
                "reason": reason,
                "private": _private_facts(),
            },
        )
    else:
        print(f"on {probes.directory}")
        for feature in probes.features:
            said = f"  {feature.said}" if feature.said else ""
            print(f"  {'yes' if feature.available else 'no ':<4}{feature.title:<48} Linux {feature.since}{said}")
        print(f"auto takes {strategy}: {reason}" if strategy else reason)
        print(_private_words(_private_facts()))
    return EXIT_FINE if strategy else EXIT_FAILED


def _private_facts() -> dict[str, Any]:
    """What a private attachment takes here. Makes a template namespace and lets it go."""
    run = run_directory()
    while not os.path.isdir(run):
        run = os.path.dirname(run)
    runtime = shutil.which(os.environ.get("FLATMOUNT_RUNTIME", DEFAULT))
    source = small_source()
    facts = {"mounts": None, "most": MOST_MOUNTS - 1, "copies_host_table": source is None, "said": ""}
    if source is not None:
        source.close()
    try:
        template = make((run, *([os.path.realpath(runtime)] if runtime else [])))
    except FlatmountError as error:
        return {**facts, "said": error.line()}
    template.namespace.close()
    return {**facts, "mounts": template.mounts}


def _private_words(facts: dict[str, Any]) -> str:
    if facts["mounts"] is None:
        return f"run cannot attach privately: {facts['said']}"
    cost = "made without a copy of the host's table"
    if facts["copies_host_table"]:
        cost = (
            f"after a copy of the host's {mount_count()} for each command: the kernel's thread kdevtmpfs is not shown"
        )
    return f"run attaches privately in copies of {facts['mounts']} mounts (at most {facts['most']}), {cost}"


def _probe_at(root: str) -> Probes:
    """Probe in the store, or beside where it would be: in a directory made for it in the nearest parent there is."""
    data = os.path.join(root, "v1", "data")
    if os.path.isdir(data):
        return probe(data)
    while not os.path.isdir(root):
        root = os.path.dirname(root)
    with tempfile.TemporaryDirectory(prefix=".flatmount-probe-", dir=root) as directory:
        return probe(directory)
