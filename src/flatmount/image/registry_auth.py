"""Credentials for registries, from the files and helpers that people already have.

The places, in order; $REGISTRY_AUTH_FILE, where it is set, is the only one:

    $REGISTRY_AUTH_FILE
    $XDG_RUNTIME_DIR/containers/auth.json, or /run/containers/UID/auth.json
    $XDG_CONFIG_HOME/containers/auth.json, or ~/.config/containers/auth.json
    $DOCKER_CONFIG/config.json, or ~/.docker/config.json

See: containers-auth.json(5), https://docs.docker.com/reference/cli/docker/login/
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flatmount.errors import FlatmountError, from_os_error

_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HELPER_SECONDS = 30
_NOT_FOUND = "credentials not found"
_TOKEN_USER = "<token>"  # what a helper says instead of a name when the secret is an identity token
_HUB_KEY = "https://index.docker.io/v1/"
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Credential:
    """What somebody says about himself to a registry; `source` says where it came from.

    `identity_token`: the secret is a refresh token for the registry's token service, and there is no name.
    """

    username: str
    secret: str = field(repr=False)
    source: str
    identity_token: bool = False

    @property
    def basic(self) -> str:
        """The value of a Basic Authorization header."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.secret}".encode()).decode()


class Keychain:
    """Finds credentials; files are read and helpers asked when they are needed."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = os.environ if environment is None else environment

    @property
    def places(self) -> tuple[str, ...]:
        """The files that are read, where they exist."""
        get = self._environment.get
        named = get("REGISTRY_AUTH_FILE")
        if named:
            return (named,)
        home = get("HOME") or "/root"
        runtime = get("XDG_RUNTIME_DIR")
        return (
            f"{runtime}/containers/auth.json" if runtime else f"/run/containers/{os.geteuid()}/auth.json",
            os.path.join(get("XDG_CONFIG_HOME") or f"{home}/.config", "containers/auth.json"),
            os.path.join(get("DOCKER_CONFIG") or f"{home}/.docker", "config.json"),
        )

    def find(self, host: str, repository: str) -> Credential | None:
        """What the first place that knows `host`/`repository` has; the most specific entry of a file wins.

        Raises: FlatmountError for a file that is damaged or a helper that fails.
        """
        for path in self.places:
            content = self._read(path)
            found = None if content is None else self._in_file(content, path, host, repository)
            if found is not None:
                return found
        return None

    def _read(self, path: str) -> dict[str, Any] | None:
        try:
            with open(path, "rb") as file:
                content = json.loads(file.read(_MOST_BYTES))
        except FileNotFoundError as error:
            if self._environment.get("REGISTRY_AUTH_FILE"):
                raise FlatmountError(
                    f"{path}: there is no such file", hint="REGISTRY_AUTH_FILE names a file of credentials"
                ) from error
            return None
        except OSError as error:
            raise from_os_error(error, "read credentials in") from error
        except (ValueError, RecursionError) as error:
            raise FlatmountError(f"credentials in {path}: not JSON: {error}", hint="log in to make it anew") from error
        if not isinstance(content, dict):
            raise FlatmountError(f"credentials in {path}: not a JSON object", hint="log in to make it anew")
        return content

    def _in_file(self, content: dict[str, Any], path: str, host: str, repository: str) -> Credential | None:
        helpers, auths = _object(content, "credHelpers", path), _object(content, "auths", path)
        helper = helpers.get(host) or content.get("credsStore")
        if helper:
            found = self._ask(helper, _HUB_KEY if host == "docker.io" and host not in helpers else host, path)
            if found is not None:
                return found
        known = {_plain(key): entry for key, entry in reversed(auths.items())}
        for key in _scopes(host, repository):
            found = _entry(known.get(key), path, key)
            if found is not None:
                return found
        return None

    def _ask(self, helper: object, server: str, path: str) -> Credential | None:
        if not isinstance(helper, str) or not _HELPER.fullmatch(helper):
            raise FlatmountError(f"credentials in {path}: {helper!r} is not a helper's name", hint="correct it there")
        program = f"docker-credential-{helper}"
        try:
            done = subprocess.run(
                [program, "get"],
                input=server,
                capture_output=True,
                text=True,
                timeout=_HELPER_SECONDS,
                check=False,
                env=dict(self._environment),
            )
        except FileNotFoundError as error:
            raise FlatmountError(
                f"{program} is not installed", hint=f"{path} names it; install it or log in anew"
            ) from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise FlatmountError(f"{program} for {server}: {error}", hint=f"{path} names it") from error
        if done.returncode != 0:
            said = (done.stdout.strip() or done.stderr.strip())[:200]
            if _NOT_FOUND in said:
                return None
            raise FlatmountError(f"{program} for {server} failed: {said!r}", hint=f"{path} names it")
        try:
            answer = json.loads(done.stdout)
            username, secret = answer["Username"], answer["Secret"]
        except (ValueError, TypeError, KeyError) as error:
            raise FlatmountError(f"{program} for {server} gave no credentials", hint=f"{path} names it") from error
        if not isinstance(username, str) or not isinstance(secret, str):
            raise FlatmountError(f"{program} for {server} gave no credentials", hint=f"{path} names it")
        return Credential(username, secret, program, identity_token=username == _TOKEN_USER)


def _entry(value: object, path: str, key: str) -> Credential | None:
    """One entry of `auths`; an empty one only says that a helper has it."""
    if not isinstance(value, dict):
        return None
    token, packed = value.get("identitytoken"), value.get("auth")
    if isinstance(token, str) and token:
        return Credential("", token, path, identity_token=True)
    if isinstance(packed, str) and packed:
        try:
            username, colon, secret = base64.b64decode(packed, validate=True).decode().partition(":")
        except (binascii.Error, ValueError) as error:
            raise FlatmountError(f"credentials in {path} for {key}: not base64", hint="log in anew") from error
        if not colon:
            raise FlatmountError(f"credentials in {path} for {key}: no password", hint="log in anew")
        return Credential(username, secret.rstrip("\0"), path)
    name, password = value.get("username"), value.get("password")
    if isinstance(name, str) and isinstance(password, str) and name:
        return Credential(name, password, path)
    return None


def _plain(key: str) -> str:
    """`https://HOST/v1/` as HOST: what docker writes as what the others write."""
    key = re.sub(r"\Ahttps?://", "", key)
    key = re.sub(r"/v[12]/?\Z", "", key).rstrip("/")
    return re.sub(r"\A(?:index|registry-1)\.docker\.io(?=/|\Z)", "docker.io", key)


def _scopes(host: str, repository: str) -> Iterator[str]:
    """HOST/a/b, HOST/a, HOST."""
    parts = [host, *repository.split("/")]
    for end in range(len(parts), 0, -1):
        yield "/".join(parts[:end])


def _object(content: dict[str, Any], key: str, path: str) -> dict[str, Any]:
    value = content.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise FlatmountError(f"credentials in {path}: {key} is not an object", hint="log in to make it anew")
    return value
