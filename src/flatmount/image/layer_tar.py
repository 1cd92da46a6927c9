"""Makes and joins layer archives in memory. The same calls give the same bytes."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence

TIMESTAMP = 1_704_067_200  # 2024-01-01T00:00:00Z: every time stamp that no package brings along
WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"

_END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)
_DIRECTORY_MODES = {"root": 0o700, "tmp": 0o1777, "var/tmp": 0o1777}


class LayerTar:
    """Builds one layer's archive, entry by entry.

    Paths are relative to the root. Parent directories are written before their first entry, with the mode they have
    in Debian: in a stack of layers the topmost entry of a directory says what its attributes are.
    """

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.TarFile(fileobj=self._buffer, mode="w", format=tarfile.PAX_FORMAT)
        self._directories: set[str] = set()

    def directory(self, path: str, *, mode: int | None = None, owner: tuple[int, int] = (0, 0)) -> None:
        """Add a directory; `owner` is (uid, gid)."""
        if path in self._directories:
            return
        self._directories.add(path)
        self._entry(path, tarfile.DIRTYPE, mode if mode is not None else _DIRECTORY_MODES.get(path, 0o755), owner)

    def file(
        self,
        path: str,
        data: bytes,
        *,
        mode: int = 0o644,
        owner: tuple[int, int] = (0, 0),
        xattrs: Mapping[str, str] | None = None,
    ) -> None:
        """Add a regular file, with extended attributes as the `SCHILY.xattr.` records that layers use."""
        records = {f"SCHILY.xattr.{name}": value for name, value in (xattrs or {}).items()}
        self._entry(path, tarfile.REGTYPE, mode, owner, data=data, pax_headers=records)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._entry(path, tarfile.SYMTYPE, 0o777, (0, 0), link=target)

    def hardlink(self, path: str, target: str) -> None:
        """Add a hard link to a file that this layer has already."""
        self._entry(path, tarfile.LNKTYPE, 0o644, (0, 0), link=target)

    def remove(self, path: str) -> None:
        """Add a whiteout: `path` of the layers below is gone."""
        parent, _, name = path.rpartition("/")
        self.file(f"{parent}/{WHITEOUT}{name}" if parent else f"{WHITEOUT}{name}", b"")

    def hide(self, path: str) -> None:
        """Add a directory that shows nothing of the layers below."""
        self.directory(path)
        self.file(f"{path}/{OPAQUE}", b"")

    def finish(self) -> bytes:
        """Close the archive and return it."""
        self._tar.close()
        return self._buffer.getvalue()

    def _entry(
        self,
        path: str,
        kind: bytes,
        mode: int,
        owner: tuple[int, int],
        *,
        data: bytes = b"",
        link: str = "",
        pax_headers: Mapping[str, str] | None = None,
    ) -> None:
        parent = path.rpartition("/")[0]
        if parent:
            self.directory(parent)
        info = tarfile.TarInfo(path)
        info.type, info.mode, info.linkname, info.size = kind, mode, link, len(data)
        info.uid, info.gid = owner
        info.mtime = TIMESTAMP
        info.pax_headers = dict(pax_headers or {})
        self._tar.addfile(info, io.BytesIO(data))


def normal_name(name: str) -> str:
    """An entry's name without the `./` in front and the `/` at the end that package archives have."""
    return name.removeprefix("./").rstrip("/") if name != "." else ""


def join_archives(archives: Sequence[bytes]) -> bytes:
    """Put several archives into one, byte for byte, a directory that several of them have only once."""
    seen: set[str] = set()
    pieces: list[bytes] = []
    for archive in archives:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
            members = tar.getmembers()
            ends = [member.offset for member in members[1:]] + [tar.offset]
        for member, end in zip(members, ends, strict=True):
            if member.isdir():
                name = normal_name(member.name)
                if name in seen:
                    continue
                seen.add(name)
            pieces.append(archive[member.offset : end])
    return b"".join([*pieces, _END_OF_ARCHIVE])


def top_level_links(archive: bytes) -> frozenset[str]:
    """The names at the root that the archive makes symbolic links into /usr of the same name (`bin` -> `usr/bin`)."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
        links = {normal_name(member.name): member.linkname for member in tar if member.issym()}
    return frozenset(name for name, target in links.items() if target.removeprefix("/") == f"usr/{name}")


def follow_links(archive: bytes, links: frozenset[str]) -> bytes:
    """The archive as a package manager would unpack it where `links` are symbolic links into /usr.

    A layer that brings `bin/` as a directory would replace the link `bin` of a lower layer and hide all behind it;
    such entries move to `usr/bin/`. An archive without them is returned as it is.
    """
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as source:
        members = source.getmembers()
        if not any(_beneath(member, links) for member in members):
            return archive
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as target:
            for member in members:
                name = normal_name(member.name)
                # Records of the old archive would win over what is set here.
                member.pax_headers = {k: v for k, v in member.pax_headers.items() if k not in ("path", "linkpath")}
                if _beneath(member, links):
                    if name in links:
                        continue
                    member.name = f"usr/{name}"
                if member.islnk() and normal_name(member.linkname).split("/")[0] in links:
                    member.linkname = f"usr/{normal_name(member.linkname)}"
                target.addfile(member, source.extractfile(member) if member.isreg() else None)
    return buffer.getvalue()


def read_members(archive: bytes, names: Sequence[str]) -> dict[str, bytes]:
    """The content of those regular files among `names` that the archive has."""
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
        for member in tar:
            name = normal_name(member.name)
            if name in names and member.isreg():
                content = tar.extractfile(member)
                found[name] = content.read() if content else b""
    return found


def _beneath(member: tarfile.TarInfo, links: frozenset[str]) -> bool:
    first, _, rest = normal_name(member.name).partition("/")
    return first in links and (bool(rest) or member.isdir())
