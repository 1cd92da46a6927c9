"""`flatmount`: finds the verb, runs it, and turns every error into one line and an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from flatmount import VERSION
from flatmount.cli.common import DEFAULT_ROOT, DEFAULT_RUN
from flatmount.errors import EXIT_FAILED, EXIT_USAGE, FlatmountError, from_os_error

# In the order in which `--help` shows them: look first, then images, then mounts, then measuring.
_VERBS = (
    "doctor",
    "probe",
    "image",
    "store",
    "gc",
    "fsck",
    "plan",
    "mount",
    "umount",
    "run",
    "ps",
    "exec",
    "stop",
    "remove",
    "logs",
    "storm",
    "trace",
    "leaks",
    "report",
    "profile",
    "watch",
    "cpu",
    "snapshotter",
    "containerd",
    "config",
)

EXIT_CODES = "0 fine, 1 a finding or a failed operation, 2 usage or a bad reference"
_EPILOG = f"""environment:
  FLATMOUNT_ROOT   the store, where --root is not given (default: {DEFAULT_ROOT})
  FLATMOUNT_RUN    records of live mounts and workplaces (default: {DEFAULT_RUN})

exit codes: {EXIT_CODES}
"""


def parser(verbs: Sequence[str] = _VERBS) -> argparse.ArgumentParser:
    """The command line with these verbs, all of them unless said; each verb's module adds its own part."""
    top = argparse.ArgumentParser(
        prog="flatmount",
        description="Container root file systems with a constant number of mounts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"flatmount {VERSION}")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    added = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in verbs:
        importlib.import_module(f"flatmount.cli.{verb}").add_parser(added)
    return top


def _needed(arguments: Sequence[str]) -> Sequence[str]:
    """The verb that is asked for, alone: importing all of them takes longer than importing a small image."""
    rest = [argument for argument in arguments[:2] if argument != "--debug"]
    return rest[:1] if rest and rest[0] in _VERBS else _VERBS


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code; see flatmount.errors for the table."""
    try:
        args = parser(_needed(sys.argv[1:] if argv is None else argv)).parse_args(argv)
    except FlatmountError as error:
        return _tell(error)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except FlatmountError as error:
        if args.debug:
            raise
        return _tell(error)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing is wrong and nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        if args.debug:
            raise
        return _tell(from_os_error(error, "failed"))
    except KeyboardInterrupt:
        sys.stderr.write("\nflatmount: interrupted\n")
        return 128 + signal.SIGINT


def _tell(error: FlatmountError) -> int:
    sys.stderr.write(f"flatmount: {error.line()}\n")
    return error.exit_code or EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
