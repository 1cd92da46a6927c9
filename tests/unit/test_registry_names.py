"""What a person writes: references, the configuration, credentials."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatmount.config import Config, Pull, Registry, load, parse
from flatmount.errors import FlatmountError, UsageError
from flatmount.image.registry_auth import Credential, Keychain
from flatmount.image.registry_reference import Reference

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "expected", "shown"),
    [
        ("host.example/app", ("host.example", "app", "latest", None), "host.example/app:latest"),
        ("localhost/a/b-c__d:v1", ("localhost", "a/b-c__d", "v1", None), "localhost/a/b-c__d:v1"),
        ("h:5000/app:1.2", ("h:5000", "app", "1.2", None), "h:5000/app:1.2"),
        (f"h:5000/app@{DIGEST}", ("h:5000", "app", None, DIGEST), f"h:5000/app@{DIGEST}"),
        (f"h:5000/app:v1@{DIGEST}", ("h:5000", "app", "v1", DIGEST), "h:5000/app:v1"),
        ("[::1]:5000/app", ("[::1]:5000", "app", "latest", None), "[::1]:5000/app:latest"),
        ("docker.io/debian:12", ("docker.io", "library/debian", "12", None), "docker.io/library/debian:12"),
        ("index.docker.io/a/b", ("docker.io", "a/b", "latest", None), "docker.io/a/b:latest"),
    ],
)
def test_references(text: str, expected: tuple[Any, ...], shown: str) -> None:
    reference = Reference.parse(text)
    assert (reference.host, reference.repository, reference.tag, reference.digest) == expected
    assert str(reference) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "app",
        "team/app",
        "host.example/",
        "host.example/App",
        "host.example/a//b",
        "host.example/../b",
        "host.example/app:",
        "host.example/app:-x",
        "host.example/app:" + "x" * 129,
        "host.example/app@",
        "host.example/app@sha256:12",
        "host.example/app@md5:" + "a" * 32,
        "ho st.example/app",
        "user@host.example/app",
        "host.example:/app",
        "http://host.example/app",
        "host.example/" + "a" * 250,
        "host.example/app\n",
    ],
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(UsageError):
        Reference.parse(text)


@given(st.text())
def test_any_text_is_a_reference_or_an_error(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except UsageError:
        return
    assert Reference.parse(str(reference)).repository == reference.repository


def test_a_configuration() -> None:
    text = b"""
        version = 1
        [pull]
        parallel_layers = 8
        [registries."r.example:5000"]
        mirrors = ["m.example", "m.example:5001/cache/of"]
        plain_http = true
        ca_file = "/etc/own.pem"
    """
    registry = Registry(("m.example", "m.example:5001/cache/of"), True, "/etc/own.pem")
    assert parse(text, "x") == Config(Pull(8), {"r.example:5000": registry})
    assert parse(b"version = 1", "x") == Config()
    assert Config().registry("any") == Registry()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "version is 'not given'"),
        ("version = 2", "version is 2"),
        ("version = true", "version is True"),
        ("version =", "not TOML"),
        ("version = 1\nnew = 1", "unknown key 'new'"),
        ("version = 1\npull = 3", "pull is not a table"),
        ("version = 1\n[pull]\nlayers = 3", "unknown key 'layers'"),
        ("version = 1\n[pull]\nparallel_layers = 0", "parallel_layers is 0"),
        ("version = 1\n[pull]\nparallel_layers = true", "parallel_layers is True"),
        ("version = 1\n[registries.'a b']", "not HOST"),
        ("version = 1\n[registries.r]\ninsecure = true", "unknown key 'insecure'"),
        ("version = 1\n[registries.r]\nmirrors = 'm'", "not a list"),
        ("version = 1\n[registries.r]\nmirrors = ['http://m']", "mirror 'http://m'"),
        ("version = 1\n[registries.r]\nplain_http = 'yes'", "not true or false"),
        ("version = 1\n[registries.r]\nca_file = 'own.pem'", "not an absolute path"),
    ],
)
def test_a_configuration_that_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse(text.encode(), "/etc/x.toml")
    assert "/etc/x.toml" in str(caught.value)


def test_where_the_configuration_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.toml"
    file.write_text("version = 1\n[pull]\nparallel_layers = 2\n")
    monkeypatch.setenv("FLATMOUNT_CONFIG", str(file))
    assert load().pull.parallel_layers == 2
    monkeypatch.setenv("FLATMOUNT_CONFIG", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="no such file"):
        load()
    monkeypatch.delenv("FLATMOUNT_CONFIG")
    monkeypatch.setattr("flatmount.config.DEFAULT_PATH", str(tmp_path / "none"))
    assert load() == Config()


def packed(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


class Home:
    """A home directory with files of credentials."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment = {"HOME": str(path), "XDG_RUNTIME_DIR": str(path / "run"), "PATH": f"{path}:/usr/bin:/bin"}

    def write(self, name: str, content: object) -> str:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(file)

    def helper(self, name: str, script: str) -> None:
        file = self.path / f"docker-credential-{name}"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    def find(self, host: str = "r.example", repository: str = "team/app") -> Credential | None:
        return Keychain(self.environment).find(host, repository)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def who(found: Credential | None) -> tuple[str, str] | None:
    return None if found is None else (found.username, found.secret)


