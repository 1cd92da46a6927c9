"""What goes wrong with a registry, and what comes right with one: a real one, and the command line."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from flatmount.cli.main import main
from flatmount.store import Store
from tests.e2e.conftest import CommandLine
from tests.e2e.test_gc import MAP, image
from tests.fake_registry import half, serve, status, tampered
from tests.registries import AUTH, LAYERS, Running, serving


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("registry"), "v1", "many", "alone") as running:
        yield running


class Inside(CommandLine):
    """The command line in this process: a new one costs 0.7 s of a processor each time."""

    def __call__(self, *arguments: str, expect: int = 0) -> str:
        code, out, err = self.outcome(*arguments)
        assert code == expect, f"{arguments}: {code}\n{out}\n{err}"
        return out if expect == 0 else err

    def outcome(self, *arguments: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            for name, value in self.environment().items():
                patch.setenv(name, value)
            code = main([*arguments])
        return code, out.getvalue(), err.getvalue()

    def finding(self, *arguments: str) -> str:
        """What is printed on stdout of a command that ends with a finding."""
        code, out, err = self.outcome(*arguments)
        assert (code, err) == (1, "")
        return out


@pytest.fixture
def line(tmp_path: Path) -> Inside:
    (tmp_path / "config.toml").write_text("version = 1\n")
    home = {"HOME": str(tmp_path), "FLATMOUNT_CONFIG": str(tmp_path / "config.toml")}
    return Inside(tmp_path / "root", tmp_path / "run", home)


def spoil(line: Inside, name: str, position: int) -> Path:
    """Another content of the one file of a layer, with its size and times; returns the layer's tree."""
    layer = line.root / "v1/data" / line.json("image", "show", name)["layer_list"][position]["path"]
    (path,) = (path for path in layer.rglob("*") if path.is_file())
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return layer


def layers(line: Inside) -> set[str]:
    return set(os.listdir(line.root / "v1/data/layers"))


def test_repair_from_the_registry_of_the_pull(line: Inside, registry: Running) -> None:
    line("image", "pull", f"{registry.host}/team/app:v1", "--plain-http", "--name", "mine")
    bad, before = spoil(line, "mine", 3), layers(line)
    # As in a store that was made before anything was kept of broken pulls.
    (line.root / "v1/partial").rmdir()
    said = line("fsck", "--repair", "--plain-http")
    assert "has other content" in said
    assert "unpacked again" in said
    # One layer is another one now, and every other tree is the one it was.
    assert layers(line) - before == {str(max(map(int, before)) + 1)}
    assert before - layers(line) == {bad.name}
    line("fsck")
    assert list((line.root / "v1/partial").iterdir()) == []


def test_repair_asks_for_the_bad_layer_alone(line: Inside) -> None:
    """Neither manifest nor config nor another layer, and not by a tag, which is another image by now."""
    with serve() as fake:
        fake.put_image(LAYERS, "v1")
        line("image", "pull", f"{fake.host}/team/app:v1", "--plain-http")
        name = f"{fake.host}/team/app:v1"
        blob = json.loads(fake.manifests["v1"][1])["layers"][2]["digest"]
        fake.put_image(LAYERS[:1], "v1")
        spoil(line, name, 2)
        fake.seen.clear()
        line("fsck", "--repair", "--plain-http")
        assert [seen.path for seen in fake.seen] == [f"/v2/team/app/blobs/{blob}"]
    line("fsck")


@pytest.mark.parametrize("named", ["", ":v1"])
def test_repair_from_a_registry_by_name(line: Inside, registry: Running, named: str) -> None:
    """An image that came on a stick: without a tag its own blobs are asked for, with one that image's."""
    line("image", "import", f"{registry.layout}:v1", "--name", "app", "--flatten", "first-use")
    spoil(line, "app", 0)
    assert "--from REGISTRY/NAME" in line.finding("fsck", "--repair")
    assert "unpacked again" in line("fsck", "--repair", "--plain-http", "--from", f"{registry.host}/team/app{named}")
    line("fsck")


