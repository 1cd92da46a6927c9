"""`podman`: a command for each container, as podman has no daemon; its storage in a directory of the storm's."""

from __future__ import annotations

import shutil
import subprocess
import time
from dataclasses import dataclass
from typing import Final, Self

from flatmount.errors import FlatmountError, MissingFeature
from flatmount.runtime import cgroups
from flatmount.storm.engines.base import INSIDE, Ask

_SECONDS: Final = 120
_REMOVALS: Final = 10
_PAUSE_S: Final = 0.3
_IMAGE: Final = "localhost/flatmount-storm"


@dataclass(frozen=True, slots=True)
class Started:
    """A container of this engine."""

    name: str


class PodmanEngine:
    """`podman run --detach` with runc and a range of its own for each container."""

    name = "podman"

    def __init__(self, layout: str, arrivals: str, place: str) -> None:
        """`layout` is the image as an OCI layout; `place` an empty directory with a short name, for its storage.

        Raises: MissingFeature where podman is not installed.
        """
        path = shutil.which("podman")
        if path is None:
            raise MissingFeature("there is no podman", hint="install podman")
        self._layout = layout
        self._arrivals = arrivals
        self._base = place  # as it is: podman refuses a run root of more than 50 characters
        self._call = (
            path,
            "--root", f"{self._base}/root",
            "--runroot", f"{self._base}/run",
            "--tmpdir", f"{self._base}/tmp",
            "--storage-driver", "overlay",
            "--runtime", "runc",
            "--cgroup-manager", "cgroupfs",
            "--events-backend", "none",
        )  # fmt: skip

    def __enter__(self) -> Self:
        said = self._run("pull", "--quiet", f"oci:{self._layout}")
        self._run("tag", said.split()[-1], _IMAGE)
        return self

    def __exit__(self, *_: object) -> None:
        self._remove("--all")
        cgroups.remove_empty("libpod_parent")

    def start(self, ask: Ask) -> Started:
        """Run one container."""
        mapping = str(ask.mapping)
        options = (
            "--uidmap",
            mapping,
            "--gidmap",
            mapping,
            "--network",
            "none",
            "--ulimit",
            "nofile=1024:1024",
            "--ulimit",
            "nproc=1024:1024",
        )
        volume = ("--volume", f"{self._arrivals}:{INSIDE}")
        program, *arguments = ask.arguments
        self._run("run", "--detach", "--name", ask.name, *options, *volume, "--entrypoint", program, _IMAGE, *arguments)
        return Started(ask.name)

    def undo(self, started: Started) -> None:
        """Kill and remove it."""
        self._remove(started.name)

    def _remove(self, which: str) -> None:
        """A killed container's monitor runs podman's own clean-up, and one of the two finds /dev/shm busy or gone."""
        for attempt in range(_REMOVALS):
            try:
                self._run("rm", "--force", "--ignore", "--time", "0", which)
                return
            except FlatmountError:
                if attempt + 1 == _REMOVALS:
                    raise
                time.sleep(_PAUSE_S)

    def _run(self, *arguments: str) -> str:
        try:
            done = subprocess.run(
                [*self._call, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise FlatmountError(f"podman {arguments[0]} took longer than {_SECONDS} s") from error
        if done.returncode != 0:
            raise FlatmountError(f"podman {arguments[0]}: {' '.join(done.stderr.split())[-500:]}")
        return done.stdout
