"""Starting containers of one image: root file system, bundle, volumes, runtime; and taking all of it back."""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from flatmount.errors import FlatmountError, MissingFeature
from flatmount.kernel.tree import remove_tree
from flatmount.plan.facts import HostFacts
from flatmount.plan.mapping import Mapping
from flatmount.rootfs.assembler import Assembler, Rootfs
from flatmount.rootfs.image import choose_for, specification, trees_of
from flatmount.rootfs.ranges import RangePool
from flatmount.rootfs.workplace import ensure_run_directory, take_off_below
from flatmount.runtime import book, cgroups, volumes
from flatmount.runtime import bundle as bundles
from flatmount.runtime.launch import Launch, Running, RuntimeRefused, StartFailed, launch
from flatmount.runtime.oci import ContainerError, Runtime, refused
from flatmount.runtime.records import Containers, Record, State
from flatmount.runtime.request import Attachment, Request
from flatmount.runtime.template import WITHOUT, Template, Templates
from flatmount.runtime.users import require_mapped, resolve
from flatmount.store import FlatForm, Store, StoredImage
from flatmount.strategies import AUTO, Attach, Choice, Upper

LOG_BYTES: Final = 16 << 20
_SHIM_ENDS_S: Final = 10.0
_ENTERING: Final = ("setns to the template namespace", "copy the template namespace", "move_mount", "setns back")


@dataclass(frozen=True, slots=True)
class Started:
    """A container that runs. `mount_operations` are those that the host's table saw."""

    record: Record
    running: Running
    mount_operations: int


@dataclass(frozen=True, slots=True)
class How:
    """What is the same for all containers of a starter, beside their image."""

    runtime: Runtime
    attachment: Attachment = Attachment.PRIVATE
    strategy: str = AUTO
    log_bytes: int = LOG_BYTES
    flat_form: FlatForm = FlatForm.HARDLINK  # of a flat tree that must be built


