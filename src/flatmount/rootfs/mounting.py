"""Mounts that outlive the command: made, recorded, taken off, and put right after a kill."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from flatmount.errors import FlatmountError, InUse, OperationFailed, UsageError
from flatmount.kernel.executor import run_once
from flatmount.kernel.mounts import MountEntry, read_table
from flatmount.kernel.process import owned_name
from flatmount.plan.facts import HostFacts
from flatmount.plan.mapping import Mapping
from flatmount.plan.operations import MountPlan, Unmount, UnmountFlag
from flatmount.rootfs.assembler import Assembler
from flatmount.rootfs.image import choose_for, specification, trees_of
from flatmount.rootfs.ranges import RangePool
from flatmount.rootfs.records import Record, Records, State, check_id, new_id
from flatmount.rootfs.signals import undivided
from flatmount.rootfs.uppers import UpperPlace, check_reuse, make_upper, remove_own_upper
from flatmount.rootfs.workplace import sweep, workplace
from flatmount.store import FlatForm, Store, StoredImage
from flatmount.strategies import PINNING, Choice, Upper, flat
from flatmount.strategies.parts import EROFS


@dataclass(frozen=True, slots=True)
class Request:
    """What `mount` was asked for. `upper` is a directory for the changes; None keeps them in the store, by id."""

    image: StoredImage
    target: str
    mapping: Mapping
    strategy: str
    id: str | None = None
    upper: str | None = None
    ephemeral: bool = False
    read_only: bool = False
    flat_form: FlatForm = FlatForm.HARDLINK  # of a flat tree that must be built


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount that stands, with its record and how it was made."""

    record: Record
    choice: Choice
    mount_operations: int


@contextmanager
def pinned_target(path: str) -> Iterator[tuple[str, str]]:
    """The directory to mount on, held open: nobody can put another one in its place any more.

    Gives its resolved path, and a path through the descriptor that leads to it and nowhere else.
    Raises: UsageError for what is not an empty directory, is a symbolic link, or has something mounted on it already.
    """
    parent = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    target = os.path.join(parent, os.path.basename(os.path.abspath(path)))
    try:
        found = os.lstat(target)
    except FileNotFoundError:
        raise UsageError(f"the target {target} does not exist", hint="make an empty directory there") from None
    if stat.S_ISLNK(found.st_mode):
        raise UsageError(f"the target {target} is a symbolic link", hint="name the directory itself")
    if not stat.S_ISDIR(found.st_mode):
        raise UsageError(f"the target {target} is not a directory", hint="name an empty directory")
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.readlink(f"/proc/self/fd/{fd}") != target:
            raise UsageError(f"the target {target} was put in another place meanwhile", hint="try again")
        if any(entry.mount_point == target for entry in read_table()):
            raise UsageError(f"something is mounted on {target} already", hint="`flatmount umount` it first")
        if os.listdir(fd):
            raise UsageError(f"the target {target} is not empty", hint="its content would be hidden; name an empty one")
        # The dot at the end: a name that ends in the link itself would not be followed.
        yield target, f"/proc/self/fd/{fd}/."
    finally:
        os.close(fd)


