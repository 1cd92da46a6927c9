"""The archive reader against Python's writer, GNU tar's sparse forms, and bytes that are no archive."""

from __future__ import annotations

import io
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatmount.errors import BadImage
from flatmount.image.tar import Entry, Extent, Kind, TarReader


def reading(data: bytes, piece: int = 1 << 18) -> Callable[[int], bytes]:
    stream = io.BytesIO(data)
    return lambda size: stream.read(min(size, piece))


def entries(data: bytes, piece: int = 1 << 18) -> list[tuple[Entry, bytes]]:
    reader = TarReader(reading(data, piece))
    return [(entry, b"".join(bytes(part) for part in reader.data())) for entry in reader]


def archive(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def member(name: str, **more: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in more.items():
        setattr(info, key, value)
    return info


names = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=300)


@settings(max_examples=150)
@given(
    name=names.filter(lambda text: not text.endswith("/")),
    data=st.binary(max_size=2000),
    mode=st.integers(0, 0o7777),
    uid=st.integers(0, 2**32 - 2),
    gid=st.integers(0, 2**32 - 2),
    mtime=st.integers(0, 2**33),
    form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    piece=st.sampled_from([1, 7, 512, 1 << 18]),
)
def test_what_python_writes_is_read(
    name: str, data: bytes, mode: int, uid: int, gid: int, mtime: int, form: int, piece: int
) -> None:
    made = archive((member(name, mode=mode, uid=uid, gid=gid, mtime=mtime), data), (member("after"), b"z"), form=form)
    (entry, content), (after, z) = entries(made, piece)
    # Python takes slashes off the end of names and writes none of "/".
    assert entry.name == name.rstrip("/").encode()
    assert (entry.kind, entry.mode, entry.uid, entry.gid) == (Kind.FILE, mode, uid, gid)
    assert (entry.mtime_ns, entry.size, content) == (mtime * 10**9, len(data), data)
    assert (after.name, z) == (b"after", b"z")


def test_every_kind() -> None:
    kinds = {
        tarfile.REGTYPE: Kind.FILE,
        tarfile.AREGTYPE: Kind.FILE,
        tarfile.CONTTYPE: Kind.FILE,
        tarfile.LNKTYPE: Kind.LINK,
        tarfile.SYMTYPE: Kind.SYMLINK,
        tarfile.CHRTYPE: Kind.CHAR,
        tarfile.BLKTYPE: Kind.BLOCK,
        tarfile.DIRTYPE: Kind.DIRECTORY,
        tarfile.FIFOTYPE: Kind.FIFO,
    }
    made = archive(*((member("x", type=kind, linkname="t", devmajor=1, devminor=3), b"") for kind in kinds))
    found = [entry for entry, _ in entries(made)]
    assert [entry.kind for entry in found] == list(kinds.values())
    assert found[3].target == found[4].target == b"t"
    assert (found[5].major, found[5].minor) == (1, 3)


def test_times_are_exact() -> None:
    for text, expected in {
        "1.5": 1_500_000_000,
        "1600000000.123456789": 1_600_000_000_123_456_789,
        "1.1234567899": 1_123_456_789,
        "-1.25": -1_250_000_000,
        "7": 7_000_000_000,
    }.items():
        ((entry, _),) = entries(archive((member("a", pax_headers={"mtime": text}), b"")))
        assert entry.mtime_ns == expected


def test_attributes_are_bytes() -> None:
    made = archive((member("a", pax_headers={"SCHILY.xattr.user.x": "a=b\nc", "other": "ignored"}), b""))
    ((entry, _),) = entries(made)
    assert entry.xattrs == ((b"user.x", b"a=b\nc"),)


def test_a_global_header_changes_nothing() -> None:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "c", "path": "evil"}
    ) as tar:
        tar.addfile(member("a"))
    ((entry, _),) = entries(buffer.getvalue())
    assert entry.name == b"a"


