"""Blobs that came in part: one writer, bounded, and nothing else in the directory is touched."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from flatmount.image.partial import collect_partials, drop_partial, open_partial, partials, strangers

ONE = "sha256:" + "1" * 64
TWO = "sha512:" + "2" * 128


def kept(directory: Path, digest: str, data: bytes) -> Path:
    path = directory / digest.replace(":", "-")
    path.write_bytes(data)
    return path


def opened(directory: Path, digest: str, size: int) -> tuple[int, int]:
    found = open_partial(str(directory), digest, size)
    assert found is not None
    return found


def test_what_is_kept_is_gone_on_with_by_one_writer(tmp_path: Path) -> None:
    fd, have = opened(tmp_path, ONE, 10)
    assert (have, stat.S_IMODE(os.fstat(fd).st_mode)) == (0, 0o600)
    os.write(fd, b"12345")
    assert open_partial(str(tmp_path), ONE, 10) is None
    assert partials(str(tmp_path)) == collect_partials(str(tmp_path)) == ()
    os.close(fd)
    assert [(found.digest, found.size_bytes) for found in partials(str(tmp_path))] == [(ONE, 5)]
    fd, have = opened(tmp_path, ONE, 10)
    assert (have, os.pread(fd, 10, 0)) == (5, b"12345")
    # Dropped under its writer, who goes on; the next one begins anew.
    drop_partial(str(tmp_path), ONE)
    other, have = opened(tmp_path, ONE, 10)
    assert have == 0
    os.close(fd)
    os.close(other)


def test_more_than_there_can_be_is_thrown_away(tmp_path: Path) -> None:
    kept(tmp_path, ONE, b"x" * 11)
    fd, have = opened(tmp_path, ONE, 10)
    assert (have, os.fstat(fd).st_size) == (0, 0)
    os.close(fd)


def test_collection_knows_age_and_touches_nothing_else(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("here")
    place = tmp_path / "partial"
    place.mkdir()
    old, young = kept(place, ONE, b"1"), kept(place, TWO, b"22")
    os.utime(old, (1, 1))
    (place / "sha256-short").write_text("no digest")
    (place / f"sha256-{'3' * 64}").symlink_to(outside)
    (place / f"sha256-{'4' * 64}").mkdir()
    os.mkfifo(place / f"sha256-{'5' * 64}")
    assert [found.digest for found in collect_partials(str(place), older_than_s=60)] == [ONE]
    assert young.exists()
    assert [found.digest for found in collect_partials(str(place))] == [TWO]
    assert outside.read_text() == "here"
    assert len(os.listdir(place)) == 4
    assert strangers(str(place)) == ["sha256-short"]
    with pytest.raises(OSError, match="symbolic"):
        open_partial(str(place), "sha256:" + "3" * 64, 10)
    assert outside.read_text() == "here"


def test_no_place_is_nothing_kept(tmp_path: Path) -> None:
    assert partials(str(tmp_path / "none")) == ()
    with pytest.raises(FileNotFoundError):
        open_partial(str(tmp_path / "none"), ONE, 1)


def test_a_link_in_the_places_place_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    kept(outside, ONE, b"1")
    (tmp_path / "partial").symlink_to(outside)
    assert partials(str(tmp_path / "partial")) == collect_partials(str(tmp_path / "partial")) == ()
    assert len(os.listdir(outside)) == 1
