"""containerd's configuration: our section in, looked at, and out again.

Pure functions from text to text; the file is written by the verb. What we add stands between two marks, and a line that
we change says what it was, so that it can be undone even after somebody else has edited the file.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from flatmount.errors import FlatmountError, UsageError

NAME = "flatmount"
DEFAULT_PATH = "/etc/containerd/config.toml"
BEGIN = "# flatmount: begin; `flatmount containerd uninstall` takes this out"
END = "# flatmount: end"
_WAS = "  # flatmount: was "
_BLOCK = re.compile(rf"\n?{re.escape(BEGIN)}\n.*?{re.escape(END)}\n", re.DOTALL)
_KEY = re.compile(r"""\s*["']?snapshotter["']?\s*=""")

# The table that names CRI's snapshotter, by the version of the file.
_CRI = {
    2: ("plugins", "io.containerd.grpc.v1.cri", "containerd"),
    3: ("plugins", "io.containerd.cri.v1.images"),
}
# Pulls and imports go through this plugin, `ctr`'s and CRI's from containerd 2.1 on, and it unpacks for none but the
# snapshotters that are named here. 1.6 has no such plugin and passes over the table.
_TRANSFER = ("plugins", "io.containerd.transfer.v1.local")
_UNPACKS = "unpack_config"
UNPACKS_SINCE = (2, 1, 0)


@dataclass(frozen=True, slots=True)
class Installed:
    """What a configuration says of us. `socket` is "" where it does not know us.

    `unpacks` says that containerd's transfer service, which pulls for CRI and `ctr` from 2.1 on, unpacks for us.
    """

    version: int
    socket: str
    remap_ids: bool
    cri: bool
    unpacks: bool


def inspect(text: str) -> Installed:
    """What the configuration in `text` says. Raises: FlatmountError for what is no such file."""
    top = _parsed(text)
    version = _version(top)
    plugin = _table(top, ("proxy_plugins", NAME))
    cri = _table(top, _CRI[version]).get("snapshotter") == NAME
    remap_ids = "remap-ids" in plugin.get("capabilities", ())
    return Installed(version, str(plugin.get("address", "")), remap_ids, cri, NAME in unpacking_for(top))


def section(text: str, socket: str, *, cri: bool) -> str:
    """Our part for the configuration in `text`, to be added by hand. Raises: FlatmountError for what is none."""
    top = _parsed(text)
    version = _version(top)
    lines = _proxy(top, socket)
    if cri:
        lines += [*_naming(_CRI[version]), *_for_successors(version)]
    return "\n".join(lines) + "\n"


def _proxy(top: dict[str, Any], socket: str) -> list[str]:
    lines = [f"[proxy_plugins.{NAME}]", '  type = "snapshot"', f'  address = "{socket}"']
    # "rebase", from containerd 2.2 on: layers may be unpacked side by side and get their parents at the commit.
    lines.append('  capabilities = ["remap-ids", "rebase"]')
    # A list in the file takes the place of containerd's own, which has its overlayfs. One that is there is added to.
    there = unpacking_for(top)
    for name in [name for name in ((NAME,) if there else ("overlayfs", NAME)) if name not in there]:
        lines += ["", f"[[{_dotted((*_TRANSFER, _UNPACKS))}]]", '  platform = "linux"']
        lines += [f'  snapshotter = "{name}"', '  differ = "walking"']
    return lines


def unpacking_for(top: dict[str, Any]) -> list[str]:
    """The snapshotters that a file has the transfer service unpack for; none where the list is containerd's own."""
    entries = _table(top, _TRANSFER).get(_UNPACKS)
    entries = entries if isinstance(entries, list) else []
    return [str(entry.get("snapshotter", "")) for entry in entries if isinstance(entry, dict)]


def adding_it(path: str, *, cri: bool) -> str:
    """What completes a section of the file. `cri`: ours is the snapshotter of CRI, and is to stay that."""
    command = f"flatmount containerd install{' --cri' if cri else ''}"
    if path != DEFAULT_PATH:
        command += f" --config {shlex.quote(path)}"
    return f"`{command}` adds it; to a section that it did not make, by hand: `{command} --print`"


def _for_successors(version: int) -> list[str]:
    """What containerd 2.x needs in a file of version 2: its migration does not always take CRI's snapshotter along.

    2.1.9 loses it where the file has no table of a runtime, and then takes its own overlayfs without a word. 1.x knows
    no plugin of that name and passes over it.
    """
    return _naming(_CRI[3]) if version == 2 else []


def _naming(table: tuple[str, ...]) -> list[str]:
    return ["", f"[{_dotted(table)}]", f'  snapshotter = "{NAME}"']


def install(text: str, socket: str, *, cri: bool) -> str:
    """The configuration with our section in it; doing it again changes nothing.

    Args:
        cri: make us the snapshotter of Kubernetes' door as well.

    Raises: UsageError, when somebody else has a section of our name, or the file is written in a way that a section
        cannot be added to.
    """
    clean = uninstall(text)
    version = _version(_parsed(clean))
    if _table(_parsed(clean), ("proxy_plugins", NAME)):
        raise UsageError(
            f"the configuration has a [proxy_plugins.{NAME}] that is not ours", hint="remove it there and try again"
        )
    in_place = _with_snapshotter(clean, _CRI[version]) if cri else None
    body = "\n".join(_proxy(_parsed(clean), socket)) + "\n"
    if in_place is not None:
        clean = in_place
    elif cri:
        # Also where others have added tables below it: one that none of them begins may still be begun.
        body += "\n".join(_naming(_CRI[version])) + "\n"
    if cri and not _table(_parsed(clean), _CRI[3]):
        body += "".join(f"{line}\n" for line in _for_successors(version))
    made = clean + ("" if not clean or clean.endswith("\n") else "\n") + f"\n{BEGIN}\n{body}{END}\n"
    try:
        found = inspect(made)
    except FlatmountError:
        found = None
    if found is None or found.socket != socket or found.cri < cri or not found.unpacks:
        raise UsageError(
            "the configuration has its tables in another form than a section can be added to (inline tables?)",
            hint="`flatmount containerd install --print` shows what to add by hand",
        )
    return made


def uninstall(text: str) -> str:
    """The configuration without anything of ours."""
    lines = _BLOCK.sub("", text).splitlines(keepends=True)
    kept: list[str] = []
    for line in lines:
        _, mark, was = line.partition(_WAS)
        if not mark:
            kept.append(line)
        elif was.strip() != "nothing":
            kept.append(was)
    return "".join(kept)


def _with_snapshotter(text: str, table: tuple[str, ...]) -> str | None:
    """The text with our name in a table that it begins, or None where it begins none of that name."""
    wanted = _parsed(text)
    found: Any = wanted
    for name in table:
        found = found.setdefault(name, {}) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        return None
    found["snapshotter"] = NAME
    for made in _changed(text.splitlines(keepends=True), table):
        # Only what a parser says tells a table's beginning from an array's line, or from a line of a string.
        with suppress(tomllib.TOMLDecodeError):
            if tomllib.loads(made) == wanted:
                return made
    return None


def _changed(lines: list[str], table: tuple[str, ...]) -> Iterator[str]:
    header = re.compile(rf"\s*\[\s*{re.escape(_dotted(table))}\s*\]")
    ours = f'snapshotter = "{NAME}"{_WAS}'
    for at in (i for i, line in enumerate(lines) if header.match(line.replace("'", '"'))):
        for i in range(at + 1, len(lines)):
            if _KEY.match(lines[i]):
                yield "".join([*lines[:i], ours + lines[i], *lines[i + 1 :]])
        end = "" if lines[at].endswith("\n") else "\n"
        yield "".join([*lines[: at + 1], end, ours + "nothing\n", *lines[at + 1 :]])


def _parsed(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FlatmountError(f"containerd's configuration is not TOML: {error}", hint="correct it first") from None


def _version(top: dict[str, Any]) -> int:
    version = top.get("version", 1)
    if version not in _CRI:
        raise UsageError(
            f"containerd's configuration is of version {version}",
            hint="versions 2 (containerd 1.6, 1.7) and 3 (2.x) are known; `containerd config migrate` makes one",
        )
    return int(version)


def _table(top: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    found: Any = top
    for name in path:
        found = found.get(name, {}) if isinstance(found, dict) else {}
    return found if isinstance(found, dict) else {}


def _dotted(path: tuple[str, ...]) -> str:
    return ".".join(f'"{name}"' if "." in name else name for name in path)