def test_nobody_has_credentials(home: Home) -> None:
    assert home.find() is None


def test_the_files_in_their_order(home: Home) -> None:
    home.write(".docker/config.json", {"auths": {"r.example": packed("docker", "d")}})
    assert who(home.find()) == ("docker", "d")
    home.write(".config/containers/auth.json", {"auths": {"r.example": packed("config", "c")}})
    assert who(home.find()) == ("config", "c")
    home.write("run/containers/auth.json", {"auths": {"r.example": packed("runtime", "r")}})
    assert who(home.find()) == ("runtime", "r")
    home.environment["REGISTRY_AUTH_FILE"] = home.write("own.json", {"auths": {"other.example": packed("own", "o")}})
    assert home.find() is None
    assert who(home.find("other.example")) == ("own", "o")


def test_docker_config_names_the_directory(home: Home) -> None:
    home.environment["DOCKER_CONFIG"] = os.path.dirname(home.write("d/config.json", {"auths": {"r.example": {}}}))
    assert home.find() is None
    home.write("d/config.json", {"auths": {"r.example": {"username": "u", "password": "p"}}})
    assert who(home.find()) == ("u", "p")


@pytest.mark.parametrize("key", ["https://r.example/v1/", "https://r.example", "http://r.example/v2/", "r.example/"])
def test_dockers_forms_of_a_host(home: Home, key: str) -> None:
    home.write(".docker/config.json", {"auths": {key: packed("u", "p:with:colons")}})
    assert who(home.find()) == ("u", "p:with:colons")


def test_the_hub(home: Home) -> None:
    home.write(".docker/config.json", {"auths": {"https://index.docker.io/v1/": packed("u", "p")}})
    assert who(home.find("docker.io", "library/debian")) == ("u", "p")


def test_the_most_specific_entry(home: Home) -> None:
    auths = {
        "r.example": packed("host", ""),
        "r.example/team": packed("team", ""),
        "r.example/team/app": packed("app", ""),
        "r.example/tea": packed("wrong", ""),
    }
    home.write("run/containers/auth.json", {"auths": auths})
    assert [
        (home.find(repository=name) or pytest.fail()).username for name in ("team/app", "team/b/c", "other/app")
    ] == [
        "app",
        "team",
        "host",
    ]
    assert home.find("r.example:5000") is None


def test_an_identity_token(home: Home) -> None:
    home.write(".docker/config.json", {"auths": {"r.example": {"auth": "", "identitytoken": "refresh"}}})
    found = home.find()
    assert found is not None
    assert (found.secret, found.identity_token) == ("refresh", True)
    assert "refresh" not in repr(found)


def test_a_helper_for_one_host_and_one_for_the_rest(home: Home) -> None:
    home.helper(
        "one",
        """read server; echo "{\\"ServerURL\\":\\"$server\\",\\"Username\\":\\"one\\",\\"Secret\\":\\"$server\\"}" """,
    )
    home.helper("rest", """read server; echo '{"Username":"<token>","Secret":"t"}'""")
    content = {"credHelpers": {"r.example": "one"}, "credsStore": "rest", "auths": {"r.example": {}}}
    home.write(".docker/config.json", content)
    assert who(home.find()) == ("one", "r.example")
    other = home.find("other.example")
    assert other is not None
    assert other.identity_token


def test_a_helper_without_credentials_leaves_it_to_the_file(home: Home) -> None:
    home.helper("none", "echo 'credentials not found in native keychain'; exit 1")
    home.write(".docker/config.json", {"credsStore": "none", "auths": {"r.example": packed("u", "p")}})
    assert who(home.find()) == ("u", "p")


@pytest.mark.parametrize(
    ("script", "said"),
    [("echo locked >&2; exit 1", "locked"), ("echo nonsense", "no credentials"), ("echo '{}'", "no credentials")],
)
def test_a_helper_that_fails(home: Home, script: str, said: str) -> None:
    home.helper("bad", script)
    home.write(".docker/config.json", {"credsStore": "bad"})
    with pytest.raises(FlatmountError, match=said):
        home.find()


@pytest.mark.parametrize("name", ["absent", "../../bin/sh", 3])
def test_a_helper_that_is_none(home: Home, name: object) -> None:
    home.write(".docker/config.json", {"credsStore": name})
    with pytest.raises(FlatmountError):
        home.find()


@pytest.mark.parametrize(
    "content",
    ["{", "[]", {"auths": []}, {"auths": {"r.example": {"auth": "%"}}}, {"auths": {"r.example": {"auth": "dQ=="}}}],
)
def test_a_damaged_file(home: Home, content: object) -> None:
    path = home.write(".docker/config.json", content)
    with pytest.raises(FlatmountError, match=path):
        home.find()


def test_a_named_file_that_is_not_there(home: Home) -> None:
    home.environment["REGISTRY_AUTH_FILE"] = str(home.path / "none")
    with pytest.raises(FlatmountError, match="no such file"):
        home.find()
