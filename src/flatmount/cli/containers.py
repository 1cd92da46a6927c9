"""What the verbs on containers share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from flatmount.cli.common import run_directory
from flatmount.errors import EXIT_FAILED, EXIT_FINE, FlatmountError, from_os_error
from flatmount.runtime.oci import ContainerError
from flatmount.runtime.records import Containers
from flatmount.runtime.recover import recover
from flatmount.store import Store


def with_engine_codes(verb: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """125 for every error of our own: other codes are the container's, or say that its command cannot run."""

    def run(args: argparse.Namespace) -> int:
        try:
            return verb(args)
        except OSError as error:
            failure = from_os_error(error, "failed")
            failure.exit_code = ContainerError.exit_code
            raise failure from error
        except FlatmountError as error:
            if not isinstance(error, ContainerError):
                error.exit_code = ContainerError.exit_code
            raise

    return run


def recovered(store: Store) -> Containers:
    """The containers of the run directory, after what kills left of this store's was put right, and told."""
    run = run_directory()
    for told in recover(run, store):
        print(f"flatmount: {told}", file=sys.stderr)
    return Containers(run)


def for_each(names: Sequence[str], act: Callable[[str], object]) -> int:
    """Act on each container; an error of one is told and does not keep the others from their turn."""
    failed = EXIT_FINE
    for name in names:
        try:
            act(name)
        except FlatmountError as error:
            print(f"flatmount: {error.line()}", file=sys.stderr)
            failed = EXIT_FAILED
    return failed
