"""A containerd of our own beside the machine's, with our snapshot service as a proxy: to prove and to measure.

Everything it has is below one directory, but for cgroups, which end with the containers.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from flatmount.errors import FlatmountError, MissingFeature, StoreError
from flatmount.kernel.executor import run_once
from flatmount.kernel.mounts import read_table
from flatmount.kernel.process import owned_name, owner_is_gone
from flatmount.kernel.tree import remove_tree
from flatmount.plan.operations import MountPlan, Unmount, UnmountFlag
from flatmount.runtime.daemons import SHIMS, end_program, kill_those_of, start_program, wait_for
from flatmount.snapshotter import containerd

PAUSE_IMAGE = "localhost/flatmount-pause:latest"
_VERSION = re.compile(r"\bv?(\d+\.\d+\.\d+)")

_COMMAND_S = 120.0
_PLACE = "/var/tmp"
_PREFIX = "flatmount-engine-"
_DAEMONS = (*SHIMS, "containerd", "dockerd", "snapshotter")

_TOP = """version = 2
root = "{place}/root"
state = "{place}/state"
{disabled}
[grpc]
  address = "{place}/c.sock"
[ttrpc]
  address = "{place}/c.ttrpc"
[plugins."io.containerd.nri.v1.nri"]
  disable = true
[plugins."io.containerd.internal.v1.opt"]
  path = "{place}/opt"
"""
_NO_CRI = 'disabled_plugins = ["io.containerd.grpc.v1.cri"]'
# Files of version 2 are read by every containerd from 1.3 on; 2.x turns them into its own.
_CRI = """[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  disable_apparmor = true
  restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
  conf_dir = "{place}/cni"
  bin_dir = "{plugins}"
[plugins."io.containerd.grpc.v1.cri".containerd]
  default_runtime_name = "runc"
"""
# The network of TEST-NET-1, in a network namespace of the engine's own: the host's is not touched.
POD_SUBNET = "192.0.2."
_BRIDGE = """{{"cniVersion": "0.4.0", "name": "flatmount", "plugins": [{{"type": "bridge", "bridge": "flatmount0",
 "isGateway": true, "ipMasq": false, "ipam": {{"type": "host-local", "dataDir": "{place}/addresses",
 "ranges": [[{{"subnet": "{subnet}0/24"}}]], "routes": [{{"dst": "0.0.0.0/0"}}]}}}}]}}
"""
_PLUGINS = ("bridge", "host-local", "loopback")
_PLUGIN_PLACES = ("/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni")
# A pod in a user namespace has a network of its own, and CRI asks for plugins and an address. This one leaves it empty.
_NETWORK = """{"cniVersion": "0.4.0", "name": "none", "plugins": [{"type": "flatmount-none"}]}
"""
_PLUGIN = """#!/bin/sh
case "$CNI_COMMAND" in
VERSION) echo '{"cniVersion": "0.4.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0"]}' ;;
ADD) cat <<END
{"cniVersion": "0.4.0", "interfaces": [{"name": "$CNI_IFNAME", "sandbox": "$CNI_NETNS"}],
 "ips": [{"version": "4", "address": "192.0.2.2/24", "interface": 0}]}