def test_a_registry_that_cannot_repair_changes_nothing(line: Inside, registry: Running) -> None:
    line("image", "import", f"{registry.layout}:v1", "--name", "app", "--flatten", "first-use")
    spoil(line, "app", 0)
    before = layers(line)
    with serve() as fake:
        digest = fake.put_image(LAYERS, "v1")["digest"]
        for faults, said in (
            ([tampered], "another digest"),
            ([half, *[status(404)] * 3], "not found"),
            ([status(401)] * 2, "access denied"),
        ):
            fake.faults.clear()
            fake.fault("/blobs/", *faults)
            told = line.finding("fsck", "--repair", "--plain-http", "--from", f"{fake.host}/team/app")
            assert said in told
            assert layers(line) == before
            assert not os.listdir(line.root / "v1/data/staging")
        fake.faults.clear()
        # A source that fails is passed over for the next one.
        fake.fault("other/app/blobs/", status(404))
        wrong, right = f"{fake.host}/other/app", f"{fake.host}/team/app@{digest}"
        line("fsck", "--repair", "--plain-http", "--from", wrong, "--from", right)
    line("fsck")


# Another platform.


def test_another_platform(line: Inside, registry: Running) -> None:
    def pull(tag: str, platform: str, name: str) -> tuple[str, ...]:
        return (
            "image",
            "pull",
            f"{registry.host}/team/app:{tag}",
            "--plain-http",
            "--platform",
            platform,
            "--name",
            name,
        )

    one = line.json(*pull("many", "linux/s390x", "foreign"))
    two = line.json("image", "pull", f"{registry.host}/team/app:many", "--plain-http", "--name", "own")
    assert one["digest"] != two["digest"]
    assert line.json(*pull("alone", "linux/s390x", "again"))["digest"] == one["digest"]
    for platform in ("linux/riscv64", "windows/amd64", "linux/s390x/z17"):
        said = line.refused(*pull("alone", "linux/riscv64", "none"), code=1)
        assert "it has linux/s390x" in said, platform
    said = line.refused(*pull("v1", "linux/riscv64", "none"), code=1)
    assert "is for linux/" in said
    assert "not for linux/riscv64" in said
    for wrong in ("linux", "linux/", "linux/arm64/v8/x", "LINUX/arm64", "linux/../etc", ""):
        assert "is not a platform" in line.refused(*pull("many", wrong, "none"), code=2)
    assert {image["name"] for image in line.json("image", "list")["images"]} == {"foreign", "own", "again"}


# Resume.


def test_a_broken_pull_is_told_kept_and_collected(line: Inside) -> None:
    with serve() as fake:
        fake.put_image(LAYERS, "v1")
        wanted = json.loads(fake.manifests["v1"][1])["layers"][3]["digest"]
        pull = ("image", "pull", f"{fake.host}/team/app:v1", "--plain-http")
        fake.fault(wanted, half, status(404))
        line.refused(*pull, code=1)
        would = line.json("gc")
        kept = {partial["digest"]: partial["size_bytes"] for partial in would["broken_pulls"]}
        assert (would["done"], kept[wanted] > 0) == (False, True)
        assert wanted in line("gc")
        did = line.json("gc", "--yes")
        assert did["broken_pulls"] == would["broken_pulls"]
        assert did["size_bytes"] == sum(kept.values())
        assert line("gc", "--yes") == "nothing to free\n"
        fake.fault(wanted, half, status(404))
        line.refused(*pull, code=1)
        facts = line.json(*pull)
        assert facts["kept_bytes"] > 0
        assert facts["fetched_layers"] == 6
        assert line("gc") == "nothing to free\n"


# Bad input: one line, the right code, and what was there is there.


@pytest.fixture
def stored(line: Inside, registry: Running) -> Iterator[Inside]:
    """A store that has an image, which is whole afterwards, with nothing beside it."""
    line("image", "import", f"{registry.layout}:many", "--name", "before", "--flatten", "now")
    shown = line.json("image", "show", "before")
    yield line
    with Store.open(str(line.root)) as store:
        assert [(image.name, image.digest) for image in store.images()] == [("before", shown["digest"])]
        assert store.check().findings == ()
        assert store.flat_tree(store.image("before")) == shown["flat_tree"]
    for place in ("staging", "trash"):
        assert os.listdir(line.root / "v1/data" / place) == []


def test_an_unknown_host(stored: Inside) -> None:
    said = stored.refused("image", "pull", "no-such-host.invalid/team/app:v1", code=1)
    assert "there is no host no-such-host.invalid" in said
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        said = stored.refused("image", "pull", f"127.0.0.1:{port}/team/app:v1", "--plain-http", code=1)
    assert "Connection refused" in said


