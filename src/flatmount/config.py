"""The configuration file: TOML, `version = 1`, every key known or refused.

    version = 1

    [pull]
    parallel_layers = 4             # layers fetched at the same time

    [registries."registry.example:5000"]
    plain_http = true               # without TLS
    ca_file = "/etc/ssl/own.pem"    # trusted beside the system's authorities
    mirrors = ["mirror.example"]    # HOST[:PORT][/PREFIX], asked first, in this order

    [store]
    flat_format = "hardlink"        # how the layers of an image are merged: hardlink or erofs

    [snapshotter]
    form = "auto"                   # what containerd is given to mount: auto, overlay, bind or helper
    deadline_s = 30                 # seconds after which a call is told that it takes too long
    metrics = "127.0.0.1:9400"      # serve Prometheus metrics there; "" for nowhere
    log_level = "info"              # debug, info, warning or error

A mirror's own table says how it is reached.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from flatmount.errors import UsageError, from_os_error

DEFAULT_PATH = "/etc/flatmount/config.toml"
MOST_PARALLEL_LAYERS = 32
SNAPSHOT_FORMS = ("auto", "overlay", "bind", "helper")
FLAT_FORMATS = ("hardlink", "erofs")
LOG_LEVELS = ("debug", "info", "warning", "error")
HOST = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*"
    r"|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
)
_MIRROR = re.compile(HOST.pattern + r"(?:/[a-z0-9._/-]*[a-z0-9])?")
_ADDRESS = re.compile(HOST.pattern.removesuffix("?"))
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
class StoreSettings:
    """How images are kept."""

    flat_format: str = "hardlink"


@dataclass(frozen=True, slots=True)
class Snapshotter:
    """How containerd's snapshots are served. `metrics` is HOST:PORT, or "" for none."""

    form: str = "auto"
    deadline_s: int = 30
    metrics: str = ""
    log_level: str = "info"


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration; what no file says has its default."""

    pull: Pull = Pull()
    registries: Mapping[str, Registry] = field(default_factory=dict)
    snapshotter: Snapshotter = Snapshotter()
    store: StoreSettings = StoreSettings()

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
    _known(top, ("version", "pull", "registries", "snapshotter", "store"), where)
    pull = _table(top, "pull", where)
    _known(pull, ("parallel_layers",), f"{where}: [pull]")
    registries = _table(top, "registries", where)
    return Config(
        Pull(_whole(pull, "parallel_layers", Pull().parallel_layers, f"{where}: [pull]", most=MOST_PARALLEL_LAYERS)),
        {host: _registry(_table(registries, host, where), host, where) for host in registries},
        _snapshotter(_table(top, "snapshotter", where), f"{where}: [snapshotter]"),
        _store(_table(top, "store", where), f"{where}: [store]"),
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


def _snapshotter(table: _Table, where: str) -> Snapshotter:
    default = Snapshotter()
    _known(table, ("form", "deadline_s", "metrics", "log_level"), where)
    metrics = table.get("metrics", default.metrics)
    if not isinstance(metrics, str) or not (metrics == "" or _ADDRESS.fullmatch(metrics)):
        raise UsageError(f"{where}: metrics is {metrics!r}", hint='write HOST:PORT, as in "127.0.0.1:9400"')
    return Snapshotter(
        _one_of(table, "form", SNAPSHOT_FORMS, default.form, where),
        _whole(table, "deadline_s", default.deadline_s, where, most=3600),
        metrics,
        _one_of(table, "log_level", LOG_LEVELS, default.log_level, where),
    )


def _store(table: _Table, where: str) -> StoreSettings:
    _known(table, ("flat_format",), where)
    return StoreSettings(_one_of(table, "flat_format", FLAT_FORMATS, StoreSettings().flat_format, where))


def _one_of(table: _Table, key: str, words: tuple[str, ...], default: str, where: str) -> str:
    value = table.get(key, default)
    if value not in words:
        raise UsageError(f"{where}: {key} is {value!r}", hint=f"one of {', '.join(words)}")
    return str(value)


def _whole(table: _Table, key: str, default: int, where: str, *, most: int) -> int:
    value = table.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise UsageError(f"{where}: {key} is {value!r}", hint=f"a whole number from 1 to {most}")
    return value


def dump(config: Config) -> str:
    """The configuration as a file that says everything, defaults too."""
    lines = ["version = 1", "", "[pull]", f"parallel_layers = {config.pull.parallel_layers}", "", "[store]"]
    lines += (f"flat_format = {json.dumps(config.store.flat_format)}", "", "[snapshotter]")
    lines += (f"{name} = {json.dumps(value)}" for name, value in asdict(config.snapshotter).items())
    for host, registry in config.registries.items():
        lines += ("", f"[registries.{json.dumps(host)}]")
        lines += (f"{name} = {json.dumps(value)}" for name, value in asdict(registry).items() if value is not None)
    return "\n".join(lines) + "\n"
