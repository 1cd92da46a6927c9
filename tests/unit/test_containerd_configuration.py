"""Our section goes into containerd's configuration and comes out again, whatever is in it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from flatmount.cli.main import main
from flatmount.errors import FlatmountError, UsageError
from flatmount.snapshotter.containerd import inspect, install, section, uninstall

SOCKET = "/run/flatmount/snapshotter.sock"
FILES = {
    "empty 2": "version = 2\n",
    "empty 3": "version = 3\n",
    "no newline": "version = 2",
    "cri 2": 'version = 2\n[plugins]\n  [plugins."io.containerd.grpc.v1.cri".containerd]\n'
    '    snapshotter = "overlayfs"  # ours\n    default_runtime_name = "runc"\n[grpc]\n  address = "/a"\n',
    "cri 2 without": 'version = 2\n[plugins."io.containerd.grpc.v1.cri".containerd]\n  no_pivot = false\n',
    "cri 3": "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  snapshotter = 'overlayfs'\n",
    "cri 2 by its runtime": 'version = 2\n[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]\n'
    '  runtime_type = "io.containerd.runc.v2"\n',
    "cri 3 by its registry": "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = '/c'\n",
    "arrays in lines": 'version = 2\n[plugins."io.containerd.grpc.v1.cri".containerd]\n  some = [\n    [1],\n'
    '    [2]\n  ]\n  snapshotter = "native"\n[plugins."io.containerd.grpc.v1.cri"]\n  snapshotter = "another"\n',
    "lines of a string": 'version = 3\n[plugins."io.containerd.cri.v1.images"]\n  note = """\n[grpc]\n'
    'snapshotter = "x"\n"""\n  snapshotter = "native"\n',
    "only the header": 'version = 2\n[plugins."io.containerd.grpc.v1.cri".containerd]',
    "unpacks for others": "version = 3\n[plugins.'io.containerd.transfer.v1.local']\n  max_concurrent_downloads = 3\n"
    "  [[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n    platform = 'linux/amd64'\n"
    "    snapshotter = 'erofs'\n[debug]\n  level = 'info'\n",
    "others": 'version = 2\n[proxy_plugins]\n  [proxy_plugins.stargz]\n    type = "snapshot"\n    address = "/s"\n',
}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
@pytest.mark.parametrize("cri", [False, True])
def test_in_and_out(text: str, cri: bool) -> None:
    made = install(text, SOCKET, cri=cri)
    found = inspect(made)
    assert (found.socket, found.remap_ids, found.cri, found.unpacks) == (SOCKET, True, cri, True)
    assert install(made, SOCKET, cri=cri) == made
    before, after = tomllib.loads(text), tomllib.loads(made)
    assert after["proxy_plugins"]["flatmount"]["type"] == "snapshot"
    assert {key: after[key] for key in before if key not in ("plugins", "proxy_plugins")} == {
        key: before[key] for key in before if key not in ("plugins", "proxy_plugins")
    }
    assert uninstall(made).rstrip("\n") == text.rstrip("\n")
    assert uninstall(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "version = 1\n",
        "root = '/x'\n",
        "not toml",
        'version = 2\n[proxy_plugins.flatmount]\n  address = "/x"\n',
        'version = 2\nproxy_plugins = { stargz = { type = "snapshot" } }\n',
        'version = 3\n[plugins."io.containerd.transfer.v1.local"]\n  unpack_config = []\n',
    ],
)
def test_what_cannot_be_changed_is_refused(text: str) -> None:
    with pytest.raises(FlatmountError):
        install(text, SOCKET, cri=False)


def test_the_section_by_hand() -> None:
    for text in FILES["empty 3"], FILES["unpacks for others"]:
        found = inspect(text + section(text, SOCKET, cri=True))
        assert (found.cri, found.unpacks) == (True, True)
    assert not inspect(FILES["empty 2"] + section(FILES["empty 2"], SOCKET, cri=False)).cri


