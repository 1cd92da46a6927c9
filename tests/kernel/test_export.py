"""Out of a store and into another: configs and diff_ids stay what they are, byte for byte."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from images import Node, archive, char, directory, file, hardlink, layout_of, symlink
from trees import facts

from flatmount.errors import StoreError
from flatmount.image import image_names, open_source
from flatmount.image.layout_writer import new_layout
from flatmount.store import Store

SPARSE = {"GNU.sparse.map": "4096,5,100000,4", "GNU.sparse.size": "100004", "GNU.sparse.name": "sparse"}
LAYERS: list[list[Node] | bytes] = [
    [
        directory("./", 0o711),
        directory("d", uid=7),
        file("d/a", os.urandom(300_000), mtime=1_500_000_000.123456789),
        file("d/empty"),
        hardlink("d/b", "d/a"),
        symlink("l", "d/a"),
        char("null", 1, 3),
        file("x", b"firstlast", pax=SPARSE),
        file("ü" * 127, "long", pax={"SCHILY.xattr.user.k": "v"}),
        file(".wh..wh.aufs", "AUFS's own, which is not unpacked"),
    ],
    [file("d/.wh.a"), file("d/c", "c" * 1000), directory("e"), file("e/.wh..wh..opq"), hardlink("again", "d/empty")],
    archive([file("tail", "t" * 700)])[: 512 + 700],
    archive([file("y", "y")]) + bytes(20480),
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(str(tmp_path / "store"), create=True) as opened:
        yield opened


def test_an_exported_image_is_the_one_that_was_imported(store: Store, tmp_path: Path) -> None:
    image = store.import_image(layout_of(str(tmp_path / "in"), LAYERS, "+zstd"), name="web:1.2")
    with new_layout(str(tmp_path / "out"), made_by="test") as layout:
        store.export([image], layout)
    first, second = open_source(str(tmp_path / "in")), open_source(f"{tmp_path}/out:web:1.2")
    try:
        assert second.config_raw == first.config_raw
        assert second.config.diff_ids == first.config.diff_ids
    finally:
        first.close()
        second.close()
    with Store.open(str(tmp_path / "other"), create=True) as other:
        again = other.import_image(f"{tmp_path}/out")
        assert again.name == "web:1.2"
        assert [layer.diff_id for layer in again.layers] == [layer.diff_id for layer in image.layers]
        assert facts(os.path.join(other.data, other.ensure_flat(again))) == facts(
            os.path.join(store.data, store.ensure_flat(image))
        )


def test_other_tools_read_it(store: Store, tmp_path: Path) -> None:
    image = store.import_image(layout_of(str(tmp_path / "in"), LAYERS[:2]), name="web")
    with new_layout(str(tmp_path / "out"), made_by="test") as layout:
        store.export([image], layout)
    command = ["skopeo", "--insecure-policy", "copy", f"oci:{tmp_path}/out:web", f"dir:{tmp_path}/dir"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_damaged_layer_is_not_exported(store: Store, tmp_path: Path) -> None:
    image = store.import_image(layout_of(str(tmp_path / "in"), LAYERS[:2]), name="web")
    with open(os.path.join(store.data, image.layers[1].path, "d/c"), "r+b") as out:
        out.write(b"C")
    with pytest.raises(StoreError, match="not what was imported"), new_layout(str(tmp_path / "out"), made_by="x") as to:
        store.export([image], to)
    assert not (tmp_path / "out").exists()


def test_a_layer_that_cannot_be_had_again_says_so(store: Store, tmp_path: Path) -> None:
    twice = [file("a", "1"), file("a", "2")]
    image = store.import_image(layout_of(str(tmp_path / "in"), [twice]), name="web")
    with pytest.raises(StoreError, match="a file twice"), new_layout(str(tmp_path / "out"), made_by="x") as to:
        store.export([image], to)


def test_a_layout_of_several(store: Store, tmp_path: Path) -> None:
    for name in ("one", "two:2"):
        store.import_image(layout_of(str(tmp_path / name.partition(":")[0]), [LAYERS[0], [file(name)]]), name=name)
    with new_layout(str(tmp_path / "out"), made_by="test") as layout:
        store.export(store.images(), layout)
    assert image_names(str(tmp_path / "out")) == ("one", "two:2")
    # The layer that both have is there once: three layers, two configs, two manifests.
    assert len(os.listdir(tmp_path / "out/blobs/sha256")) == 7
