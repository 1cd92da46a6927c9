"""Whose a mount is that was made by a command which was killed before it could write its number down."""

from __future__ import annotations

import dataclasses

import pytest

from flatmount.kernel.mounts import MountAttributes, MountEntry
from flatmount.rootfs.mounting import _is_ours
from flatmount.rootfs.records import Record, State

RECORD = Record(
    id="one",
    state=State.MOUNTING,
    owner="flatmount",
    root="/store",
    image="sha256:0",
    name=None,
    target="/mnt",
    strategy="flat",
    map="0:1:1",
    gid_map="0:1:1",
    uppers="/store/v1/data/uppers",
    upper="one",
    writable=False,
    ephemeral=False,
)
ENTRY = MountEntry(1, 0, None, None, "0:1", "/", "/mnt", "erofs", "loop0", MountAttributes(0), "", 0, 0, False)


@pytest.mark.parametrize(
    ("changes", "ours"),
    [({}, True), ({"writable": True}, False), ({"strategy": "detached"}, False), ({"state": State.MOUNTED}, False)],
)
def test_an_erofs_mount_is_a_read_only_flat_root_alone(changes: dict[str, object], ours: bool) -> None:
    record = dataclasses.replace(RECORD, **changes)  # type: ignore[arg-type]
    assert _is_ours(ENTRY, record, record.state) is ours
    overlay = dataclasses.replace(ENTRY, fs_type="overlay", source="flatmount-one")
    assert _is_ours(overlay, record, record.state) is (record.state is State.MOUNTING)
