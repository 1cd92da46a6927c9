"""The generated layers of the demo image: what package scripts would have set up, and changes of every shape.

A stack is, lowest first: the packages, with `early_trim` in the middle where there are enough of them; `setup`;
as many `filler` layers as are wanted; `trim`, `replace` and `restore`. All pure: facts in, archives out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flatmount.image.layer_tar import LayerTar

APP_UID = 1000
PLACE = "srv/demo"  # where everything is that is made to be changed by a higher layer

# cap_net_bind_service+ep as vfs_cap_data version 2 (linux/capability.h); every byte is also valid UTF-8, as the
# record of an extended attribute in a tar archive has to be for Python's tarfile.
_CAPABILITY = "\x01\x00\x00\x02\x00\x04\x00\x00" + "\x00" * 12
_LONGEST_NAME = "n" * 255

_PASSWD = """\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
_GROUP = """\
root:x:0:
daemon:x:1:
shadow:x:42:
nogroup:x:65534:
"""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a package manager's scripts make on a real system: user database, files from templates, links."""

    passwd: str = _PASSWD
    group: str = _GROUP
    files: tuple[tuple[str, bytes], ...] = ()
    links: tuple[tuple[str, str], ...] = ()


def setup(facts: Setup) -> bytes:
    """The user database with a user `app`, templates put in place, and the material for later changes."""
    tar = LayerTar()
    # Debian's masters have "*" for the password: no login, and no need for a shadow file to say so.
    passwd = facts.passwd.replace(":*:", ":x:")
    tar.file("etc/passwd", f"{passwd}app:x:{APP_UID}:{APP_UID}:demo user:/home/app:/bin/sh\n".encode())
    tar.file("etc/group", f"{facts.group.replace(':*:', ':x:')}app:x:{APP_UID}:\n".encode())
    names = [line.split(":")[0] for line in passwd.splitlines()]
    shadow = "".join(f"{name}:*:19723:0:99999:7:::\n" for name in [*names, "app"])
    tar.file("etc/shadow", shadow.encode(), mode=0o640, owner=(0, _gid_of("shadow", facts.group)))
    tar.directory("home/app", mode=0o750, owner=(APP_UID, APP_UID))
    tar.file("home/app/.profile", b"umask 022\n", owner=(APP_UID, APP_UID))
    for path, data in facts.files:
        tar.file(path, data)
    for path, target in facts.links:
        tar.symlink(path, target)
    _attributes(tar)
    _material(tar)
    return tar.finish()


def early_trim() -> bytes:
    """In the middle of the packages: drops the manual pages of those below; those above bring theirs."""
    tar = LayerTar()
    tar.remove("usr/share/man")
    tar.remove("usr/share/lintian")
    return tar.finish()


def filler(number: int) -> bytes:
    """Small layer `number`, from 1: adds a file, replaces one of the layer before, drops an older one."""
    tar = LayerTar()
    here = f"{PLACE}/fill"
    tar.file(f"{here}/latest", f"{number}\n".encode())
    tar.file(f"{here}/{number % 10}/{number:04}", f"layer {number}\n".encode() * (number % 50 + 1))
    if number % 3 == 0:
        tar.remove(f"{here}/{(number - 2) % 10}/{number - 2:04}")
    return tar.finish()


def trim(*, packages: bool) -> bytes:
    """Removes: whiteouts of a file, a directory, one of two hard links, and directories emptied by opaque markers."""
    tar = LayerTar()
    tar.remove(f"{PLACE}/removed-file")
    tar.remove(f"{PLACE}/removed-dir")
    tar.remove(f"{PLACE}/again")
    tar.remove(f"{PLACE}/hard/third")
    tar.hide(f"{PLACE}/opaque")
    tar.file(f"{PLACE}/opaque/new", b"new\n")
    if packages:
        tar.remove("usr/share/locale")
        tar.hide("usr/share/man")
        tar.file("usr/share/man/README", b"This image has no manual pages.\n")
        tar.remove("etc/update-motd.d")
    return tar.finish()


def replace() -> bytes:
    """Replaces: a file by a file, a directory by a file and by a link, a file by a directory, a link by a directory."""
    tar = LayerTar()
    tar.file("etc/issue", b"flatmount demo image\n")
    tar.file(f"{PLACE}/replaced-file", b"replaced\n", mode=0o600, owner=(APP_UID, APP_UID))
    tar.file(f"{PLACE}/dir-to-file", b"now a file\n")
    tar.file(f"{PLACE}/short-lived", b"for one layer\n")
    tar.symlink(f"{PLACE}/dir-to-link", "opaque")
    tar.file(f"{PLACE}/file-to-dir/inside", b"now in a directory\n")
    tar.file(f"{PLACE}/link-to-dir/own", b"not behind the link\n")
    tar.directory(f"{PLACE}/kept-dir", mode=0o2770, owner=(0, APP_UID))
    return tar.finish()