END
;;
esac
"""


@dataclass(frozen=True, slots=True)
class Engine:
    """A running pair of containerd and our service. `path` is the PATH that its programs are found by."""

    place: str
    version: str
    form: str
    path: str
    process: int
    service: int

    @property
    def socket(self) -> str:
        """containerd's."""
        return f"{self.place}/c.sock"

    @property
    def snapshotter_socket(self) -> str:
        """Our service's."""
        return f"{self.place}/run/snapshotter.sock"

    def has_flat(self, layers: int) -> bool:
        """Whether our service gives an image of so many layers as its flat tree; one layer is flat as it is.

        The number of a snapshot does not tell its place in a chain, nor a directory what is answered.
        """
        with open(f"{self.place}/service.log", encoding="utf-8") as file:
            lines = [json.loads(line) for line in file if line.startswith("{") and line.endswith("}\n")]
        return layers == 1 or any((line["msg"], line.get("layers")) == ("flat tree made", layers) for line in lines)

    def addresses(self) -> list[str]:
        """What pods have of the engine's own network, where it has one."""
        try:
            return [name for name in os.listdir(f"{self.place}/cni/addresses/flatmount") if name.startswith(POD_SUBNET)]
        except FileNotFoundError:
            return []

    def command(self, *arguments: str) -> list[str]:
        """A call of `ctr`."""
        ctr = shutil.which("ctr", path=self.path)
        if ctr is None:
            raise MissingFeature("ctr is not installed", hint="install containerd's client")
        return [ctr, "--address", self.socket, *arguments]

    def ctr(self, *arguments: str) -> str:
        """Run `ctr` and return what it said. Raises: FlatmountError with its last line."""
        return call(*self.command(*arguments), path=self.path)

    def take_image(
        self, archive: str, name: str, *, namespace: str = "default", snapshotter: str = "flatmount"
    ) -> None:
        """Import an OCI archive with one image, and give it the name `name`."""
        own = ("-n", namespace, "images")
        self.ctr(*own, "import", "--snapshotter", snapshotter, archive)
        found = [line for line in self.ctr(*own, "ls", "-q").split() if not line.startswith("sha256:")]
        if name not in found:
            self.ctr(*own, "tag", found[-1], name)

    def tasks(self, namespace: str = "default") -> dict[str, int]:
        """Running containers and their processes, as seen from here."""
        rows = [line.split() for line in self.ctr("-n", namespace, "tasks", "ls").splitlines()[1:]]
        return {row[0]: int(row[1]) for row in rows if len(row) >= 3 and row[2] == "RUNNING"}

    def remove(self, name: str, namespace: str = "default") -> None:
        """Kill a container and remove it."""
        self.ctr("-n", namespace, "tasks", "rm", "--force", name)
        self.ctr("-n", namespace, "containers", "rm", name)


@contextmanager
def engine_place() -> Iterator[str]:
    """A fresh directory below /var/tmp that a runtime in a user namespace can walk through; gone afterwards.

    What an engine that has ended left mounted in it is taken off first: nothing is ever deleted through a mount. What
    commands that were killed have left of theirs, daemons and containers included, goes as well.
    Raises: StoreError, where it cannot be removed.
    """
    _sweep()
    path = os.path.join(_PLACE, owned_name(_PREFIX + secrets.token_hex(4)))
    os.mkdir(path, 0o700)
    os.chmod(path, 0o711)
    try:
        yield path
    finally:
        _clear(path)


def _sweep() -> None:
    for name in os.listdir(_PLACE):
        path = os.path.join(_PLACE, name)
        if not name.startswith(_PREFIX) or not owner_is_gone(name):
            continue
        # Anybody may make such a name there. What cannot go now is tried again by the next.
        with suppress(OSError, StoreError):
            status = os.lstat(path)
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                kill_those_of(path, _DAEMONS)
                _clear(path)


