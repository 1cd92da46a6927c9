"""nerdctl on an engine of our own, with our snapshots: to prove it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flatmount.errors import FlatmountError, MissingFeature
from flatmount.kernel.executor import run_once
from flatmount.plan.mapping import Mapping
from flatmount.plan.operations import Mount, MountFlag, MountPlan, Unmount, UnmountFlag
from flatmount.snapshotter.engine import Engine, call

Nerdctl = Callable[..., str]

# nerdctl takes a user's range from these files and from nowhere else.
RANGE_FILES = ("/etc/subuid", "/etc/subgid")
_USER = "root"


def nerdctl_on(engine: Engine) -> Nerdctl:
    """A call of nerdctl on the engine's containerd, with our snapshotter, whose files are all below the engine's place.

    Raises: MissingFeature where it is not installed. The call raises FlatmountError with nerdctl's last line.
    """
    program = shutil.which("nerdctl", path=engine.path)
    if program is None:
        raise MissingFeature("nerdctl is not installed", hint="name another --door, or an --engine DIR")
    place = f"{engine.place}/nerdctl"
    os.makedirs(place, mode=0o711, exist_ok=True)
    configuration = f"{place}/nerdctl.toml"
    with open(configuration, "w", encoding="utf-8") as file:
        file.write(f'address = "{engine.socket}"\nsnapshotter = "flatmount"\ndata_root = "{place}/data"\n')
        file.write(f'cni_netconfpath = "{place}/cni"\ncgroup_manager = "cgroupfs"\n')
    # The machine's own configuration is not read. What nerdctl starts as a hook or a log gets its words as arguments.
    environment = {"NERDCTL_TOML": configuration, "DOCKER_CONFIG": place}
    return lambda *arguments: call(program, *arguments, path=engine.path, environment=environment)


def offers_ranges(engine: Engine, nerdctl: Nerdctl) -> bool:
    """Whether a container can be started in a user namespace. Raises: FlatmountError.

    nerdctl before 2.1 has no word for it; later ones ask containerd what our snapshotter is capable of, and 1.6 tells
    that of no proxy.
    """
    told = engine.ctr("plugins", "ls", "--detailed", "id==flatmount")
    return "--userns-remap" in nerdctl("--help") and "remap-ids" in told


@contextmanager
def root_has_range(engine: Engine, mapping: Mapping) -> Iterator[str]:
    """Give root the ranges of `mapping` in /etc/subuid and /etc/subgid, as seen in this mount namespace.

    Yields the word for `--userns-remap`. Two mounts over these files, taken off when the block is left; the files
    themselves are not touched. Raises: FlatmountError where the machine has no such files.
    """
    done: list[str] = []
    try:
        for target, ranges in zip(RANGE_FILES, (mapping.uids, mapping.gids), strict=True):
            if not os.path.exists(target):
                raise FlatmountError(f"there is no {target}, from which nerdctl takes ranges", hint="make an empty one")
            source = f"{engine.place}/nerdctl/{os.path.basename(target)}"
            with open(source, "w", encoding="utf-8") as file:
                file.writelines(f"{_USER}:{one.host}:{one.size}\n" for one in ranges)
            run_once(MountPlan((Mount(source, target, None, MountFlag.BIND),)))
            done.append(target)
        yield _USER
    finally:
        run_once(MountPlan(tuple(Unmount(target, UnmountFlag.DETACH) for target in reversed(done)), keep_going=True))
