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


def parser() -> argparse.ArgumentParser:
    """The whole command line; each verb's module adds its own part."""
    top = argparse.ArgumentParser(
        prog="flatmount",
        description="Container root file systems with a constant number of mounts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"flatmount {VERSION}")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in _VERBS:
        importlib.import_module(f"flatmount.cli.{verb}").add_parser(verbs)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code; see flatmount.errors for the table."""
    try:
        args = parser().parse_args(argv)
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
