"""A file as a read-only block device, for kernels that mount EROFS images from devices alone."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_CONTROL: Final = "/dev/loop-control"
_GET_FREE: Final = 0x4C82
_CONFIGURE: Final = 0x4C0A
_READ_ONLY, _AUTOCLEAR, _DIRECT_IO = 1, 4, 16
_CONFIG: Final = struct.Struct("<II5Q4I64s64s32s2Q8Q")  # struct loop_config, with struct loop_info64 in it
_ATTEMPTS: Final = 64


@contextmanager
def loop_device(path: str) -> Iterator[str]:
    """Attach `path` to a free loop device, read-only, and give the device's path.

    The kernel detaches it when nobody uses it any more: after the block, unless a mount was made of it, and then with
    that. Errors: OSError; ENOENT or ENXIO without loop devices. Kernel: LOOP_CONFIGURE (5.8), CAP_SYS_ADMIN.
    See: loop(4)
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        device, name = _attach(file, path)
        try:
            yield name
        finally:
            os.close(device)
    finally:
        os.close(file)


def _attach(file: int, path: str) -> tuple[int, str]:
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_ATTEMPTS):
            name = f"/dev/loop{fcntl.ioctl(control, _GET_FREE)}"
            device = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _CONFIGURE, _config(file, path))
                return device, name
            except OSError as error:
                os.close(device)
                # Somebody else took it meanwhile.
                if error.errno != errno.EBUSY:
                    raise
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "no free loop device", path)


def _config(file: int, path: str) -> bytes:
    flags = _READ_ONLY | _AUTOCLEAR | _DIRECT_IO
    shown = os.fsencode(path)[-63:]
    return _CONFIG.pack(file, 4096, *[0] * 5, 0, 0, 0, flags, shown, b"", b"", *[0] * 10)
