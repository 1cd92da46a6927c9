"""A layer of a snapshot that somebody changes while it is read, and of what no layer can hold."""

from __future__ import annotations

import io
import os
import resource
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flatmount.cli.main import main
from flatmount.errors import StoreError
from flatmount.kernel.tree import remove_tree
from flatmount.snapshotter.diff import write_layer
from flatmount.snapshotter.model import Form, Info, Kind, Snapshot
from flatmount.store.disk import Disk

SNAPSHOT = Snapshot(1, Info("key", "", Kind.ACTIVE, 0, 0, {}), None, Form.OVERLAY, host_ids=False, remapped=False)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk.open(str(tmp_path / "store"), create=True)
    os.makedirs(f"{made.data}/{SNAPSHOT.fs}")
    yield made
    remove_tree(made.data_fd, "snapshots")
    made.close()


@pytest.fixture
def upper(disk: Disk) -> Path:
    return Path(disk.data, SNAPSHOT.fs)


def layer(disk: Disk) -> dict[str, bytes | None]:
    """Names and, of regular files, contents."""
    out = io.BytesIO()
    write_layer(disk, SNAPSHOT, None, out)
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        contents = ((entry.name, tar.extractfile(entry) if entry.isreg() else None) for entry in tar)
        return {name: None if file is None else file.read() for name, file in contents}


def test_what_takes_a_files_place_is_never_opened(disk: Disk, upper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (upper / "file").write_text("content")
    listxattr = os.listxattr

    def swapped(*arguments: object, **more: object) -> list[str]:
        (upper / "file").unlink()
        os.mkfifo(upper / "file")  # a device would be opened as well, and may act on that
        monkeypatch.setattr(os, "listxattr", listxattr)
        return []

    monkeypatch.setattr(os, "listxattr", swapped)
    assert layer(disk) == {"file": b"content"}


def test_what_is_removed_meanwhile_is_left_out(disk: Disk, upper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "d"):
        (upper / name).write_text(name)
    (upper / "c").mkdir()
    listdir = os.listdir

    def listed(path: int) -> list[str]:
        names = listdir(path)
        for name in ("a", "c"):
            if name in names:
                os.rename(upper / name, upper.parent / name)
        return names

    monkeypatch.setattr(os, "listdir", listed)
    assert set(layer(disk)) == {"b", "d"}


def test_a_snapshot_that_is_removed_meanwhile_is_no_layer(
    disk: Disk, upper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (upper / "file").write_text("content")
    listdir = os.listdir

    def listed(path: int) -> list[str]:
        names = listdir(path)
        (upper / "file").unlink()
        upper.parent.rename(Path(disk.data, "trash/1"))
        return names

    monkeypatch.setattr(os, "listdir", listed)
    with pytest.raises(StoreError, match="was removed while it was read"):
        layer(disk)


def test_directories_may_be_deep(disk: Disk, upper: Path) -> None:
    depth = 1200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * depth), hard))
    fds = [os.open(upper, os.O_RDONLY)]
    try:
        for _ in range(depth):
            os.mkdir("d", dir_fd=fds[-1])
            fds.append(os.open("d", os.O_RDONLY, dir_fd=fds[-1]))
        assert len(layer(disk)) == depth
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(fds) + 200, hard))
        with pytest.raises(Exception, match="open files") as refused:
            layer(disk)
        assert "limit of open files" in getattr(refused.value, "hint", "")
    finally:
        for fd in fds:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_attribute_whose_name_is_not_utf8_is_told(disk: Disk, upper: Path) -> None:
    (upper / "file").write_text("")
    os.setxattr(upper / "file", b"user.\xff", b"value")
    with pytest.raises(StoreError, match="is not UTF-8"):
        layer(disk)


def test_a_layer_that_fails_leaves_no_file(
    disk: Disk, upper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (upper / ".wh.name").write_text("")
    monkeypatch.setattr("flatmount.cli.snapshotter.require_root", lambda verb: None)
    monkeypatch.setattr("flatmount.snapshotter.diff.find_snapshot", lambda root, key: (SNAPSHOT, None))
    (tmp_path / "out").mkdir()
    arguments = ["--root", disk.root, "--output", str(tmp_path / "out/layer.tar")]
    assert main(["snapshotter", "diff", "key", *arguments]) == 1
    assert not list((tmp_path / "out").iterdir())
