"""Images of a bench: made on the spot, with as many layers as a section wants and the same files; or real ones."""

from __future__ import annotations

import os
import shutil
import subprocess

from flatmount.image.demo import build_demo, default_cache
from flatmount.image.layer_tar import LayerTar
from flatmount.image.layout_writer import new_layout
from flatmount.image.model import host

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
        layout.add_image({"architecture": host().architecture, "os": "linux"}, written, name=os.path.basename(path))
    return path


def real_images(place: str) -> dict[str, str]:
    """The demo image and, where mmdebstrap and umoci are, a Debian system of one layer; OCI layouts below `place`."""
    demo = os.path.join(place, "demo")
    build_demo(demo, layers=60, cache=default_cache(), name="demo")
    images = {"the demo image, 60 layers": f"{demo}:demo"}
    if shutil.which("mmdebstrap") and shutil.which("umoci"):
        images["a Debian system made by mmdebstrap, one layer"] = _debian_system(place)
    else:
        print("no mmdebstrap or umoci here: without the Debian system (tools/setup --tests installs both)")
    return images


def _debian_system(place: str) -> str:
    archive, layout = os.path.join(place, "system.tar"), os.path.join(place, "oci")
    for command in (
        ["mmdebstrap", "--quiet", "--variant=essential", "bookworm", archive],
        ["umoci", "init", "--layout", layout],
        ["umoci", "new", "--image", f"{layout}:system"],
        ["umoci", "config", "--image", f"{layout}:system", "--architecture", host().architecture, "--os", "linux"],
        ["umoci", "raw", "add-layer", "--image", f"{layout}:system", archive],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    os.unlink(archive)
    return f"{layout}:system"
