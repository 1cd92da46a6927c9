"""A small image for containers: busybox, a user database, and as many layers as a test wants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flatmount.image.demo_busybox import find_busybox
from flatmount.image.layer_tar import LayerTar
from flatmount.image.layout_writer import new_layout

PASSWD = b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:App:/home/app:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n"
GROUP = b"root:x:0:\napp:x:1001:\naudio:x:29:app\nvideo:x:44:root,app\n"
APPLETS = ("sh", "cat", "echo", "env", "grep", "head", "hostname", "id", "ls", "mount", "pwd", "sleep", "stat", "stty",
           "test", "touch", "true", "tty", "wc", "kill", "nproc", "dd", "ps", "chmod", "mkdir")  # fmt: skip


def write_tiny_image(
    path: str, *, layers: int = 1, config: Mapping[str, Any] | None = None, name: str = "tiny"
) -> None:
    """An OCI layout at `path` with one image: the tools in the lowest layer, one file in each other."""
    with new_layout(path, made_by="tests") as layout:
        written = [layout.add_layer([_tools()])]
        for number in range(1, layers):
            tar = LayerTar()
            tar.directory("layers")
            tar.file(f"layers/{number}", f"{number}\n".encode())
            written.append(layout.add_layer([tar.finish()]))
        known: dict[str, Any] = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Env": ["COLOUR=green"], "Cmd": ["/bin/sh"], **(config or {})},
        }
        layout.add_image(known, written, name=name)


def _tools(extra: Sequence[str] = ()) -> bytes:
    busybox = find_busybox()
    tar = LayerTar()
    for directory in ("bin", "dev", "etc", "proc", "root", "sys", "srv"):
        tar.directory(directory)
    tar.directory("tmp", mode=0o1777)
    tar.directory("home/app", owner=(1000, 1001))
    tar.file("bin/busybox", busybox.binary, mode=0o755)
    for applet in (*APPLETS, *extra):
        if applet in busybox.applets:
            tar.symlink(f"bin/{applet}", "busybox")
    tar.file("etc/passwd", PASSWD)
    tar.file("etc/group", GROUP)
    tar.file("bin/not-executable", b"#!/bin/sh\n", mode=0o644)
    tar.file("bin/no-interpreter", b"#!/nowhere\n", mode=0o755)
    return tar.finish()
