"""The configuration file: TOML, `version = 1`, every key known or refused.

    version = 1

    [pull]
    parallel_layers = 4             # layers fetched at the same time

    [registries."registry.example:5000"]
    plain_http = true               # without TLS
    ca_file = "/etc/ssl/own.pem"    # trusted beside the system's authorities
    mirrors = ["mirror.example"]    # HOST[:PORT][/PREFIX], asked first, in this order

A mirror's own table says how it is reached.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flatmount.errors import UsageError, from_os_error

DEFAULT_PATH = "/etc/flatmount/config.toml"
MOST_PARALLEL_LAYERS = 32
HOST = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*"
    r"|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
)
_MIRROR = re.compile(HOST.pattern + r"(?:/[a-z0-9._/-]*[a-z0-9])?")
_Table = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Registry:
    """How one registry is reached."""

    mirrors: tuple[str, ...] = ()
    plain_http: bool = False
    ca_file: str | None = None


@dataclass(frozen=True, slots=True)
class Pull:
    """How images are fetched."""

    parallel_layers: int = 4


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration; what no file says has its default."""

    pull: Pull = Pull()
    registries: Mapping[str, Registry] = field(default_factory=dict)

    def registry(self, host: str) -> Registry:
        """What is said about `host`, HOST or HOST:PORT."""
        return self.registries.get(host, Registry())


def load(path: str | None = None) -> Config:
    """Read the configuration at `path`, else at $FLATMOUNT_CONFIG, else at /etc/flatmount/config.toml.

    The last may be missing. Raises: UsageError, FlatmountError.
    """
    named = path or os.environ.get("FLATMOUNT_CONFIG")
    where = named or DEFAULT_PATH
    try:
        with open(where, "rb") as file:
            return parse(file.read(), where)
    except FileNotFoundError as error:
        if named is None:
            return Config()
        raise UsageError(f"{where}: there is no such file", hint="FLATMOUNT_CONFIG names the configuration") from error
    except OSError as error:
        raise from_os_error(error, "read the configuration") from error


def parse(raw: bytes, where: str) -> Config:
    """The configuration in `raw`. Raises: UsageError, which names `where` and the key."""
    try:
        top = tomllib.loads(raw.decode())
    except ValueError as error:
        raise UsageError(f"{where} is not TOML: {error}", hint="correct it there") from error
    if top.get("version") != 1 or isinstance(top["version"], bool):
        raise UsageError(
            f"{where}: version is {top.get('version', 'not given')!r}", hint="this flatmount reads `version = 1`"
        )
    _known(top, ("version", "pull", "registries"), where)
    pull = _table(top, "pull", where)
    _known(pull, ("parallel_layers",), f"{where}: [pull]")
    registries = _table(top, "registries", where)
    return Config(
        Pull(_whole(pull, "parallel_layers", Pull().parallel_layers, f"{where}: [pull]")),
        {host: _registry(_table(registries, host, where), host, where) for host in registries},
    )


def _registry(table: _Table, host: str, where: str) -> Registry:
    where = f'{where}: [registries."{host}"]'
    if not HOST.fullmatch(host):
        raise UsageError(f"{where}: {host!r} is not HOST or HOST:PORT", hint="quote it: it contains dots or a colon")
    _known(table, ("mirrors", "plain_http", "ca_file"), where)
    mirrors = table.get("mirrors", [])
    if not isinstance(mirrors, list) or not all(isinstance(mirror, str) for mirror in mirrors):
        raise UsageError(f"{where}: mirrors is not a list of strings", hint='write mirrors = ["HOST[:PORT][/PREFIX]"]')
    for mirror in mirrors:
        if not _MIRROR.fullmatch(mirror):
            raise UsageError(f"{where}: mirror {mirror!r}", hint="write HOST[:PORT][/PREFIX], without a scheme")
    plain_http, ca_file = table.get("plain_http", False), table.get("ca_file")
    if not isinstance(plain_http, bool):
        raise UsageError(f"{where}: plain_http is not true or false")
    if ca_file is not None and not (isinstance(ca_file, str) and os.path.isabs(ca_file)):
        raise UsageError(f"{where}: ca_file is not an absolute path")
    return Registry(tuple(mirrors), plain_http, ca_file)


def _known(table: _Table, keys: tuple[str, ...], where: str) -> None:
    unknown = sorted(set(table) - set(keys))
    if unknown:
        raise UsageError(f"{where}: unknown key {unknown[0]!r}", hint=f"known here: {', '.join(keys)}")


def _table(table: _Table, key: str, where: str) -> _Table:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise UsageError(f"{where}: {key} is not a table", hint=f"write [{key}] and its keys below")
    return value


def _whole(table: _Table, key: str, default: int, where: str) -> int:
    value = table.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_PARALLEL_LAYERS:
        raise UsageError(f"{where}: {key} is {value!r}", hint=f"a whole number from 1 to {MOST_PARALLEL_LAYERS}")
    return value