def restore() -> bytes:
    """Brings back under removed names, drops what the layer below made, and adds to a directory that was hidden."""
    tar = LayerTar()
    tar.file(f"{PLACE}/again/second", b"second\n")
    tar.remove(f"{PLACE}/short-lived")
    tar.file(f"{PLACE}/replaced-late", b"replaced late\n")
    tar.file(f"{PLACE}/opaque/newer", b"newer\n")
    tar.file(f"{PLACE}/hard/first", b"no longer one of a pair\n")
    return tar.finish()


# What the root file system of every demo image shows beneath PLACE once its layers are merged, and what it does not.
HOLDS: Mapping[str, bytes] = {
    f"{PLACE}/again/second": b"second\n",
    f"{PLACE}/dir-to-file": b"now a file\n",
    f"{PLACE}/file-to-dir/inside": b"now in a directory\n",
    f"{PLACE}/hard/first": b"no longer one of a pair\n",
    f"{PLACE}/hard/second": b"one of three\n",
    f"{PLACE}/kept-dir/below": b"below\n",
    f"{PLACE}/link-to-dir/own": b"not behind the link\n",
    f"{PLACE}/names/{_LONGEST_NAME}": b"255 bytes\n",
    f"{PLACE}/names/größe 日本": b"unicode\n",
    f"{PLACE}/opaque/new": b"new\n",
    f"{PLACE}/opaque/newer": b"newer\n",
    f"{PLACE}/replaced-file": b"replaced\n",
    f"{PLACE}/replaced-late": b"replaced late\n",
    f"{PLACE}/target/kept": b"kept\n",
}
GONE: frozenset[str] = frozenset(
    {
        f"{PLACE}/again/first",
        f"{PLACE}/hard/third",
        f"{PLACE}/opaque/old",
        f"{PLACE}/opaque/sub",
        f"{PLACE}/removed-dir",
        f"{PLACE}/removed-file",
        f"{PLACE}/short-lived",
        f"{PLACE}/target/own",
    }
)


def _attributes(tar: LayerTar) -> None:
    here = f"{PLACE}/attributes"
    script = b"#!/bin/sh\nid\n"
    tar.directory(here)
    tar.file(f"{here}/setuid", script, mode=0o4755)
    tar.file(f"{here}/setgid", script, mode=0o2755, owner=(0, APP_UID))
    tar.file(f"{here}/capable", script, mode=0o755, xattrs={"security.capability": _CAPABILITY})
    tar.directory(f"{here}/shared", mode=0o1777)
    tar.file(f"{here}/nobody", b"the highest id of a usual range\n", owner=(65534, 65534))


def _material(tar: LayerTar) -> None:
    tar.file(f"{PLACE}/removed-file", b"old\n")
    tar.file(f"{PLACE}/replaced-late", b"old\n")
    tar.file(f"{PLACE}/removed-dir/one", b"old\n")
    tar.file(f"{PLACE}/removed-dir/deep/two", b"old\n")
    tar.file(f"{PLACE}/opaque/old", b"old\n")
    tar.file(f"{PLACE}/opaque/sub/old", b"old\n")
    tar.file(f"{PLACE}/again/first", b"first\n")
    tar.file(f"{PLACE}/replaced-file", b"old, and longer than what replaces it\n")
    tar.file(f"{PLACE}/dir-to-file/old", b"old\n")
    tar.file(f"{PLACE}/dir-to-link/old", b"old\n")
    tar.file(f"{PLACE}/file-to-dir", b"old\n")
    tar.file(f"{PLACE}/target/kept", b"kept\n")
    tar.symlink(f"{PLACE}/link-to-dir", "target")
    tar.file(f"{PLACE}/kept-dir/below", b"below\n")
    tar.file(f"{PLACE}/hard/first", b"one of three\n")
    tar.hardlink(f"{PLACE}/hard/second", f"{PLACE}/hard/first")
    tar.hardlink(f"{PLACE}/hard/third", f"{PLACE}/hard/first")
    tar.file(f"{PLACE}/names/{_LONGEST_NAME}", b"255 bytes\n")
    tar.file(f"{PLACE}/names/größe 日本", b"unicode\n")


def _gid_of(name: str, group: str) -> int:
    for line in group.splitlines():
        fields = line.split(":")
        if fields[0] == name:
            return int(fields[2])
    return 0