@pytest.mark.skipif(shutil.which("tar") is None, reason="machine cannot: no GNU tar")
@pytest.mark.parametrize(
    "form", [["--format=gnu"], *(["--format=pax", f"--sparse-version={version}"] for version in ("0.0", "0.1", "1.0"))]
)
def test_sparse_files(tmp_path: Path, form: list[str]) -> None:
    block = 64 << 10
    with open(tmp_path / "sparse", "wb") as file:
        for at in range(1, 60, 2):
            file.seek(at * block)
            file.write(bytes([at]) * block)
        file.truncate(100 * block)
    (tmp_path / "plain").write_bytes(b"plain")
    subprocess.run(["tar", "-C", tmp_path, "-S", *form, "-cf", tmp_path / "t.tar", "sparse", "plain"], check=True)
    (entry, content), (_, plain) = entries((tmp_path / "t.tar").read_bytes())
    assert entry.name == b"sparse"
    assert entry.size == 100 * block
    assert entry.extents is not None
    rebuilt = bytearray(entry.size)
    at = 0
    for extent in entry.extents:
        rebuilt[extent.offset : extent.offset + extent.length] = content[at : at + extent.length]
        at += extent.length
    assert at == len(content)
    assert bytes(rebuilt) == (tmp_path / "sparse").read_bytes()
    assert plain == b"plain"


def sparse(numbers: str, data: bytes, real: int) -> bytes:
    headers = {"GNU.sparse.map": numbers, "GNU.sparse.size": str(real), "GNU.sparse.name": "s"}
    return archive((member("x", pax_headers=headers), data))


def test_a_sparse_map_is_checked() -> None:
    ((entry, _),) = entries(sparse("0,1,5,1,9,0", b"ab", 9))
    assert entry.extents == (Extent(0, 1), Extent(5, 1))
    for numbers, data, real in (
        ("0,2,1,1", b"abc", 9),  # overlaps
        ("5,1,0,1", b"ab", 9),  # goes back
        ("8,2", b"ab", 9),  # leaves the file
        ("0,1", b"ab", 9),  # less than there is
        ("0,3", b"ab", 9),  # more than there is
        ("0", b"", 9),  # half a pair
        ("0,x", b"", 9),
        ("-1,1", b"a", 9),
        ("99999999999999999999,1", b"a", 9),
    ):
        with pytest.raises(BadImage):
            entries(sparse(numbers, data, real))


def changed(data: bytes, at: int, value: bytes) -> bytes:
    """A header field replaced, with a checksum that fits."""
    block = bytearray(data)
    block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


PLAIN = archive((member("a"), b"x" * 600), form=tarfile.USTAR_FORMAT)
BROKEN = {
    "checksum": PLAIN[:100] + b"7" + PLAIN[101:],
    "size is no number": changed(PLAIN, 124, b"0000000x000\0"),
    "size is negative": changed(PLAIN, 124, b"\xff" * 12),
    "size is huge": changed(PLAIN, 124, b"\x80" + b"\xff" * 11),
    "uid is negative": changed(PLAIN, 108, b"\xff" * 8),
    "unknown type": changed(PLAIN, 156, b"Z"),
    "ends in a header": PLAIN[:300],
    "ends in the content": PLAIN[:900],
    "PAX record without a length": archive((member("a", pax_headers={"k": "v"}), b"")).replace(b"6 k=v\n", b"x k=v\n"),
    "PAX record past its end": archive((member("a", pax_headers={"k": "v"}), b"")).replace(b"6 k=v\n", b"9 k=v\n"),
    "PAX record without a space behind a good one": archive(
        (member("a", pax_headers={"k": "v", "z": "w"}), b"")
    ).replace(b"6 z=w\n", b"66z=w\n"),
    "extended header without its entry": archive((member("a", pax_headers={"k": "v"}), b""))[:1024] + bytes(1024),
    "extended header too large": archive((member("a", pax_headers={"k": "v" * (2 << 20)}), b"")),
    "long name without end": changed(changed(PLAIN[:512], 156, b"L"), 124, b"00000000000\0") * 100,
    "more after the end than padding": PLAIN + bytes((64 << 20) + 1024),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_archive_is_told(data: bytes) -> None:
    with pytest.raises(BadImage, match="tar entry at byte"):
        entries(data)


def test_damage_never_escapes_as_anything_else() -> None:
    """Bytes changed at random give entries or BadImage, never another error and never an endless loop."""
    chance = random.Random(20)
    whole = archive(
        (member("a", pax_headers={"SCHILY.xattr.user.x": "1"}), b"x" * 100),
        (member("b" * 200), b"y"),
        (member("c", type=tarfile.SYMTYPE, linkname="a"), b""),
    ) + sparse("0,1,5,1", b"ab", 9)
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            entries(bytes(data))
        except BadImage:
            continue


def test_the_end_may_come_right_after_the_last_content() -> None:
    whole = archive((member("a"), b"x"), (member("b"), b"content"))
    assert entries(whole[: 3 * 512 + 7]) == entries(whole)
    with pytest.raises(BadImage, match="within the content"):
        entries(whole[: 3 * 512 + 6])
