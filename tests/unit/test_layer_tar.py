from __future__ import annotations

import io
import tarfile

from merged import merge

from flatmount.image.layer_tar import (
    TIMESTAMP,
    LayerTar,
    follow_links,
    join_archives,
    read_members,
    top_level_links,
)


def _names(archive: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
        return tar.getnames()


def _gnu(*entries: tuple[str, bytes, bytes, str]) -> bytes:
    """An archive as dpkg makes them: names with ./ in front, GNU records for long ones."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind, data, link in entries:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(data), link
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


DIR, REG, SYM, LNK = tarfile.DIRTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


def test_parents_come_first_and_once_with_the_modes_they_have() -> None:
    tar = LayerTar()
    tar.file("root/a", b"1")
    tar.file("root/b/c", b"2", owner=(7, 8))
    tar.file("tmp/d", b"3")
    tree = merge([archive := tar.finish()])
    assert _names(archive) == ["root", "root/a", "root/b", "root/b/c", "tmp", "tmp/d"]
    assert [tree[name].info.mode for name in ("root", "root/b", "tmp")] == [0o700, 0o755, 0o1777]
    assert (tree["root/b/c"].info.uid, tree["root/b/c"].info.gid) == (7, 8)
    assert {entry.info.mtime for entry in tree.values()} == {TIMESTAMP}


def test_join_keeps_bytes_and_drops_repeated_directories() -> None:
    long = "./usr/" + "l" * 200
    one = _gnu(("./", DIR, b"", ""), ("./usr/", DIR, b"", ""), (long, REG, b"long" * 300, ""))
    two = _gnu(("./", DIR, b"", ""), ("./usr/", DIR, b"", ""), ("./z", REG, b"z", ""), ("./usr/z", LNK, b"", "./z"))
    joined = join_archives([one, two])
    assert _names(joined) == [".", "./usr", long, "./z", "./usr/z"]
    assert merge([joined])[long[2:]].data == b"long" * 300
    assert merge([joined])["usr/z"].data == b"z"
    assert len(joined) % tarfile.BLOCKSIZE == 0 and joined.endswith(bytes(1024))


def test_entries_behind_links_of_a_merged_usr_move_there() -> None:
    base = _gnu(("./", DIR, b"", ""), ("./bin", SYM, b"", "usr/bin"), ("./var/run", SYM, b"", "/run"))
    links = top_level_links(base)
    assert links == {"bin"}
    assert follow_links(base, links) is base
    long = "./bin/" + "l" * 200
    package = _gnu(
        ("./bin/", DIR, b"", ""),
        ("./bin/sh", REG, b"sh", ""),
        ("./bin/hard", LNK, b"", "./bin/sh"),
        (long, REG, b"long", ""),
        ("./usr/lib/link", SYM, b"", "/bin/sh"),
    )
    moved = follow_links(package, links)
    tree = merge([base, moved])
    assert tree["bin"].info.issym()
    assert tree["usr/bin/sh"].data == tree["usr/bin/hard"].data == b"sh"
    assert tree[f"usr/{long[2:]}"].data == b"long"
    assert tree["usr/lib/link"].info.linkname == "/bin/sh"
    assert follow_links(package, frozenset()) is package


def test_long_names_of_pax_archives_move_too() -> None:
    tar = LayerTar()
    tar.file("bin/" + "n" * 200, b"x")
    assert "usr/bin/" + "n" * 200 in merge([follow_links(tar.finish(), frozenset({"bin"}))])


def test_members_are_found_with_and_without_the_dot() -> None:
    archive = _gnu(("./etc/a", REG, b"1", ""), ("etc/b", REG, b"2", ""), ("./etc/c", SYM, b"", "a"))
    assert read_members(archive, ["etc/a", "etc/b", "etc/c", "etc/d"]) == {"etc/a": b"1", "etc/b": b"2"}
