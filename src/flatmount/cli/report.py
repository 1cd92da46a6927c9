"""`flatmount report`: results out of files, as text or as a page; several of one kind side by side."""

from __future__ import annotations

import argparse
import os

from flatmount.cli.common import json_option, print_json
from flatmount.errors import EXIT_FINE, UsageError
from flatmount.report.files import page, read_results, render, side_by_side


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "report",
        help="show results that were saved, or put several side by side",
        description="Show what storm (also of engines), trace, profile, doctor or cpu bench wrote with --json, --save "
        "or --output, or watch with --jsonl. Several files of one kind become one table with a column for each.",
        epilog="examples: flatmount report storm.json --html storm.html    flatmount report before.json after.json",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="results as JSON")
    parser.add_argument("--html", metavar="FILE", help="write a page that loads nothing")
    json_option(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.html is not None and not os.path.isdir(os.path.dirname(os.path.abspath(args.html))):
        raise UsageError(f"{args.html}: its directory does not exist", hint="make it first")
    results = [read_results(path) for path in args.files]
    heads, rows = side_by_side(results)
    if args.html is not None:
        with open(args.html, "w", encoding="utf-8") as file:
            file.write(page(results))
    if args.json:
        print_json("report", {"kind": results[0].kind.name, "columns": heads[1:], "rows": rows})
    else:
        print(render(results), end="")
    return EXIT_FINE
