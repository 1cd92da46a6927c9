"""Workplaces of killed commands: cleared, or told about and left, but never in the way of the next command."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from flatmount.rootfs.workplace import sweep, workplace

GONE = f"storm.{2**22 + 1}-1"


def leave(run: Path, name: str, elsewhere: list[object]) -> Path:
    """What a killed command left: its directory and its record."""
    path = run / "work" / name
    path.mkdir(parents=True)
    path.with_name(f"{name}.json").write_text(json.dumps({"elsewhere": elsewhere}))
    return path


def test_one_bad_entry_is_told_and_the_others_are_cleared(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a directory")
    bad = leave(tmp_path, f"a{GONE}", [str(file / "below" / "it")])
    good = leave(tmp_path, f"b{GONE}", [])
    odd = leave(tmp_path, f"c{GONE}", [7, None])
    told: list[str] = []
    assert sweep(str(tmp_path), told.append) == (good.name, odd.name)
    assert len(told) == 1
    assert bad.name in told[0]
    assert "ENOTDIR" in told[0]
    assert bad.exists()
    assert not good.exists()


def test_uppers_whose_parent_was_removed_meanwhile_count_as_gone(tmp_path: Path) -> None:
    path = leave(tmp_path, GONE, [str(tmp_path / "removed" / "uppers")])
    told: list[str] = []
    assert sweep(str(tmp_path), told.append) == (GONE,)
    assert not told
    assert not path.exists()
    assert os.listdir(tmp_path / "work") == []


def test_what_is_mounted_elsewhere_is_taken_off_before_anything_is_removed(tmp_path: Path, ram: Path) -> None:
    (ram / "kept").write_text("kept")
    storage = tmp_path / "storage"
    with workplace(str(tmp_path / "run"), "storm", elsewhere=(str(storage),)):
        (storage / "merged").mkdir()
        subprocess.run(["mount", "--bind", ram, storage / "merged"], check=True)
    assert not storage.exists()
    assert (ram / "kept").read_text() == "kept"


def test_what_cannot_be_cleared_is_told_and_what_was_done_is_not_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    with workplace(str(tmp_path / "run"), "storm", elsewhere=(str(parent / "storage"),)) as path:
        (parent / "storage").rmdir()
        parent.rmdir()
        parent.write_text("not a directory")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and path in said and "ENOTDIR" in said
    assert Path(f"{path}.json").exists(), "the next sweep knows of it"


def test_a_mount_in_a_workplace_is_taken_off(tmp_path: Path) -> None:
    path = leave(tmp_path, GONE, [])
    subprocess.run(["mount", "-t", "tmpfs", "left", path], check=True)
    assert sweep(str(tmp_path)) == (GONE,)
    with workplace(str(tmp_path), "next") as place:
        assert os.path.ismount(place)