def test_a_tag_that_is_not_there(stored: Inside, registry: Running) -> None:
    said = stored.refused("image", "pull", f"{registry.host}/team/app:v9", "--plain-http", code=2)
    assert "has no v9; it has alone, many, v1" in said
    said = stored.refused("image", "pull", f"{registry.host}/team/app@sha256:{'0' * 64}", "--plain-http", code=2)
    assert "has no sha256:0000" in said


def test_wrong_credentials(stored: Inside, tmp_path: Path) -> None:
    with serving(tmp_path, "v1", auth=AUTH, credentials="me:secret") as guarded:
        name = f"{guarded.host}/team/app:v1"
        said = stored.refused("image", "pull", name, "--plain-http", code=1)
        assert "access denied" in said
        assert "docker login" in said
        file = tmp_path / ".docker/config.json"
        file.parent.mkdir()
        packed = base64.b64encode(b"me:guess").decode()
        file.write_text(json.dumps({"auths": {guarded.host: {"auth": packed}}}))
        said = stored.refused("image", "pull", name, "--plain-http", code=1)
        assert str(file) in said
        assert "guess" not in said
        assert packed not in said
        file.write_text("{")
        assert str(file) in stored.refused("image", "pull", name, "--plain-http", code=1)


def test_half_a_blob_and_a_wrong_digest_from_a_real_registry(stored: Inside, tmp_path: Path) -> None:
    """The registry's own files are cut and changed under it."""
    with serving(tmp_path, "v1") as running:
        name = f"{running.host}/team/app:v1"
        manifest = json.loads((running.layout / "index.json").read_text())["manifests"][0]["digest"]
        blobs = running.layout / "blobs/sha256"
        digest = json.loads((blobs / manifest[7:]).read_text())["layers"][4]["digest"][7:]
        blob = tmp_path / f"data/docker/registry/v2/blobs/sha256/{digest[:2]}/{digest}/data"
        whole = blob.read_bytes()
        for data, told in (
            (whole[: len(whole) // 2], "bytes instead of"),
            (whole[:-3] + b"\1\2\3", "digest"),
        ):
            blob.write_bytes(data)
            said = stored.refused("image", "pull", name, "--plain-http", code=1)
            assert digest in said
            assert told in said
        blob.write_bytes(whole)
        stored("image", "pull", name, "--plain-http", "--name", "after")
        stored("image", "remove", "after")


def test_a_store_of_a_newer_schema(stored: Inside, registry: Running) -> None:
    book = stored.root / "v1/state.db"

    def say(version: int) -> int:
        with sqlite3.connect(book) as db:
            before = db.execute("PRAGMA user_version").fetchone()[0]
            db.execute(f"PRAGMA user_version = {version}")
        db.close()
        return int(before)

    ours = say(99)
    try:
        assert [image["name"] for image in stored.json("image", "list")["images"]] == ["before"]
        stored("image", "export", "before", str(stored.root.parent / "out"))
        for refused in (
            ("image", "pull", f"{registry.host}/team/app:v1", "--plain-http"),
            ("image", "import", f"{registry.layout}:v1"),
            ("image", "remove", "before"),
            ("store", "import", str(registry.layout)),
        ):
            said = stored.refused(*refused, code=1)
            assert "newer flatmount (schema 99" in said
    finally:
        say(ours)


def test_a_file_system_without_id_mapped_mounts(flatmount: CommandLine, target: Path, tmp_path: Path) -> None:
    """An overlay takes none: the mount says so in one line, leaves nothing, and the image is there."""
    place, parts = tmp_path / "merged", [tmp_path / name for name in ("lower", "upper", "work")]
    for path in (place, *parts):
        path.mkdir()
    options = "lowerdir={},upperdir={},workdir={}".format(*parts)
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", place], check=True)
    try:
        line = Inside(place / "store", flatmount.run_directory)
        line("image", "import", image(tmp_path / "app", "a"), "--name", "app", "--flatten", "now")
        said = line.refused("mount", "app", str(target), "--map", MAP, code=1)
        assert "id-map" in said
        assert os.listdir(line.root / "v1/data/uppers") == os.listdir(target) == []
        line("fsck")
    finally:
        subprocess.run(["umount", place], check=True)
