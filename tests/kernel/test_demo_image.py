"""The demo image of real packages, unpacked layer by layer with the simplest means, and run."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from flatmount.image import demo_layers
from flatmount.image.demo import DemoImage, Source, build_demo, default_cache

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("apt-get", "dpkg-deb"))),
    reason="machine cannot: the image of packages needs apt-get and dpkg-deb",
)


def _blob(image: DemoImage, digest: str) -> str:
    return os.path.join(image.path, "blobs", "sha256", digest.removeprefix("sha256:"))


def _unpack(image: DemoImage, root: Path) -> None:
    root.mkdir()
    manifest = json.loads(Path(_blob(image, image.manifest_digest)).read_bytes())
    for layer in manifest["layers"]:
        with gzip.open(_blob(image, layer["digest"])) as plain, tarfile.open(fileobj=plain, mode="r|") as tar:
            for member in tar:
                _apply(tar, member, root)


def _apply(tar: tarfile.TarFile, member: tarfile.TarInfo, root: Path) -> None:
    path = root / member.name
    if path.name == ".wh..wh..opq":
        for child in path.parent.iterdir():
            _remove(child)
    elif path.name.startswith(".wh."):
        _remove(path.with_name(path.name.removeprefix(".wh.")))
    else:
        if not (member.isdir() and path.is_dir() and not path.is_symlink()):
            _remove(path)
        tar.extract(member, root, numeric_owner=True, filter="fully_trusted")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _run(root: Path, *command: str) -> str:
    chroot = shutil.which("chroot", path=os.defpath + ":/usr/sbin:/sbin")
    assert chroot
    answer = subprocess.run([chroot, root, *command], capture_output=True, text=True, timeout=60, env={})
    assert (answer.returncode, answer.stderr) == (0, "")
    return answer.stdout


@pytest.mark.parametrize("layers", [5, 60])
def test_python_and_shell_run_in_the_merged_layers(tmp_path: Path, layers: int) -> None:
    image = build_demo(str(tmp_path / "image"), layers=layers, cache=default_cache())
    assert image.source is Source.DEBIAN, image.why_not_packages
    assert image.layers == layers
    root = tmp_path / "root"
    _unpack(image, root)

    program = "import ssl, sqlite3, ctypes, zlib, pwd; print(pwd.getpwnam('app').pw_uid, len(pwd.getpwall()) > 10)"
    assert _run(root, "/usr/bin/python3", "-W", "error", "-c", program) == "1000 True\n"
    assert _run(root, "/bin/sh", "-c", "PATH=/usr/bin:/bin; echo one | sed s/one/two/; cat /etc/issue") == (
        "two\nflatmount demo image\n"
    )
    assert _run(root, "/bin/bash", "-c", "PATH=/usr/bin:/bin; awk 'BEGIN { print 6 * 7 }'; stat -c %U /home/app") == (
        "42\napp\n"
    )
    assert {path: (root / path).read_bytes() for path in demo_layers.HOLDS} == dict(demo_layers.HOLDS)
    assert not [path for path in demo_layers.GONE if os.path.lexists(root / path)]
    assert sorted(os.listdir(root / "usr/share/man")) == ["README"]
    assert not (root / "usr/share/locale").exists()
    assert len(os.listdir(root / "usr/share/doc")) >= len(image.packages)
