"""`flatmount snapshotter diff`: a mapped container's layer, applied to its image, gives what the container sees."""

from __future__ import annotations

import os
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from flatmount.kernel.namespaces import user_namespace
from flatmount.plan.mapping import Mapping
from tests.snapshotting import Client, Daemon, mounted

FIRST = 500000
RANGE = f"0:{FIRST}:65536"
ACL = "system.posix_acl_access"
# cap_net_raw=ep: linux/capability.h, VFS_CAP_REVISION_2; the kernel makes it the container's root's in a namespace
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)


def acl(user: int) -> bytes:
    entries = ((1, 6, 2**32 - 1), (2, 4, user), (4, 4, 2**32 - 1), (16, 4, 2**32 - 1), (32, 4, 2**32 - 1))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def tree(root: Path, shift: int) -> dict[str, tuple[object, ...]]:
    """What a container sees, its owners moved back by `shift`."""
    found: dict[str, tuple[object, ...]] = {}
    links: dict[int, list[str]] = {}
    paths = [Path(base) / name for base, names, files in os.walk(root) for name in (*names, *files)]
    for path in (root, *paths):
        status = path.lstat()
        name = str(path.relative_to(root))
        content: object = ""
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
            links.setdefault(status.st_ino, []).append(name)
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif stat.S_ISCHR(status.st_mode):
            content = status.st_rdev
        attributes = {
            one: os.getxattr(path, one, follow_symlinks=False) for one in os.listxattr(path, follow_symlinks=False)
        }
        if "security.capability" in attributes:
            attributes["security.capability"] = attributes["security.capability"][4:20]
        if ACL in attributes:
            entries = struct.iter_unpack("<HHI", attributes[ACL][4:])
            attributes[ACL] = repr(
                [(tag, perm, one - shift if tag == 2 else one) for tag, perm, one in entries]
            ).encode()
        time = 0 if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns
        owners = (status.st_uid - shift, status.st_gid - shift)
        found[name] = (status.st_mode, *owners, time, content, sorted(attributes.items()))
    groups = sorted(sorted(names) for names in links.values() if len(names) > 1)
    return {**found, "/links": tuple(groups)}


def apply(layer: Path, root: Path) -> None:
    """A layer's changes, as the image specification says; by hand, so that nothing of ours checks itself."""
    with tarfile.open(layer) as tar:
        for entry in tar:
            path = root / entry.name
            if path.name == ".wh..wh..opq":
                for below in path.parent.iterdir():
                    remove(below)
                continue
            if path.name.startswith(".wh."):
                remove(path.parent / path.name.removeprefix(".wh."))
                continue
            if entry.isdir():
                if path.is_symlink() or (path.exists() and not path.is_dir()):
                    remove(path)
                path.mkdir(exist_ok=True)
            else:
                if os.path.lexists(path):
                    remove(path)
                if entry.islnk():
                    os.link(root / entry.linkname, path)
                    continue
                if entry.issym():
                    os.symlink(entry.linkname, path)
                elif entry.isreg():
                    content = tar.extractfile(entry)
                    assert content is not None
                    path.write_bytes(content.read())
                elif entry.isfifo():
                    os.mkfifo(path)
                else:
                    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(entry.devmajor, entry.devminor))
            os.chown(path, entry.uid, entry.gid, follow_symlinks=False)
            if not entry.issym():
                path.chmod(entry.mode)
            for name, value in entry.pax_headers.items():
                if name.startswith("SCHILY.xattr."):
                    raw = value.encode("utf-8", "surrogateescape")
                    os.setxattr(path, name.removeprefix("SCHILY.xattr."), raw, follow_symlinks=False)
            whole, _, rest = entry.pax_headers.get("mtime", str(int(entry.mtime))).partition(".")
            moment = int(whole) * 10**9 + int(rest.ljust(9, "0") or 0)
            os.utime(path, ns=(moment, moment), follow_symlinks=False)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def base(root: Path) -> None:
    for name in ("keep", "opaque", "gone", "types"):
        (root / name).mkdir()
        (root / name / "file").write_text(name)
    (root / "owned").write_text("seven\n")
    os.chown(root / "owned", 7, 8)
    os.symlink("owned", root / "link")