def _clear(path: str) -> None:
    # What is below it is of engines that have ended.
    for point in sorted((e.mount_point for e in read_table() if e.mount_point.startswith(f"{path}/")), reverse=True):
        run_once(MountPlan((Unmount(point, UnmountFlag.DETACH | UnmountFlag.NOFOLLOW),), keep_going=True))
    parent = os.open(_PLACE, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        remove_tree(parent, os.path.basename(path))
    except OSError as error:
        raise StoreError(f"{path} cannot be removed: {error}", hint="unmount what is in it and remove it") from error
    finally:
        os.close(parent)


@contextmanager
def running_engine(
    place: str, *, form: str = "auto", cri: bool = False, bridge: bool = False, programs: str = ""
) -> Iterator[Engine]:
    """A containerd and a snapshot service of their own below the empty directory `place`, ended when the block is left.

    Args:
        place: absolute, 0711 or wider all the way: a runtime in a user namespace walks through it.
        form: the service's.
        cri: with Kubernetes' door, where our service is the snapshotter.
        bridge: containerd has a network namespace of its own, in which the CNI plugins `bridge`, `host-local` and
            `loopback` connect the pods that have a network; without it such a network stays empty.
        programs: a directory that containerd, its shim and ctr are taken from; "" for PATH.

    Mounts are made in the calling thread's mount namespace. Raises: MissingFeature, FlatmountError.
    """
    path = os.pathsep.join(
        filter(None, (programs, os.environ.get("PATH", os.defpath), "/usr/local/sbin:/usr/sbin:/sbin"))
    )
    program = shutil.which("containerd", path=path)
    if program is None:
        raise MissingFeature("containerd is not installed", hint="install it, or name a directory that has it")
    version = engine_version(program)
    store, run = f"{place}/store", f"{place}/run"
    command = [program, "--config", f"{place}/config.toml"]
    text = _TOP.format(place=place, disabled="" if cri else _NO_CRI)
    if cri:
        plugins = _write_bridge(f"{place}/cni", programs) if bridge else _write_network(f"{place}/cni")
        text += _CRI.format(place=place, plugins=plugins, pause=PAUSE_IMAGE)
    if bridge:
        command = [*_apart(path), *command]
    with open(f"{place}/config.toml", "w", encoding="utf-8") as file:
        file.write(containerd.install(text, f"{run}/snapshotter.sock", cri=cri))
    service_command = [sys.executable, "-P", "-m", "flatmount", "snapshotter", "--root", store, "--form", form]
    # The machine's own service may have the address that its configuration names.
    service_command += ["--metrics", "", "--log-level", "info"]
    environment = {**os.environ, "PATH": path}
    service = start_program(service_command, f"{place}/service.log", {**environment, "FLATMOUNT_RUN": run})
    try:
        wait_for(lambda: os.path.exists(f"{run}/snapshotter.sock"), service, f"{place}/service.log")
        daemon = start_program(command, f"{place}/containerd.log", environment)
        try:
            engine = Engine(place, version, form, path, daemon.pid, service.pid)
            wait_for(lambda: _serves(engine), daemon, f"{place}/containerd.log")
            yield engine
        finally:
            try:
                end_program(daemon)
            finally:
                kill_those_of(place)
    finally:
        end_program(service)


def engine_version(program: str) -> str:
    """The version that containerd's `program` tells. Raises: FlatmountError."""
    said = call(program, "--version", path=os.environ.get("PATH", os.defpath))
    found = _VERSION.search(said)
    if found is None:
        raise FlatmountError(f"{program} tells no version: {said.strip()!r}", hint="is it containerd?")
    return found[1]


def call(*command: str, path: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a program, with PATH and more in its environment, and return its standard output.

    Raises: FlatmountError with its last line.
    """
    more = {"PATH": path, **(environment or {})}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_COMMAND_S, env={**os.environ, **more}
        )
    except subprocess.TimeoutExpired:
        raise FlatmountError(
            f"{os.path.basename(command[0])} has taken {_COMMAND_S:.0f} s", hint="see its log"
        ) from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise FlatmountError(f"{os.path.basename(command[0])} said: {said[-1] if said else done.returncode}")
    return done.stdout


def _apart(path: str) -> tuple[str, ...]:
    unshare = shutil.which("unshare", path=path)
    if unshare is None:
        raise MissingFeature("unshare is not installed", hint="install util-linux")
    return unshare, "--net", "--"


def _write_bridge(place: str, programs: str) -> str:
    """A network of real plugins. Returns the directory that has them."""
    for plugins in filter(None, (programs, *_PLUGIN_PLACES)):
        if all(os.access(f"{plugins}/{name}", os.X_OK) for name in _PLUGINS):
            os.makedirs(place, exist_ok=True)
            with open(f"{place}/10-bridge.conflist", "w", encoding="utf-8") as file:
                file.write(_BRIDGE.format(place=place, subnet=POD_SUBNET))
            return plugins
    raise MissingFeature(
        f"the network plugins {', '.join(_PLUGINS)} are not installed",
        hint="install containernetworking-plugins, or put them into --engine DIR",
    )


def _write_network(place: str) -> str:
    """A network that stays empty. Returns the directory with its plugins."""
    os.makedirs(f"{place}/bin", exist_ok=True)
    with open(f"{place}/10-none.conflist", "w", encoding="utf-8") as file:
        file.write(_NETWORK)
    for name in ("loopback", "flatmount-none"):
        with open(f"{place}/bin/{name}", "w", encoding="utf-8") as file:
            file.write(_PLUGIN)
            os.fchmod(file.fileno(), 0o755)
    return f"{place}/bin"


def _serves(engine: Engine) -> bool:
    asking = engine.command("version")
    return os.path.exists(engine.socket) and not subprocess.run(asking, capture_output=True, check=False).returncode
