from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
from merged import image_of, load_json, merge

from flatmount.errors import UsageError
from flatmount.image.layer_tar import LayerTar
from flatmount.image.layout_writer import new_layout
from flatmount.image.model import OCI_MANIFEST
from flatmount.image.scratch import scratch_directory


def _archive(text: bytes) -> bytes:
    tar = LayerTar()
    tar.file("a/b", text)
    return tar.finish()


def _write(path: Path, text: bytes = b"x", mark: str = "a test") -> str:
    with new_layout(str(path), made_by=mark) as layout:
        archive = _archive(text)
        layers = [layout.add_layer([archive[:700], archive[700:]]), layout.add_layer([_archive(b"upper")])]
        return layout.add_image({"architecture": "amd64", "os": "linux"}, layers, name="one").digest


def test_layout_is_complete_and_the_same_each_time(tmp_path: Path) -> None:
    assert _write(tmp_path / "one") == _write(tmp_path / "two")
    assert (tmp_path / "one/index.json").read_bytes() == (tmp_path / "two/index.json").read_bytes()
    assert json.loads((tmp_path / "one/oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    config, archives = image_of(str(tmp_path / "one"))
    assert config["rootfs"]["type"] == "layers"
    assert merge(archives)["a/b"].data == b"upper"
    assert len(os.listdir(tmp_path / "one/blobs/sha256")) == 4
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_index_names_image_and_platform(tmp_path: Path) -> None:
    digest = _write(tmp_path / "out")
    [entry] = json.loads((tmp_path / "out/index.json").read_bytes())["manifests"]
    assert entry["digest"] == digest and entry["mediaType"] == OCI_MANIFEST
    assert entry["platform"] == {"architecture": "amd64", "os": "linux"}
    assert entry["annotations"] == {"org.opencontainers.image.ref.name": "one"}
    assert load_json(str(tmp_path / "out"), digest)["schemaVersion"] == 2


def test_failure_leaves_what_was_there(tmp_path: Path) -> None:
    _write(tmp_path / "out", b"old")
    with pytest.raises(ZeroDivisionError), new_layout(str(tmp_path / "out"), made_by="a test") as layout:
        layout.add_layer([b"x"])
        raise ZeroDivisionError
    assert merge(image_of(str(tmp_path / "out"))[1][:1])["a/b"].data == b"old"
    assert os.listdir(tmp_path) == ["out"]


def test_replaces_its_own_and_an_empty_directory_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    _write(out, b"first")
    _write(out, b"second")
    assert merge(image_of(str(out))[1][:1])["a/b"].data == b"second"
    with pytest.raises(UsageError, match="not made by `another`"):
        _write(out, mark="another")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("kept")
    (tmp_path / "link").symlink_to(out)
    for name in ("full", "link", "full/precious", "missing/out"):
        with pytest.raises(UsageError):
            _write(tmp_path / name)
    assert (tmp_path / "full/precious").read_text() == "kept"
    assert merge(image_of(str(out))[1][:1])["a/b"].data == b"second"


def test_scratch_of_a_killed_process_is_removed_and_one_in_use_is_not(tmp_path: Path) -> None:
    for name in (".work.killed", ".work.used", ".other.killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".lock").touch()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / ".work.killed-early").mkdir()
    (tmp_path / ".work.file").touch()
    (tmp_path / ".work.link").symlink_to(".other.killed")
    fd = os.open(tmp_path / ".work.used/.lock", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    kept = {".work.used", ".work.file", ".work.link", ".other.killed"}
    with scratch_directory(str(tmp_path), "work") as scratch:
        assert set(os.listdir(tmp_path)) == kept | {os.path.basename(scratch)}
        # Nested, and beside itself: neither waits for the other.
        with scratch_directory(scratch, "work") as inner, scratch_directory(str(tmp_path), "work") as beside:
            assert os.path.isdir(inner) and os.path.isdir(scratch) and os.path.isdir(beside)
    assert set(os.listdir(tmp_path)) == kept
    assert (tmp_path / ".other.killed/file").exists()
    os.close(fd)