class Starter:
    """Starts containers of one image. Safe to use from any number of threads; a context manager.

    Every start has a record first, so that whatever a kill leaves is known to the next command. Ranges and leases in
    the store's book are the caller's.
    """

    def __init__(self, store: Store, image: StoredImage, run: str, facts: HostFacts, how: How) -> None:
        """Prepare: the image's flat tree is made if the strategy, asked for by name, needs one."""
        self.image = image
        self.how = how
        self.containers = Containers(run)
        self.choice: Choice = choose_for(how.strategy, store, image, facts, flat_form=how.flat_form)
        self.store = store
        ensure_run_directory(run)
        require_passable(run)
        os.makedirs(self.containers.base, mode=0o711, exist_ok=True)
        os.makedirs(how.runtime.root, mode=0o711, exist_ok=True)
        scratch_directory = os.path.join(run, "tmp")
        os.makedirs(scratch_directory, mode=0o700, exist_ok=True)
        scratch = os.path.join(scratch_directory, "ovl-")
        self._private = how.attachment is Attachment.PRIVATE
        spec = specification(
            store,
            image,
            self.choice,
            upper=Upper.STORE,
            attach=Attach.NONE if self._private else Attach.HOST,
            scratch=scratch,
        )
        self.trees = trees_of(spec)  # what a container's lease must find in the store
        self.pool = RangePool(store.data, facts)
        self._assembler = Assembler(
            spec, self.choice.name, self.pool, uppers=uppers_of(store.data), scratch=scratch, ephemeral=True
        )
        self._templates = Templates(places_of(run, how.runtime))
        self._unified = cgroups.unified()

    def __enter__(self) -> Starter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of ranges and of the template. Containers that run keep theirs."""
        self.pool.close()

    def template(self) -> Template | None:
        """The template namespace, made on first use; None where root file systems are attached to the host."""
        return self._templates.get() if self._private else None

    def start(
        self,
        container_id: str,
        mapping: Mapping,
        request: Request,
        *,
        foreground: bool,
        bound: bool,
        remove: bool,
        after: tuple[str, ...] = (),
        holder: str = "",
    ) -> Started:
        """Start one container.

        Args:
            container_id: its name; checked before.
            foreground: our standard streams are its own.
            bound: it is killed when this process is.
            remove: it goes when it ended; `after` is what the shim executes to that end.
            holder: what the store's book knows the container as.

        Raises: FlatmountError, with nothing left; NotFound, NotExecutable where the command is the reason.
        """
        self.image.owners.require(mapping)
        record = self._record(container_id, mapping, request, remove, holder)
        lock = self.containers.add(record)
        try:
            return self._start(record, mapping, request, lock, foreground=foreground, bound=bound, after=after)
        except BaseException:
            take_apart(self.containers, record, data=self.store.data)
            self.containers.forget(record)
            raise
        finally:
            os.close(lock)

    def _record(self, container_id: str, mapping: Mapping, request: Request, remove: bool, holder: str) -> Record:
        return Record(
            id=container_id,
            root=self.store.root,
            holder=holder,
            image=self.image.digest,
            image_name=self.image.name,
            command=bundles.arguments_of(request, self.image.config),
            created_ns=time.time_ns(),
            attachment=self.how.attachment,
            strategy=self.choice.name,
            map=",".join(map(str, mapping.uids)),
            gid_map=",".join(map(str, mapping.gids)),
            runtime=self.how.runtime.path,
            remove=remove,
            terminal=request.terminal,
            stop_signal=self.image.config.stop_signal,
        )

    def _start(
        self,
        record: Record,
        mapping: Mapping,
        request: Request,
        lock: int,
        *,
        foreground: bool,
        bound: bool,
        after: tuple[str, ...],
    ) -> Started:
        directory = self.containers.directory(record.id)
        bundle = f"{directory}/bundle"
        bundles.make_bundle(bundle)
        root = f"{bundle}/{bundles.ROOTFS}"
        rootfs = self._assembler.assemble(mapping, record.id, "" if self._private else root)
        try:
            process, owner = self._describe(record, mapping, request, bundle, rootfs)
            attachment = self.how.attachment
            with volumes.prepared(request.volumes, rootfs.range.namespace, bundle, attachment) as trees:
                template = self.template()
                wanted = Launch(
                    directory=directory,
                    command=self.how.runtime.run(record.id, directory, terminal=request.terminal),
                    owner=owner,
                    log_bytes=self.how.log_bytes,
                    foreground=foreground,
                    bound=bound,
                    terminal=request.terminal,
                    template=template.namespace.fileno() if template else None,
                    trees=(((rootfs.descriptor, root), *trees) if rootfs.descriptor is not None else ()),
                    lock=lock,
                    after=after,
                )
                running = self._launch(wanted, process.arguments[0])
        finally:
            if rootfs.descriptor is not None:
                os.close(rootfs.descriptor)
                rootfs.descriptor = None
        seen = 0 if self._private else rootfs.outcome.mount_operations + len(request.volumes)
        return Started(record, running, seen)

    def _describe(
        self, record: Record, mapping: Mapping, request: Request, bundle: str, rootfs: Rootfs
    ) -> tuple[bundles.Process, tuple[int, int]]:
        """Fill the bundle. Returns the first process, and the host's ids of its user."""
        root_fd = rootfs.descriptor
        if root_fd is None:
            root_fd = os.open(f"{bundle}/{bundles.ROOTFS}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            asked = self.image.config.user if request.user is None else request.user
            user = resolve(root_fd, asked)
        finally:
            if rootfs.descriptor is None:
                os.close(root_fd)
        require_mapped(user, mapping)
        hostname = bundles.hostname_of(record.id, request)
        process = bundles.process_of(request, self.image.config, user, hostname)
        document = bundles.specification(
            container_id=record.id,
            bundle=bundle,
            process=process,
            user=user,
            mapping=mapping,
            request=request,
            unified=self._unified,
        )
        bundles.fill_bundle(bundle, document, mapping=mapping, network=request.network)
        return process, (mapping.host_uid(user.uid), mapping.host_gid(user.gid))

    def _launch(self, wanted: Launch, command: str) -> Running:
        try:
            return launch(wanted)
        except RuntimeRefused as failure:
            raise refused(wanted.directory, command, self.how.runtime) from failure
        except StartFailed as failure:
            if failure.step in _ENTERING:
                raise MissingFeature(f"this kernel does not attach privately: {failure}", hint=WITHOUT) from failure
            raise


def places_of(run: str, runtime: Runtime) -> tuple[str, ...]:
    """What a template must show beside the host's own: where bundles, the runtime's state and the runtime are."""
    return run, runtime.root, runtime.path


def require_passable(directory: str) -> None:
    """Refuse a place that a container's root, who is no user of the host, cannot walk to. Raises: ContainerError."""
    path = os.path.realpath(directory)
    while path != "/":
        if not os.stat(path).st_mode & stat.S_IXOTH:
            raise ContainerError(
                f"containers cannot be under {directory}: {path} lets only its owner through",
                hint=f"name another directory with $FLATMOUNT_RUN, or `chmod o+x {path}`",
            )
        path = os.path.dirname(path)


def uppers_of(data: str) -> str:
    """Where the uppers of a store's containers are, by id."""
    return os.path.join(data, "uppers")


def take_apart(containers: Containers, record: Record, *, data: str, keep_upper: bool = False) -> None:
    """Kill and undo everything of a container but its record and what the store's book says; part of it may be gone.

    Mounts first and trees after: nothing is ever removed through a mount. Raises: FlatmountError, OSError.
    """
    directory = containers.directory(record.id)
    Runtime(record.runtime, os.path.join(containers.run, "runtime")).delete(record.id)
    cgroups.clear(record.id)
    _remove(os.path.join(containers.run, "runtime"), record.id)
    if record.attachment is Attachment.HOST:
        take_off_below(directory)
    if not keep_upper:
        _remove(uppers_of(data), record.id)


def remove(containers: Containers, store: Store, record: Record, *, force: bool = False) -> None:
    """Remove a container that ended: its upper, log, ids and lease. With `force` one that runs is killed first.

    Raises: InUse for one that runs; FlatmountError.
    """
    if force and containers.state(record) in (State.RUNNING, State.CREATING):
        kill(containers, record)
    # A shim writes down the end before it ends itself.
    wait_s = _SHIM_ENDS_S if containers.state(record) is State.EXITED else 0.0
    with containers.locked(record, wait_s=wait_s):
        take_apart(containers, record, data=store.data)
        book.release(store, record.holder)
        containers.forget(record)


def kill(containers: Containers, record: Record, *, seconds: float = 10.0) -> None:
    """End a container now, and wait until its shim has written that down. Raises: FlatmountError."""
    cgroups.clear(record.id)
    deadline = time.monotonic() + seconds
    while containers.state(record) in (State.RUNNING, State.CREATING):
        if time.monotonic() > deadline:
            raise FlatmountError(f"container {record.id} was killed and its shim does not say so")
        time.sleep(0.005)


def _remove(parent: str, name: str) -> None:
    with suppress(FileNotFoundError):
        fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            remove_tree(fd, name)
        finally:
            os.close(fd)
