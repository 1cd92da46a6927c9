"""`flatmount trace`: the mount operations of a command, or of engines at several numbers of layers."""

from __future__ import annotations

import argparse
import json
import sys

from flatmount.cli.common import interruptible, json_option, run_directory, whole
from flatmount.cli.storm import progress_line
from flatmount.errors import EXIT_FAILED, EXIT_FINE, FlatmountError, UsageError
from flatmount.kernel.namespaces import enter_private_mounts
from flatmount.observe.trace import NOT_EXECUTABLE, NOT_FOUND, trace
from flatmount.observe.trace_engines import engine_names, trace_engines
from flatmount.observe.trace_results import TraceReport, fits
from flatmount.report.trace import render_trace
from flatmount.rootfs.image import require_root
from flatmount.rootfs.workplace import sweep, workplace
from flatmount.storm.host import now_utc, this_host

_EXAMPLES = """\
examples:
  flatmount trace -- podman run --rm demo true
  flatmount trace --engine containerd,runc,flatmount --layers 5,50,120

Attaching and detaching a mount are the mount operations: they happen in a mount table, under locks of the whole
machine. `prepare` works on what no table shows, `change` on a mount that stays where it is, `copy` copies a table.
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "trace",
        help="count the mount operations of a command or an engine",
        description="Run COMMAND and count the mount operations of it and all that it starts, for each process, from "
        "the kernel's system call events. With --engine, start and remove one container of a tiny image for each "
        "engine and number of layers, and say whether the engine is constant or grows with layers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", metavar="E,...", help=f"of {', '.join(engine_names())}")
    parser.add_argument("--layers", default="5,50,120", metavar="L,...", help="for --engine (default: %(default)s)")
    json_option(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if bool(command) == bool(args.engine):
        raise UsageError("trace takes either a command or --engine", hint="flatmount trace -- COMMAND")
    require_root("trace")
    report = _engines(args) if args.engine else _command(command)
    if args.json:
        facts = {
            "fits": [
                {"subject": fit.subject, "base": fit.base, "per_layer": fit.per_layer, "grows": fit.grows}
                for fit in fits(report.runs)
            ]
        }
        json.dump({**report.to_json(), **facts}, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        # What the command wrote is on standard output; what we say of it goes beside that.
        (sys.stdout if args.engine else sys.stderr).write(render_trace(report))
    if args.engine:
        return EXIT_FAILED if report.absent or any(run.exit_code for run in report.runs) else EXIT_FINE
    code = report.runs[0].exit_code
    if not report.runs[0].processes and code in (NOT_FOUND, NOT_EXECUTABLE):
        raise _cannot_run(command[0], code)
    return code


def _command(command: list[str]) -> TraceReport:
    taken_at = now_utc()
    return TraceReport(taken_at, this_host(), (trace(command),), ())


def _engines(args: argparse.Namespace) -> TraceReport:
    layers = [whole(text, "--layers", least=1, most=500) for text in args.layers.split(",")]
    taken_at = now_utc()
    progress = progress_line()
    enter_private_mounts()
    sweep(run_directory())
    with interruptible(), workplace(run_directory(), "trace") as place:
        runs, absent = trace_engines(tuple(dict.fromkeys(args.engine.split(","))), layers, place, progress)
    progress("")
    return TraceReport(taken_at, this_host(), runs, absent)


def _cannot_run(name: str, code: int) -> FlatmountError:
    error = FlatmountError(f"{name} {'was not found' if code == NOT_FOUND else 'cannot be executed'}")
    error.exit_code = code
    return error
