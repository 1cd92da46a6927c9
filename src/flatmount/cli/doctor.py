"""`flatmount doctor`: is it this node's mounts, whose fault is it, and what to do."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time

from flatmount.cli.common import json_option
from flatmount.errors import EXIT_FAILED, EXIT_FINE, FlatmountError, UsageError
from flatmount.observe.doctor.checks import diagnose
from flatmount.observe.doctor.engine_checks import image_costs
from flatmount.observe.doctor.findings import Diagnosis, verdict
from flatmount.observe.doctor.gather import gather
from flatmount.observe.doctor.pages import PAGES
from flatmount.report.doctor import npd_line, render_diagnosis
from flatmount.report.text import wants_colour
from flatmount.storm.host import now_utc

_UNKNOWN_TO_NPD = 2
_EXAMPLES = """\
examples:
  flatmount doctor
  flatmount doctor --explain leaked-mounts
  flatmount doctor --npd        # as a custom plugin of node-problem-detector

exit code: 0 nothing or notes only, 1 a finding; with --npd 2 where it could not look
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "doctor",
        help="is it this node's mounts, and whose",
        description="Look at this node for about two seconds, changing nothing, and say whether mounts are its "
        "trouble: findings with figures, owner and remedy, and a verdict in one sentence. Sees more as root.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shown = parser.add_mutually_exclusive_group()
    json_option(parser)
    shown.add_argument("--npd", action="store_true", help="one line and an exit code for node-problem-detector")
    shown.add_argument("--explain", metavar="ID", help="the page of a finding; `all` lists them")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.explain:
        return _explain(args.explain)
    try:
        diagnosis = _look()
    except (FlatmountError, OSError) as error:
        if not args.npd:
            raise
        print(f"could not look: {error}"[:80])
        return _UNKNOWN_TO_NPD
    if args.npd:
        print(npd_line(diagnosis))
    elif args.json:
        json.dump(diagnosis.to_json(), sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        width = min(shutil.get_terminal_size((100, 24)).columns, 120)
        print(render_diagnosis(diagnosis, width=width, colour=wants_colour(sys.stdout)), end="")
    return EXIT_FINE if diagnosis.healthy else EXIT_FAILED


def _look() -> Diagnosis:
    taken_at, begun = now_utc(), time.monotonic()
    state = gather()
    findings = diagnose(state)
    return Diagnosis(
        taken_at=taken_at,
        kernel=state.system.kernel,
        seconds=round(time.monotonic() - begun, 2),
        mounts=state.table.mounts,
        verdict=verdict(findings, state.unseen),
        findings=findings,
        unseen=state.unseen,
        images=image_costs(state),
    )


def _explain(name: str) -> int:
    if name == "all":
        print("\n".join(PAGES))
        return EXIT_FINE
    if name not in PAGES:
        raise UsageError(f"no finding is called {name!r}", hint="`flatmount doctor --explain all` lists them")
    print(f"{name}\n\n{PAGES[name]}")
    return EXIT_FINE
