"""Temporary directories that do not outlive a killed process for longer than until the next run."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = ".lock"


@contextmanager
def scratch_directory(parent: str, stem: str) -> Iterator[str]:
    """Make a directory `PARENT/.STEM.<random>` (0700) and remove it with all it holds on the way out.

    A file `.lock` in it is locked with flock(2) for as long as it is in use; what a killed process left under the
    same stem is therefore known by its free lock, and removed first. Scratch directories may be nested.

    Yields: its absolute path, on the file system of `parent`, so that a rename out of it is atomic.
    Raises: OSError, where `parent` does not exist or cannot be written.
    """
    parent = os.path.abspath(parent)
    prefix = f".{stem}."
    # Sweeping and making are one step under the parent's lock: nobody sweeps a directory not yet locked.
    with _locked(parent):
        _sweep(parent, prefix)
        path = tempfile.mkdtemp(prefix=prefix, dir=parent)
        lock = os.open(os.path.join(path, _LOCK), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


@contextmanager
def _locked(directory: str) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _sweep(parent: str, prefix: str) -> None:
    with os.scandir(parent) as entries:
        left = [
            entry.path for entry in entries if entry.name.startswith(prefix) and entry.is_dir(follow_symlinks=False)
        ]
    for path in left:
        try:
            fd = os.open(os.path.join(path, _LOCK), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            # Killed before it was locked, which happens under the lock that we hold now.
            shutil.rmtree(path, ignore_errors=True)
            continue
        except OSError:
            continue  # another user's
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)
