"""What lies below a layer: look-ups in the chain beneath it, by overlayfs's rules, without a mount."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

OPAQUE = "trusted.overlay.opaque"
Stack = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """A path of the chain. `source` is relative to the data directory, in the topmost layer that has it."""

    source: bytes
    status: os.stat_result

    @property
    def is_directory(self) -> bool:
        """Whether it is one, and may therefore be merged with others beneath it."""
        return stat.S_ISDIR(self.status.st_mode)


class Below:
    """The merged layers beneath one that is being unpacked.

    A directory is known by its stack, the layers that contribute to it, so that a look-up in it asks those
    alone. Layers never change, and the paths used here run through their directories only, so that no link is
    ever followed. `data_fd` is borrowed; `layers` are paths relative to it, topmost first. `ready` returns when
    they are complete, and is called before the first of them is looked at.
    """

    def __init__(self, data_fd: int, layers: Sequence[str], ready: Callable[[], None] | None = None) -> None:
        self.data_fd = data_fd
        self._ready = ready
        self._layers = [os.fsencode(layer) for layer in layers]
        self.consulted = False

    @property
    def root(self) -> Stack:
        """The stack of the root directory."""
        return tuple(range(len(self._layers)))

    def look_up(self, stack: Stack, path: bytes) -> Found | None:
        """What the chain has at `path`, whose parent directory has `stack`."""
        self.consulted = True
        self._wait()
        for _, found in self._all(stack, path):
            return None if _is_whiteout(found.status) else found
        return None

    def stack(self, stack: Stack, path: bytes) -> Stack:
        """The stack of the directory at `path`, whose parent has `stack`; empty where the chain has no directory."""
        self.consulted = True
        self._wait()
        merged: list[int] = []
        for layer, found in self._all(stack, path):
            if not found.is_directory:
                break
            merged.append(layer)
            if self._is_opaque(found.source):
                break
        return tuple(merged)

    def _all(self, stack: Stack, path: bytes) -> Iterator[tuple[int, Found]]:
        for layer in stack:
            source = self._layers[layer] + b"/" + path
            try:
                status = os.stat(source, dir_fd=self.data_fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield layer, Found(source, status)

    def root_names(self) -> set[bytes]:
        """Every name in the root directory of any of the layers."""
        self._wait()
        names: set[bytes] = set()
        for layer in self._layers:
            fd = os.open(layer, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.data_fd)
            try:
                names.update(map(os.fsencode, os.listdir(fd)))
            finally:
                os.close(fd)
        return names

    def _wait(self) -> None:
        if self._ready is not None:
            self._ready()
            self._ready = None

    def _is_opaque(self, source: bytes) -> bool:
        path = b"/proc/self/fd/%d/%b" % (self.data_fd, source)
        try:
            return os.getxattr(path, OPAQUE, follow_symlinks=False) == b"y"
        except OSError:
            return False


def _is_whiteout(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
