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


def exiting_program(machine: str) -> bytes:
    """A static ELF program that ends with 0. Raises: MissingFeature for a machine whose code is not known here."""
    if machine not in _MACHINES:
        raise MissingFeature(
            f"a program for {machine}",
            hint=f"engines are traced on {', '.join(_MACHINES)}; `trace -- COMMAND` anywhere",
        )
    number, _, code = _MACHINES[machine]
    size = _HEADERS_BYTES + len(code)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, number, 1, _BASE + _HEADERS_BYTES, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return header + segment + code


def write_tiny_image(path: str, layers: int) -> None:
    """Write an OCI image layout of `layers` layers at `path`, called NAME in it."""
    machine = os.uname().machine
    program = exiting_program(machine)
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
            written.append(layout.add_layer([tar.finish()]))
        layout.add_image(config, written, name=NAME)
