"""Disks of a test's own, which lose their power when it says so."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

EXT4_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2


def new_disk(image: Path, size_bytes: int) -> None:
    """Make an ext4 in a new file."""
    with image.open("wb") as out:
        out.truncate(size_bytes)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)


@contextlib.contextmanager
def mounted_disk(image: Path, place: Path) -> Iterator[None]:
    """Mount it for the block."""
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def cut_power(place: Path) -> None:
    """What is only in memory never reaches the disk that is mounted at `place`."""
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH.to_bytes(4, "little"))
    finally:
        os.close(fd)
