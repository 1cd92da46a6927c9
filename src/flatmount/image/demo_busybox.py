"""The base of the demo image for machines without apt: this machine's busybox and links to its applets."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from dataclasses import dataclass

from flatmount.errors import MissingFeature
from flatmount.image.layer_tar import LayerTar

_PT_INTERP = 3
_SECONDS = 20
_HINT = "install apt, or a static busybox (its package is often called busybox-static)"


@dataclass(frozen=True, slots=True)
class Busybox:
    """A static busybox: its content, the first line it says about itself, and its applets."""

    binary: bytes
    version: str
    applets: tuple[str, ...]


def find_busybox() -> Busybox:
    """Read the static busybox of this machine.

    Raises: MissingFeature, where there is none, it needs shared libraries, or it does not run.
    """
    path = shutil.which("busybox")
    if path is None:
        raise MissingFeature("there is no busybox on this machine", hint=_HINT)
    with open(path, "rb") as file:
        binary = file.read()
    if needs_libraries(binary):
        raise MissingFeature(f"{path} is not a static ELF program", hint=_HINT)
    applets = tuple(sorted(name for name in _output(path, "--list").split() if "/" not in name))
    return Busybox(binary, " ".join(_output(path).splitlines()[0].split()[:2]), applets)


def needs_libraries(binary: bytes) -> bool:
    """Whether an ELF program names an interpreter that has to load it; true for what is not an ELF program, too.

    See: elf(5), Elf64_Ehdr and Elf64_Phdr.
    """
    try:
        wide, order = {1: False, 2: True}[binary[4]], {1: "<", 2: ">"}[binary[5]]
        offset = struct.unpack_from(order + ("Q" if wide else "I"), binary, 32 if wide else 28)[0]
        size, count = struct.unpack_from(order + "HH", binary, 54 if wide else 42)
        kinds = [struct.unpack_from(order + "I", binary, offset + size * index)[0] for index in range(count)]
    except (KeyError, IndexError, struct.error):
        return True
    return binary[:4] != b"\x7fELF" or _PT_INTERP in kinds


def program_layer(busybox: Busybox, *, applets: bool) -> bytes:
    """The directories of a root file system, busybox, and a shell; or a link for every applet at once."""
    tar = LayerTar()
    for path in ("dev", "etc", "home", "proc", "root", "run", "srv", "sys", "tmp", "usr/bin", "usr/sbin", "var/tmp"):
        tar.directory(path)
    tar.file("bin/busybox", busybox.binary, mode=0o755)
    tar.symlink("bin/sh", "busybox")
    if applets:
        _link_applets(tar, busybox)
    return tar.finish()


def applets_layer(busybox: Busybox) -> bytes:
    """A link for each applet."""
    tar = LayerTar()
    _link_applets(tar, busybox)
    return tar.finish()


def _link_applets(tar: LayerTar, busybox: Busybox) -> None:
    for name in busybox.applets:
        if name not in ("busybox", "sh"):
            tar.symlink(f"bin/{name}", "busybox")


def _output(path: str, *arguments: str) -> str:
    try:
        answer = subprocess.run(
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
            check=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise MissingFeature(f"{path} does not run ({error})", hint=_HINT) from error
    return answer.stdout.decode(errors="replace")