@pytest.mark.parametrize("version", [2, 3])
def test_the_files_that_are_deployed_have_the_section(version: int) -> None:
    deployed = Path(__file__).parents[2] / f"deploy/containerd/config-version-{version}.toml"
    text = f"version = {version}\n"
    assert deployed.read_text() == text + "\n" + section(text, SOCKET, cri=True)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (FILES["empty 3"], ["overlayfs", "flatmount"]),
        (FILES["empty 2"], ["overlayfs", "flatmount"]),
        (FILES["unpacks for others"], ["erofs", "flatmount"]),
        (
            FILES["unpacks for others"].replace("erofs", "flatmount"),
            ["flatmount"],
        ),
    ],
)
def test_the_transfer_service_unpacks_for_us_and_for_whom_it_did(text: str, wanted: list[str]) -> None:
    """A list that we begin takes the place of containerd's own; one that is there is only added to."""
    entries = tomllib.loads(install(text, SOCKET, cri=False))["plugins"]["io.containerd.transfer.v1.local"]
    assert [entry["snapshotter"] for entry in entries["unpack_config"]] == wanted


def test_status_says_that_containerd_2_pulls_nothing_for_us(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        f'version = 3\n[proxy_plugins.flatmount]\n  type = "snapshot"\n  address = "{SOCKET}"\n'
        '  capabilities = ["remap-ids"]\n'
    )
    assert main(["containerd", "status", "--config", str(file)]) == 1
    assert "unpack_config" in capsys.readouterr().out
    with open(file, "a") as more:
        more.write('[plugins."io.containerd.cri.v1.images"]\n  snapshotter = "flatmount"\n')
    assert main(["containerd", "status", "--config", str(file)]) == 1
    # Without --cri an install takes CRI's snapshotter away.
    assert "`flatmount containerd install --cri --config " in capsys.readouterr().out
    file.write_text(file.read_text().replace("remap-ids", "rebase"))
    assert main(["containerd", "status", "--config", str(file)]) == 1
    said = capsys.readouterr().out
    assert "unpack_config" in said and 'capabilities = ["remap-ids"] is missing' in said


@pytest.mark.parametrize(
    "text",
    [
        'version = 2\n[plugins."io.containerd.grpc.v1.cri"]\n  containerd.no_pivot = false\n',
        'version = 2\n[plugins."io.containerd.grpc.v1.cri"]\n  containerd = { snapshotter = "native" }\n',
        'version = 3\n[plugins."io.containerd.cri.v1.images"]\n  snapshotter = """native\n"""\n',
    ],
)
def test_what_a_table_of_cri_cannot_be_added_to_is_refused_as_that(text: str) -> None:
    with pytest.raises(UsageError, match="another form"):
        install(text, SOCKET, cri=True)


@pytest.mark.parametrize("there", [True, False])
def test_the_verbs(there: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.toml"
    text = FILES["cri 2"]
    if there:
        file.write_text(text)
    arguments = ["--config", str(file)]
    assert main(["containerd", "install", *arguments, "--cri", "--dry-run", "--socket", SOCKET]) == 0
    assert "+[proxy_plugins.flatmount]" in capsys.readouterr().out
    assert file.exists() is there
    assert main(["containerd", "install", *arguments, "--cri", "--socket", SOCKET]) == 0
    assert inspect(file.read_text()).cri
    assert main(["containerd", "install", *arguments, "--cri", "--socket", SOCKET]) == 0
    assert main(["containerd", "status", *arguments]) == 1
    assert f"nobody answers at {SOCKET}" in capsys.readouterr().out
    assert main(["containerd", "uninstall", *arguments]) == 0
    assert (file.read_text() if file.exists() else None) == (text if there else None)
    assert sorted(path.name for path in tmp_path.iterdir()) == (["config.toml"] if there else [])


def test_an_edit_of_somebody_else_survives(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(FILES["others"])
    main(["containerd", "install", "--config", str(file), "--socket", SOCKET])
    file.write_text(file.read_text() + '[debug]\n  level = "debug"\n')
    main(["containerd", "uninstall", "--config", str(file)])
    assert tomllib.loads(file.read_text()) == {**tomllib.loads(FILES["others"]), "debug": {"level": "debug"}}


def test_a_file_of_version_2_names_us_for_containerd_2_as_well() -> None:
    """containerd 2.1.9 does not take CRI's snapshotter along from a file of version 2 without a runtime's table."""
    for text in ("version = 2\n", FILES["cri 2"], FILES["cri 2 without"]):
        plugins = tomllib.loads(install(text, SOCKET, cri=True))["plugins"]
        assert plugins["io.containerd.grpc.v1.cri"]["containerd"]["snapshotter"] == "flatmount"
        assert plugins["io.containerd.cri.v1.images"] == {"snapshotter": "flatmount"}
