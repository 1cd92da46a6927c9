"""The user database of an image is data of a stranger."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flatmount.errors import FlatmountError, MappingError, UsageError
from flatmount.plan.mapping import Mapping
from flatmount.runtime.users import User, require_mapped, resolve

PASSWD = "root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n12:x:77:77::/:/bin/sh\n"
GROUP = "root:x:0:\naudio:x:29:app,other\nvideo:x:44:root, app\nwheel:x:10:app\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / "root/etc/passwd").write_text(PASSWD)
    (tmp_path / "root/etc/group").write_text(GROUP)
    return tmp_path / "root"


@pytest.fixture
def root_fd(root: Path) -> Iterator[int]:
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("", User(0, 0, (44,), "/root")),
        ("app", User(1000, 1001, (10, 29), "/home/app")),
        ("1000", User(1000, 1001, (10, 29), "/home/app")),
        ("app:audio", User(1000, 29, (), "/home/app")),
        ("app:5", User(1000, 5, (), "/home/app")),
        ("app:", User(1000, 1001, (10, 29), "/home/app")),
        (":audio", User(0, 29, (), "/root")),
        ("4242", User(4242, 0, (), "")),
        ("12", User(12, 0, (), "")),  # an id goes before a name that looks like one
        ("4294967294", User(4294967294, 0, (), "")),
    ],
)
def test_names_and_ids(root_fd: int, asked: str, expected: User) -> None:
    assert resolve(root_fd, asked) == expected


@pytest.mark.parametrize("asked", ["4294967295", "99999999999999999999999", "0:4294967295"])
def test_no_process_can_have_that_id(root_fd: int, asked: str) -> None:
    with pytest.raises(UsageError, match="no process can have"):
        resolve(root_fd, asked)


@pytest.mark.parametrize("asked", ["nobody", "app:nogroup", "../root", "app ", "٣"])
def test_a_name_that_is_not_there(root_fd: int, asked: str) -> None:
    with pytest.raises(FlatmountError, match="is not in the image"):
        resolve(root_fd, asked)


def test_ids_work_without_a_database(root: Path, root_fd: int) -> None:
    (root / "etc/passwd").unlink()
    (root / "etc/group").unlink()
    assert resolve(root_fd, "5:6") == User(5, 6, (), "")
    with pytest.raises(FlatmountError, match="not in the image"):
        resolve(root_fd, "root")


@pytest.mark.parametrize("link", ["/outside/passwd", "../../outside/passwd", "../../../../../../outside/passwd"])
def test_a_link_leads_nowhere_outside(tmp_path: Path, root: Path, root_fd: int, link: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/passwd").write_text("spy:x:1:1::/:/bin/sh\n")
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").symlink_to(str(tmp_path) + link if link.startswith("/") else link)
    with pytest.raises(FlatmountError, match="not in the image"):
        resolve(root_fd, "spy")
    (root / "outside").mkdir()
    (root / "outside/passwd").write_text("inner:x:9:9::/:/bin/sh\n")
    if link.startswith(".."):
        assert resolve(root_fd, "inner").uid == 9


def test_a_magic_link_is_not_followed(root: Path, root_fd: int) -> None:
    (root / "etc").joinpath("passwd").unlink()
    (root / "etc/passwd").symlink_to("/proc/self/root/etc/passwd")
    with pytest.raises(FlatmountError, match="not in the image"):
        resolve(root_fd, "root")


def test_what_is_no_file_is_not_opened(root: Path, root_fd: int) -> None:
    (root / "etc/passwd").unlink()
    os.mkfifo(root / "etc/passwd")
    with pytest.raises(FlatmountError, match="is not a file"):
        resolve(root_fd, "root")
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").mkdir()
    with pytest.raises(FlatmountError, match="is not a file"):
        resolve(root_fd, "root")


def test_a_huge_database_is_refused_before_it_is_read(root: Path, root_fd: int) -> None:
    os.truncate(root / "etc/passwd", 1 << 40)
    with pytest.raises(FlatmountError, match="larger than any"):
        resolve(root_fd, "root")


def test_malformed_lines_are_nobody(root: Path, root_fd: int) -> None:
    (root / "etc/passwd").write_bytes(
        b"a:x:-1:0::/:\nb:x:5\n#c:x:3:3::/:\nd:x:0x10:3::/:\ne:x:4294967295:3::/:\n\xff:x:6:6::/:/\n"
    )
    for name in "abcde":
        with pytest.raises(FlatmountError):
            resolve(root_fd, name)


def test_a_user_beyond_the_range_is_refused() -> None:
    mapping = Mapping.single(100000, 1000)
    require_mapped(User(999, 999, (998,), ""), mapping)
    for user in (User(1000, 0, (), ""), User(0, 1000, (), ""), User(0, 0, (1000,), "")):
        with pytest.raises(MappingError):
            require_mapped(user, mapping)