def mount(store: Store, records: Records, run: str, request: Request, facts: HostFacts) -> Mounted:
    """Assemble a root file system that outlives this process, and record it.

    Nothing but the mount at the target is added to the mount table. A failure leaves everything as it was; a signal
    that ends the process arrives after the mount was made and taken off again.
    Raises: UsageError, MappingError, OperationFailed, MissingFeature, StoreError; InUse for an upper that is mounted.
    """
    choice = choose_for(request.strategy, store, request.image, facts, flat_form=request.flat_form)
    mount_id = new_id() if request.id is None else check_id(request.id)
    place = _upper_place(store, request, mount_id)
    fresh = not request.read_only and not os.path.lexists(place.path)
    if request.ephemeral and not fresh:
        raise UsageError(f"the upper {place.path} exists, so that it cannot be ephemeral", hint="name another --id")
    # The usual code attaches temporary mounts: they go below a directory that the next command clears after a kill.
    temporary = nullcontext("") if choice.name in PINNING else workplace(run, f"mount-{mount_id}", ram=False)
    with pinned_target(request.target) as (target, pinned), temporary as scratch:
        spec = specification(
            store,
            request.image,
            choice,
            mapping=request.mapping,
            upper=place.kind,
            fresh_upper=fresh,
            upper_made=fresh,
            scratch=scratch + "/ovl-",
        )
        pool = RangePool(store.data, facts)
        assembler = Assembler(spec, choice.name, pool, uppers=place.uppers, scratch=scratch + "/ovl-")
        if not request.read_only and not fresh:
            check_reuse(place, image=request.image.digest, ids=assembler.ids, mapping=request.mapping)
        record = Record(
            id=mount_id,
            state=State.MOUNTING,
            owner=owned_name("flatmount"),
            root=store.root,
            image=request.image.digest,
            name=request.image.name,
            target=target,
            strategy=choice.name,
            map=",".join(map(str, request.mapping.uids)),
            gid_map=",".join(map(str, request.mapping.gids)),
            uppers=place.uppers,
            upper=place.name,
            writable=not request.read_only,
            ephemeral=request.ephemeral,
            made_upper=fresh,
            namespace=_namespace(),
        )
        try:
            with undivided() as interrupted:
                _claim(records, record)
                try:
                    if not request.read_only and not fresh and not os.path.lexists(place.path):
                        raise FlatmountError(f"the upper {place.path} was removed meanwhile", hint="try again")
                    store.hold(request.image, records.holder(record), trees=trees_of(spec))
                    if fresh:
                        make_upper(
                            place,
                            mount_id=mount_id,
                            image=request.image.digest,
                            ids=assembler.ids,
                            mapping=request.mapping,
                            ephemeral=request.ephemeral,
                        )
                    operations = _assemble(assembler, request.mapping, place.name, target, pinned)
                    if not interrupted():
                        top = _at(target)[-1]
                        done = records.update(record, State.MOUNTED, mount_id=top.unique_id or top.id)
                        return Mounted(done, choice, operations)
                except BaseException:
                    umount(store, records, record)
                    raise
                umount(store, records, record)
        finally:
            pool.close()
    raise FlatmountError("interrupted; the mount is undone")


def _assemble(assembler: Assembler, mapping: Mapping, name: str, target: str, pinned: str) -> int:
    try:
        return assembler.assemble(mapping, name, pinned).outcome.mount_operations
    except OperationFailed as failure:
        failure.args = (str(failure).replace(pinned, target),)
        raise


def umount(store: Store, records: Records, record: Record) -> int:
    """Take a recorded mount off; an ephemeral upper goes with it, any other stays. Returns mount operations.

    Raises: InUse where something still uses it or covers it, or it is in another mount namespace; nothing has changed
    then.
    """
    with records.locked():
        here = record.namespace == _namespace()
        if not here and _namespace_lives(record.namespace):
            raise InUse(
                f"{record.target} is mounted in another mount namespace (mnt:[{record.namespace}])",
                hint="run umount there: nsenter --mount -t PID of a process in it",
            )
        # A mount that was never finished goes with the upper it made.
        removes_upper = record.made_upper and (record.ephemeral or record.state is State.MOUNTING)
        known = record.state
        record = records.update(record, State.UNMOUNTING, ephemeral=removes_upper)
        count = 0
        try:
            if here and _covers(record, known):
                outcome = run_once(MountPlan((Unmount(record.target, UnmountFlag.NOFOLLOW),), keep_going=True))
                if outcome.failure is not None:
                    raise InUse(str(outcome.failure), hint=outcome.failure.hint)
                count = outcome.mount_operations
        except InUse:
            records.update(record, known)
            raise
        if record.writable and removes_upper:
            remove_own_upper(record.uppers, record.upper, record.id)
        store.release(records.holder(record))
        records.remove(record)
    return count


