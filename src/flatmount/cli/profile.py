"""`flatmount profile`: an incident recording of the whole machine; and the difference between two."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

from flatmount.cli.common import json_option, print_json
from flatmount.errors import EXIT_FINE, UsageError
from flatmount.observe.profile import Recorder
from flatmount.observe.profile_results import Profile
from flatmount.observe.trace import NOT_EXECUTABLE, NOT_FOUND
from flatmount.report.flame import folded_text, speedscope, weights
from flatmount.report.profile import compare, page, render_comparison, render_profile
from flatmount.rootfs.image import require_root

_DEFAULT_S = 30.0
_EXAMPLES = """\
examples:
  flatmount profile --for 30s --html profile.html
  flatmount profile --save a.json -- flatmount storm demo --strategies per-layer
  flatmount profile diff a.json b.json

--folded DIR writes cpu.folded and waits.folded for flame graph tools, --speedscope FILE for speedscope.app.
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "profile",
        help="record where the time goes: stacks, lock waits, mount calls",
        description="Record the whole machine, for a time or while COMMAND runs: what processors do, who waits for "
        "which lock with which stack, mount calls with their latency, and the length of the mount table, on one "
        "clock. Uses perf and trace events, no kernel probes. `profile diff A B` compares two that were saved.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--for", dest="period", metavar="TIME", help="how long, as 30s or 2m (default: 30s)")
    parser.add_argument("--html", metavar="FILE", help="write a page with flame graphs")
    parser.add_argument("--save", metavar="FILE", help="write everything as JSON, for `diff` and `report`")
    parser.add_argument("--folded", metavar="DIR", help="write folded stacks")
    parser.add_argument("--speedscope", metavar="FILE", help="write a speedscope profile")
    json_option(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND | diff A B")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    words = args.command
    if words[:1] == ["diff"]:
        return _diff(words[1:], args.json)
    if words and words[0] != "--":
        raise UsageError(f"profile does not know {words[0]!r}", hint="flatmount profile -- COMMAND")
    seconds = seconds_of(args.period, "--for") if args.period else None
    for path in (args.html, args.save, args.speedscope):
        if path is not None and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise UsageError(f"{path}: its directory does not exist", hint="make it first")
    require_root("profile")
    profile = _record(words[1:], seconds)
    _write(profile, args)
    return profile.exit_code or EXIT_FINE


def _record(command: list[str], seconds: float | None) -> Profile:
    with Recorder(command) as recorder:
        recorder.start()
        if not command:
            _wait(seconds or _DEFAULT_S)
            return recorder.stop()
        try:
            process = subprocess.Popen(command)
        except FileNotFoundError:
            return recorder.stop(exit_code=NOT_FOUND)
        except PermissionError:
            return recorder.stop(exit_code=NOT_EXECUTABLE)
        recorder.watch_table_of(process.pid)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait()
        except KeyboardInterrupt:
            process.wait()
        code = process.returncode
        return recorder.stop(root_process=process.pid, exit_code=code if code >= 0 else 128 - code)


def _wait(seconds: float) -> None:
    try:
        time.sleep(seconds)
    except KeyboardInterrupt:
        sys.stderr.write("\n")  # the recording ends here and is worth having


def _write(profile: Profile, args: argparse.Namespace) -> None:
    if args.save is not None:
        _write_json(args.save, profile.to_json())
    if args.speedscope is not None:
        _write_json(args.speedscope, speedscope(profile, " ".join(profile.command) or "flatmount profile"))
    if args.folded is not None:
        os.makedirs(args.folded, exist_ok=True)
        for name, stacks in zip(("cpu", "waits"), weights(profile), strict=True):
            with open(os.path.join(args.folded, f"{name}.folded"), "w", encoding="utf-8") as file:
                file.write(folded_text(stacks))
    if args.html is not None:
        with open(args.html, "w", encoding="utf-8") as file:
            file.write(page(profile))
    if args.json:
        json.dump(profile.to_json(), sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        # The command's own output is on standard output.
        (sys.stderr if profile.command else sys.stdout).write(render_profile(profile))


def _write_json(path: str, value: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file)


def _diff(paths: list[str], as_json: bool) -> int:
    if "--json" in paths:
        paths, as_json = [path for path in paths if path != "--json"], True
    if len(paths) != 2:
        raise UsageError("profile diff takes two files", hint="flatmount profile diff before.json after.json")
    before, after = (_read(path) for path in paths)
    if as_json:
        print_json("profile-diff", compare(before, after))
    else:
        sys.stdout.write(render_comparison(before, after))
    return EXIT_FINE


def _read(path: str) -> Profile:
    try:
        with open(path, encoding="utf-8") as file:
            return Profile.from_json(json.load(file))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}", hint="give a file that `profile --save` wrote") from error
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="give a file that `profile --save` wrote") from error


def seconds_of(text: str, option: str) -> float:
    """The seconds that `30s`, `2m` or `1.5` mean. Raises: UsageError naming the option."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("s", "m") else (text, "s")
    if not number.replace(".", "", 1).isdigit() or not 0.1 <= float(number) * (60 if unit == "m" else 1) <= 3600:
        raise UsageError(f"{option} {text!r} is not a time from 0.1s to 60m", hint="write 30s or 2m")
    return float(number) * (60 if unit == "m" else 1)
