"""Probes on a machine that is not well."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from flatmount.errors import StoreError
from flatmount.kernel import probes


@pytest.mark.parametrize("system", [True, False], ids=["the system", "the format"])
def test_no_room_for_an_image_says_nothing_about_other_features(
    data: Path, monkeypatch: pytest.MonkeyPatch, system: bool
) -> None:
    def full(tree_fd: int, out_fd: int, name: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if system else StoreError("no room")

    before = {feature.name: feature for feature in probes.probe(str(data)).features}
    monkeypatch.setattr(probes, "write_erofs", full)
    after = {feature.name: feature for feature in probes.probe(str(data)).features}
    for name in ("erofs_files", "erofs_devices"):
        assert not after[name].available
        assert after.pop(name).said.startswith("not tried: No" if system else "not tried: no room")
    assert after == {name: before[name] for name in after}
    assert after["idmapped_layers"].available
