"""`runc`, called as everybody calls it, from the storm's own mount namespace: the yardstick for what is around it."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Self

from flatmount.errors import FlatmountError
from flatmount.kernel.tree import remove_tree
from flatmount.plan.facts import HostFacts
from flatmount.rootfs.assembler import Assembler, Rootfs
from flatmount.rootfs.image import choose_for, specification
from flatmount.rootfs.ranges import RangePool
from flatmount.runtime import bundle as bundles
from flatmount.runtime import cgroups
from flatmount.runtime.oci import DEFAULT, LOG, Runtime, last_words
from flatmount.runtime.request import Request, Volume
from flatmount.runtime.users import User
from flatmount.store import Store, StoredImage
from flatmount.storm.engines.base import INSIDE, Ask
from flatmount.strategies import AUTO, Upper

_SECONDS: Final = 60
_ROOT: Final = User(0, 0, (), "/root")


def document(ask: Ask, bundle: str, arrivals: str, image: StoredImage) -> dict[str, Any]:
    """A container of the storm as the runtime specification writes it; `arrivals` goes to INSIDE."""
    request = Request(entrypoint=ask.arguments, workdir="/", volumes=(Volume(arrivals, INSIDE, id_mapped=False),))
    made = bundles.specification(
        container_id=ask.name,
        bundle=bundle,
        process=bundles.process_of(request, image.config, _ROOT, ask.name),
        user=_ROOT,
        mapping=ask.mapping,
        request=request,
        unified=cgroups.unified(),
    )
    made["mounts"][-1]["source"] = arrivals
    return made


@dataclass(frozen=True, slots=True)
class Started:
    """A container of this engine, and its root file system unless that is a plain directory."""

    ask: Ask
    bundle: str
    rootfs: Rootfs | None


class RuncEngine:
    """Root file systems attached to the storm's namespace by the strategy that `auto` takes, and `runc run` on each.

    With `plain`, all containers have one plain directory in their place: what runc costs alone.
    """

    def __init__(
        self, store: Store, image: StoredImage, run: str, facts: HostFacts, arrivals: str, place: str, *, plain: bool
    ) -> None:
        """`place` is a directory of the storm's."""
        self.name = "runc plain" if plain else "runc"
        self._image = image
        self._arrivals = arrivals
        self._runtime = Runtime.find(DEFAULT, run)
        self._base = f"{place}/{self.name.replace(' ', '-')}"
        self._plain = f"{self._base}/plain" if plain else None
        self._flat = os.path.join(store.data, store.ensure_flat(image)) if plain else ""
        choice = choose_for(AUTO, store, image, facts)
        self._pool = RangePool(store.data, facts)
        uppers = f"{self._base}/uppers"
        scratch = f"{self._base}/ovl-"
        spec = specification(store, image, choice, upper=Upper.ELSEWHERE, scratch=scratch)
        self._assembler = Assembler(spec, choice.name, self._pool, uppers=uppers, scratch=scratch, ephemeral=True)

    def __enter__(self) -> Self:
        for directory in (self._base, f"{self._base}/uppers", f"{self._base}/bundles"):
            os.mkdir(directory, 0o711)
        if self._plain is not None:
            subprocess.run(["cp", "-a", self._flat, self._plain], check=True)
            for directory in ("proc", "dev", "sys", "etc", INSIDE.strip("/")):
                os.makedirs(f"{self._plain}/{directory}", exist_ok=True)
            for name in ("hostname", "hosts", "resolv.conf"):
                with open(f"{self._plain}/etc/{name}", "a", encoding="ascii"):
                    pass
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def start(self, ask: Ask) -> Started:
        """Make the bundle, attach the root file system, and call runc."""
        bundle = f"{self._base}/bundles/{ask.name}"
        bundles.make_bundle(bundle)
        made = document(ask, bundle, self._arrivals, self._image)
        rootfs = None
        if self._plain is not None:
            made["root"]["path"] = self._plain
        else:
            rootfs = self._assembler.assemble(ask.mapping, ask.name, f"{bundle}/{bundles.ROOTFS}")
        started = Started(ask, bundle, rootfs)
        try:
            bundles.fill_bundle(bundle, made, mapping=ask.mapping, network=Request().network)
            self._call(started)
        except BaseException:
            self.undo(started)
            raise
        return started

    def _call(self, started: Started) -> None:
        log = f"{started.bundle}/{LOG}"
        call = [self._runtime.path, "--root", f"{self._base}/state", "--log", log, "--log-format", "json", "run"]
        done = subprocess.run(
            [*call, "--detach", "--bundle", started.bundle, started.ask.name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            raise FlatmountError(f"runc run ended with {done.returncode}: {last_words(log)}")

    def undo(self, started: Started) -> None:
        """Kill it, and take away its control groups, root file system and bundle."""
        cgroups.clear(started.ask.name)
        if started.rootfs is not None:
            started.rootfs.undo()
            self._pool.drop(started.ask.mapping)
        for parent in (f"{self._base}/state", f"{self._base}/bundles"):
            with suppress(FileNotFoundError):
                fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    remove_tree(fd, started.ask.name)
                finally:
                    os.close(fd)


def spec_json(made: dict[str, Any]) -> bytes:
    """A document as bytes."""
    return json.dumps(made).encode()
