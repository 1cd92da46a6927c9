"""Images made on the spot, whose layers are as many as a section wants and whose files are always the same."""

from __future__ import annotations

import os

from flatmount.image.layer_tar import LayerTar
from flatmount.image.layout_writer import new_layout

FILES = 1000


def generated_image(path: str, *, layers: int) -> str:
    """An OCI layout of `layers` layers that together hold the same thousand small files; returns its path."""
    with new_layout(path, made_by="bench") as layout:
        written = []
        for layer in range(layers):
            tar = LayerTar()
            for number in range(layer, FILES, layers):
                tar.file(f"d{number % 20}/f{number}", b"%d\n" % number)
            written.append(layout.add_layer([tar.finish()]))
        layout.add_image({"architecture": _architecture(), "os": "linux"}, written, name=os.path.basename(path))
    return path


def _architecture() -> str:
    machine = os.uname().machine
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)
