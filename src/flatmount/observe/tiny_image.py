"""The smallest image with a given number of layers that an engine can start: a program that ends at once, and a file
in each layer."""

from __future__ import annotations

import os
import struct

from flatmount.errors import MissingFeature
from flatmount.image.layer_tar import LayerTar
from flatmount.image.layout_writer import new_layout

PROGRAM = "/end"
NAME = "docker.io/library/tiny:latest"

_MADE_BY = "flatmount trace"
_BASE = 0x400000
_HEADERS_BYTES = 64 + 56
# machine: (e_machine of its ELF, its name in OCI configurations, exit(0) in its instructions)
_MACHINES = {
    "x86_64": (62, "amd64", bytes.fromhex("b83c000000 31ff 0f05")),
    "aarch64": (183, "arm64", bytes.fromhex("a80b80d2 000080d2 010000d4")),
}
# machine: pause() for ever, or ppoll() of nothing, in its instructions
_WAITING = {
    "x86_64": bytes.fromhex("b822000000 0f05 ebf7"),
    "aarch64": bytes.fromhex("000080d2 010080d2 020080d2 030080d2 040080d2 280980d2 010000d4 f9ffff17"),
}


def exiting_program(machine: str) -> bytes:
    """A static ELF program that ends with 0. Raises: MissingFeature for a machine whose code is not known here."""
    return _program(machine, waits=False)


def _program(machine: str, *, waits: bool) -> bytes:
    if machine not in _MACHINES:
        raise MissingFeature(
            f"a program for {machine}",
            hint=f"engines are traced on {', '.join(_MACHINES)}; `trace -- COMMAND` anywhere",
        )
    number, _, code = _MACHINES[machine]
    if waits:
        code = _WAITING[machine]
    size = _HEADERS_BYTES + len(code)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, number, 1, _BASE + _HEADERS_BYTES, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return header + segment + code


def write_tiny_image(path: str, layers: int, *, waits: bool = False) -> None:
    """Write an OCI image layout of `layers` layers at `path`, called NAME in it; its program ends, or waits for ever.

    Layer N has the file etc/layer-N; where the program waits, it also takes etc/gone-(N-1) of the layer below away.
    """
    machine = os.uname().machine
    program = _program(machine, waits=waits)
    config = {"architecture": _MACHINES[machine][1], "os": "linux", "config": {"Cmd": [PROGRAM]}}
    with new_layout(path, made_by=_MADE_BY) as layout:
        written = []
        for number in range(layers):
            tar = LayerTar()
            if number == 0:
                for directory in ("dev", "etc", "proc", "run", "sys", "tmp"):
                    tar.directory(directory)
                tar.file(PROGRAM.lstrip("/"), program, mode=0o755)
            tar.file(f"etc/layer-{number}", b"%d\n" % number)
            if waits:
                tar.file(f"etc/gone-{number}", b"")
                if number:
                    tar.remove(f"etc/gone-{number - 1}")
            written.append(layout.add_layer([tar.finish()]))
        layout.add_image(config, written, name=NAME)