CHANGES = """
set -e
rm -r gone
rm -r opaque; mkdir opaque; echo new > opaque/new
echo more >> keep/file; mkdir -p keep/deep/er; echo x > keep/deep/er/file; ln keep/deep/er/file keep/second
rm types/file; mkdir types/file; echo in > types/file/in
rm link; ln -s keep link
mkfifo pipe; echo set > suid; chmod 4755 suid
touch -d @1234567890.123456789 keep/second
chmod 1777 .
echo x > user; chown 1000:1001 user
"""
# What a shell cannot; values as the container sees them.
MORE = """
import os, sys
os.setxattr("user", "user.note", b"bytes \\xff\\x00 too")
os.setxattr("user", "system.posix_acl_access", bytes.fromhex(sys.argv[1]))
os.setxattr("suid", "security.capability", bytes.fromhex(sys.argv[2]))
open(b"name\\xff", "w").write("not UTF-8")
"""


@pytest.mark.parametrize("mapping", [RANGE, None])
def test_a_layer_gives_what_the_container_sees(
    client: Client, daemon: Daemon, tmp_path: Path, mapping: str | None
) -> None:
    with mounted(client.prepare("key"), tmp_path / "root") as root:
        base(root)
    client.commit("image", "key")
    shift = FIRST if mapping else 0
    labels = {} if mapping is None else {"mapping": mapping}
    layer = tmp_path / "layer.tar"
    with mounted(client.prepare("default/3/container", "image", **labels), tmp_path / "root") as root:
        inside = []
        if mapping is not None:
            namespace = user_namespace(Mapping.parse(mapping))
            inside = ["nsenter", f"--user=/proc/{os.getpid()}/fd/{namespace.fileno()}", "--setuid=0", "--setgid=0"]
        subprocess.run([*inside, "sh", "-c", CHANGES], cwd=root, check=True)
        values = (acl(1000).hex(), CAPABILITY.hex())
        subprocess.run([*inside, "/usr/bin/python3", "-c", MORE, *values], cwd=root, check=True)
        if mapping is None:  # a container in a user namespace can make none
            os.mknod(root / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        seen = tree(root, shift)
        command = [sys.executable, "-m", "flatmount", "snapshotter", "diff", "container", "--root", str(daemon.root)]
        done = subprocess.run([*command, "--output", str(layer)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    with tarfile.open(layer) as tar:
        names = {entry.name for entry in tar}
    assert {".wh.gone", "opaque/.wh..wh..opq", "types/file", "keep/file"} <= names
    assert "owned" not in names, "what did not change is in no layer"
    with mounted(client.prepare("applied", "image"), tmp_path / "root") as root:
        apply(layer, root)
        assert tree(root, 0) == seen
    piped = subprocess.run(command, capture_output=True, check=True)
    assert piped.stdout == layer.read_bytes()


def test_what_cannot_be_a_layer_is_said(client: Client, daemon: Daemon, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flatmount", "snapshotter", "diff", "--root", str(daemon.root)]
    done = subprocess.run([*command, "nobody"], capture_output=True, text=True, check=False)
    assert (done.returncode, "does not exist" in done.stderr) == (1, True)
    with mounted(client.prepare("a/1/same"), tmp_path / "root") as root:
        (root / ".wh.name").write_text("")
    client.prepare("b/2/same")
    done = subprocess.run([*command, "same"], capture_output=True, text=True, check=False)
    assert (done.returncode, "several snapshots" in done.stderr) == (2, True)
    done = subprocess.run([*command, "a/1/same"], capture_output=True, text=True, check=False)
    assert (done.returncode, "OCI keeps" in done.stderr) == (1, True)
