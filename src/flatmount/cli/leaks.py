"""`flatmount leaks`: mounts and mount namespaces that are left, who holds them, and taking them off if told."""

from __future__ import annotations

import argparse
import os

from flatmount.cli.common import json_option, print_json
from flatmount.errors import EXIT_FAILED, EXIT_FINE
from flatmount.observe.leak_results import Cleaned, Found, Kind
from flatmount.observe.leaks import clean, find_leaks
from flatmount.report.leaks import as_data, render_leaks
from flatmount.rootfs.image import require_root

_EXAMPLES = """\
examples:
  flatmount leaks           # look, change nothing
  flatmount leaks --clean   # take off temporary mounts that two looks a second apart have in common

What containerd works on a layer in (containerd-mount*) may stay for minutes: it is named after ten, and never taken
off by --clean. Restart containerd, which takes them off when it starts.

--clean only ever calls umount2, without MNT_DETACH: no file can be deleted, and what is in use stays. It enters other
mount namespaces that hold such mounts for this one call, and runs nothing in there.
exit code: 0 nothing is left (any more), 1 something is
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "leaks",
        help="mounts and namespaces nobody owns any more",
        description="Look twice, a second apart, for temporary mounts of assemblies that are long over, and for mount "
        "namespaces nobody is in; name who holds each. Without --clean nothing is changed.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clean", action="store_true", help="take off what is left, in this mount table and in others")
    json_option(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.clean:
        require_root("leaks --clean")
    found = find_leaks()
    cleaned = clean(found.leaks) if args.clean else None
    if args.json:
        print_json("leaks", as_data(found, cleaned))
    else:
        print(render_leaks(found, cleaned, may_clean=os.geteuid() == 0), end="")
    return EXIT_FAILED if _left(found, cleaned) else EXIT_FINE


def _left(found: Found, cleaned: tuple[Cleaned, ...] | None) -> bool:
    if cleaned is not None:
        return any(one.refused for one in cleaned) or any(leak.kind is Kind.LAYER_WORK for leak in found.leaks)
    return any(leak.kind is not Kind.NAMESPACE for leak in found.leaks)
