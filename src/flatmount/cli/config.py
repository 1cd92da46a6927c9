"""`flatmount config`: what can be said in the configuration file, what is in force, and whether a file is right."""

from __future__ import annotations

import argparse
import sys

from flatmount.cli.common import verbs_of
from flatmount.config import Config, dump, load
from flatmount.errors import EXIT_FINE


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    actions = verbs_of(
        verbs,
        "config",
        summary="show and check the configuration",
        description="Show the defaults, show what is in force, or check a file. The file is $FLATMOUNT_CONFIG or "
        "/etc/flatmount/config.toml, TOML with `version = 1`; unknown keys are refused.",
    )
    default = actions.add_parser("default", help="print a file with every default")
    default.set_defaults(run=lambda args: _print(Config()))
    shown = actions.add_parser("dump", help="print what is in force, defaults included")
    shown.set_defaults(run=lambda args: _print(load()))
    check = actions.add_parser("check", help="check a file, or the one in force")
    check.add_argument("file", nargs="?", metavar="FILE")
    check.set_defaults(run=_check)


def _print(config: Config) -> int:
    sys.stdout.write(dump(config))
    return EXIT_FINE


def _check(args: argparse.Namespace) -> int:
    load(args.file)
    print("fine")
    return EXIT_FINE
