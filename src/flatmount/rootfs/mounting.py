"""Mounts that outlive the command: made, recorded, taken off, and put right after a kill."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass

from flatmount.errors import FlatmountError, InUse, UsageError
from flatmount.kernel.executor import run_once
from flatmount.kernel.mounts import read_table
from flatmount.kernel.process import owned_name
from flatmount.kernel.tree import remove_tree
from flatmount.plan.facts import HostFacts
from flatmount.plan.mapping import Mapping
from flatmount.plan.operations import MountPlan, Unmount, UnmountFlag
from flatmount.rootfs.assembler import Assembler, Rootfs
from flatmount.rootfs.image import choose_for, specification
from flatmount.rootfs.ranges import RangePool
from flatmount.rootfs.records import Record, Records, State, check_id, new_id
from flatmount.rootfs.workplace import ensure_run_directory, sweep
from flatmount.store import Store, StoredImage
from flatmount.strategies import Choice, Ids, Upper

UPPER_RECORD = "upper.json"


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


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount that stands, with its record and how it was made."""

    record: Record
    choice: Choice
    mount_operations: int


def check_target(path: str) -> str:
    """The directory to mount on, absolute, its parents resolved.

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
    if any(entry.mount_point == target for entry in read_table()):
        raise UsageError(f"something is mounted on {target} already", hint="`flatmount umount` it first")
    if os.listdir(target):
        raise UsageError(f"the target {target} is not empty", hint="what is in it would be hidden; name an empty one")
    return target


def mount(store: Store, records: Records, run: str, request: Request, facts: HostFacts) -> Mounted:
    """Assemble a root file system that outlives this process, and record it.

    Nothing but the mount at the target is added to the mount table. A failure leaves everything as it was.
    Raises: UsageError, MappingError, OperationFailed, MissingFeature, StoreError.
    """
    target = check_target(request.target)
    choice = choose_for(request.strategy, request.image, facts)
    mount_id = new_id() if request.id is None else check_id(request.id)
    place = _upper_place(store, request, mount_id)
    fresh = not request.read_only and not os.path.lexists(os.path.join(place.uppers, place.name))
    scratch_directory = os.path.join(run, "tmp")
    ensure_run_directory(run)
    os.makedirs(scratch_directory, mode=0o700, exist_ok=True)
    scratch = os.path.join(scratch_directory, "ovl-")
    spec = specification(
        store, request.image, choice, mapping=request.mapping, upper=place.kind, fresh_upper=fresh, scratch=scratch
    )
    pool = RangePool(store.data, facts)
    assembler = Assembler(
        spec, choice.name, pool, uppers=place.uppers, scratch=scratch, ephemeral=request.ephemeral and fresh
    )
    if not request.read_only and not fresh:
        _check_reuse(place, request, assembler.ids)
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
        ephemeral=request.ephemeral and fresh,
    )
    records.add(record)
    rootfs: Rootfs | None = None
    try:
        store.hold(request.image, _holder(record))
        rootfs = assembler.assemble(request.mapping, place.name, target)
        if fresh:
            _describe_upper(place, request, assembler.ids)
        return Mounted(records.update(record, State.MOUNTED), choice, rootfs.outcome.mount_operations)
    except BaseException:
        if rootfs is not None:
            rootfs.ephemeral = fresh
            rootfs.undo()
        store.release(_holder(record))
        records.remove(record)
        raise
    finally:
        pool.close()


def umount(store: Store, records: Records, record: Record) -> int:
    """Take a recorded mount off; an ephemeral upper goes with it, any other stays. Returns mount operations.

    Raises: InUse where something still uses it; nothing has changed then.
    """
    removes_upper = record.ephemeral or (record.state is State.MOUNTING and not _described(record))
    record = records.update(record, State.UNMOUNTING)
    count = 0
    if _is_ours(record):
        outcome = run_once(MountPlan((Unmount(record.target, UnmountFlag.NOFOLLOW),), keep_going=True))
        if outcome.failure is not None:
            records.update(record, State.MOUNTED)
            raise InUse(str(outcome.failure), hint=outcome.failure.hint)
        count = outcome.mount_operations
    if record.writable and removes_upper:
        _remove_upper(record)
    store.release(_holder(record))
    records.remove(record)
    return count


def recover(run: str, store: Store | None) -> tuple[str, ...]:
    """Undo what killed commands left half-way: workplaces of storms, and mounts of this store.

    Returns what was put right, in words. Cheap where there is nothing: two directory listings.
    """
    told = [f"cleared {name}, left by a killed command" for name in sweep(run)]
    records = Records(run)
    records.sweep_drafts()
    for record in records.abandoned():
        if store is not None and record.root == store.root:
            what = f"the mount {record.id} at {record.target}, left half-way by a killed command"
            try:
                umount(store, records, record)
                told.append(f"undid {what}")
            except FlatmountError as error:
                told.append(f"could not undo {what}: {error.line()}")
    if store is not None:
        known = {_holder(record) for record in records.all()}
        for lease in store.holders():
            if lease.holder.startswith("mount:") and lease.holder not in known:
                store.release(lease.holder)
    return tuple(told)


@dataclass(frozen=True, slots=True)
class _UpperPlace:
    kind: Upper
    uppers: str
    name: str


def _upper_place(store: Store, request: Request, mount_id: str) -> _UpperPlace:
    if request.read_only or request.upper is None:
        kind = Upper.NONE if request.read_only else Upper.STORE
        return _UpperPlace(kind, os.path.join(store.data, "uppers"), mount_id)
    directory = os.path.realpath(request.upper)
    if not os.path.isdir(os.path.dirname(directory)):
        raise UsageError(f"{os.path.dirname(directory)} is not a directory", hint="--upper is made inside it")
    if directory.startswith(store.data + os.sep):
        raise UsageError(f"--upper {directory} is inside the store", hint="leave --upper away to keep it there")
    return _UpperPlace(Upper.ELSEWHERE, os.path.dirname(directory), os.path.basename(directory))


def _check_reuse(place: _UpperPlace, request: Request, ids: Ids) -> None:
    """An upper that exists may only be used for what it was made for: other ids in it would be other owners."""
    path = os.path.join(place.uppers, place.name)
    try:
        with open(os.path.join(path, UPPER_RECORD), encoding="utf-8") as file:
            known = json.load(file)
    except (OSError, ValueError):
        raise UsageError(
            f"{path} exists and is no upper of ours", hint="name a directory that does not exist"
        ) from None
    if known["image"] != request.image.digest:
        raise UsageError(f"the upper {path} belongs to image {known['image']}", hint="name another --id or --upper")
    if known["ids"] != ids.value:
        raise UsageError(
            f"the upper {path} keeps the ids of the {known['ids']}, this strategy those of the {ids.value}",
            hint="use the strategy it was made with",
        )
    if ids is Ids.HOST and known["map"] != str(request.mapping):
        raise UsageError(f"the upper {path} keeps host ids of the mapping {known['map']}", hint="use that mapping")


def _describe_upper(place: _UpperPlace, request: Request, ids: Ids) -> None:
    if place.kind is Upper.NONE:
        return
    known = {
        "image": request.image.digest,
        "ids": ids.value,
        "map": str(request.mapping),
        "ephemeral": request.ephemeral,
    }
    with open(os.path.join(place.uppers, place.name, UPPER_RECORD), "w", encoding="utf-8") as file:
        json.dump(known, file)


def _holder(record: Record) -> str:
    return f"mount:{record.id}"


def _is_ours(record: Record) -> bool:
    """Whether the topmost mount at the target is the one recorded, as far as the table shows.

    What was not mounted yet when its command was killed must not make us take off somebody else's mount.
    """
    here = [entry for entry in read_table() if entry.mount_point == record.target]
    if not here:
        return False
    top = here[-1]
    return top.source == f"flatmount-{record.upper}" or record.strategy in _NAMELESS or not record.writable


# mount(2) as the usual code calls it names every overlay "overlay".
_NAMELESS = ("per-layer", "common-parent")


def _described(record: Record) -> bool:
    return os.path.exists(os.path.join(record.uppers, record.upper, UPPER_RECORD))


def _remove_upper(record: Record) -> None:
    if not os.path.lexists(os.path.join(record.uppers, record.upper)):
        return
    parent = os.open(record.uppers, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        remove_tree(parent, record.upper)
    finally:
        os.close(parent)