def recover(run: str, store: Store | None) -> tuple[str, ...]:
    """Undo what killed commands left half-way: workplaces of storms, and mounts of this store.

    Returns what was put right, in words. Cheap where there is nothing: two directory listings.
    """
    told = [f"cleared {name}, left by a killed command" for name in sweep(run)]
    records = Records(run)
    records.sweep_drafts()
    damaged = records.damaged()
    told += [f"the record {path} is damaged; remove it by hand" for path in damaged]
    for record in records.abandoned():
        if store is not None and record.root == store.root:
            what = f"the mount {record.id} at {record.target}, left half-way by a killed command"
            try:
                umount(store, records, record)
                told.append(f"undid {what}")
            except FlatmountError as error:
                told.append(f"could not undo {what}: {error.line()}")
    # Nobody can tell whose the lease of a damaged record is.
    if store is not None and not damaged:
        # Leases first, then records: a record is written before its lease is taken.
        leases = [lease.holder for lease in store.holders()]
        known = {records.holder(record) for record in records.all()}
        for holder in leases:
            if records.is_ours(holder) and holder not in known:
                store.release(holder)
    return tuple(told)


def _claim(records: Records, record: Record) -> None:
    """Write the record, unless another mount has the same upper: overlayfs would only warn, and lose changes."""
    with records.locked():
        for other in records.all():
            if record.writable and other.writable and (other.uppers, other.upper) == (record.uppers, record.upper):
                raise InUse(
                    f"the upper {record.uppers}/{record.upper} is in use by the mount {other.id} at {other.target}",
                    hint="name another --id or --upper, or umount that one",
                )
        records.add(record)


def _upper_place(store: Store, request: Request, mount_id: str) -> UpperPlace:
    if request.read_only or request.upper is None:
        kind = Upper.NONE if request.read_only else Upper.STORE
        return UpperPlace(kind, os.path.join(store.data, "uppers"), mount_id)
    directory = os.path.realpath(request.upper)
    if not os.path.isdir(os.path.dirname(directory)):
        raise UsageError(f"{os.path.dirname(directory)} is not a directory", hint="--upper is made inside it")
    if directory.startswith(store.data + os.sep):
        raise UsageError(f"--upper {directory} is inside the store", hint="leave --upper away to keep it there")
    if set(os.path.basename(directory)) & set("\\,:"):
        raise UsageError(f"--upper {directory} has a comma, colon or backslash in its name", hint="name it otherwise")
    return UpperPlace(Upper.ELSEWHERE, os.path.dirname(directory), os.path.basename(directory))


def _namespace() -> int:
    return os.stat("/proc/self/ns/mnt").st_ino


def _namespace_lives(number: int) -> bool:
    """Whether any process that /proc shows is in a mount namespace."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{pid}/ns/mnt").st_ino == number:
                return True
        except OSError:
            continue
    return False


def _at(target: str) -> list[MountEntry]:
    return [entry for entry in read_table() if entry.mount_point == target]


def _covers(record: Record, state: State) -> bool:
    """Whether the mount at the target is the one recorded. Raises: InUse where another one lies over it."""
    here = _at(record.target)
    ours = [entry for entry in here if _is_ours(entry, record, state)]
    if ours and here[-1] is not ours[-1]:
        raise InUse(f"something else is mounted over {record.target}", hint="take that off first")
    return bool(ours)


def _is_ours(entry: MountEntry, record: Record, state: State) -> bool:
    if record.mount_id is not None:
        return (entry.unique_id or entry.id) == record.mount_id
    # Killed before the number was known. Nothing was mounted at the target before, so that it takes little to be sure.
    if state is State.MOUNTED:
        return False
    ours = entry.source in (f"flatmount-{record.upper}", "overlay") or "/v1/data/" in entry.root
    # An EROFS image is mounted itself only as a read-only root.
    return ours or (entry.fs_type == EROFS and not record.writable and record.strategy == flat.NAME)
