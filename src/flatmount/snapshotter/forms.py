"""What containerd is told to mount: pure functions from a snapshot and its lowers to one mount.

Every answer is one mount, whatever number of layers the image has.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from collections.abc import Mapping as Labels
from functools import lru_cache

from flatmount.plan.mapping import Mapping
from flatmount.snapshotter.model import (
    GID_LABEL,
    REF_LABEL,
    UID_LABEL,
    Form,
    Info,
    InvalidRequest,
    Kind,
    Mount,
    Snapshot,
)

# Flattening must never meet a redirect, and an upper must not depend on file handles of its lowers.
OVERLAY_OPTIONS = ("redirect_dir=off", "metacopy=off", "index=off")


def mapping_of(labels: Labels[str, str]) -> Mapping | None:
    """The user range that a snapshot is wanted for. Raises: MappingError; InvalidRequest for half of one."""
    uids, gids = labels.get(UID_LABEL), labels.get(GID_LABEL)
    if uids is None and gids is None:
        return None
    if not uids or not gids:
        raise InvalidRequest(f"a mapping needs both {UID_LABEL} and {GID_LABEL}")
    return _parsed(uids, gids)


@lru_cache(maxsize=1024)
def _parsed(uids: str, gids: str) -> Mapping:
    return Mapping.parse(uids, gids)


def lowers_of(parents: Sequence[int], flats: Container[int]) -> tuple[str, ...]:
    """What lies beneath a snapshot, topmost first, relative to data: layers down to the first chain that is flat."""
    lowers: list[str] = []
    for number in parents:
        if number in flats:
            lowers.append(f"snapshots/{number}/flat")
            break
        lowers.append(f"snapshots/{number}/fs")
    return tuple(lowers)


def form_for(info: Info, configured: Form) -> Form:
    """The form of a new snapshot.

    Only a container's root file system takes the configured one. Into a layer that is being unpacked containerd
    writes without mounting it when it is given an overlay; views and snapshots without a parent are one bind.
    """
    container = info.kind is Kind.ACTIVE and info.parent and REF_LABEL not in info.labels
    return configured if container else Form.OVERLAY


def keeps_host_ids(info: Info, mapping: Mapping | None, form: Form, *, idmapped_upper: bool) -> bool:
    """Whether the files that a container writes are kept with host ids.

    containerd mounts as the host's root, which has no id in the range and so cannot create files through its tree;
    our own assembly takes the ids of the container's root.
    """
    if mapping is None or info.kind is not Kind.ACTIVE or not info.parent:
        return False
    return form is Form.OVERLAY or not idmapped_upper


def plain_answer(snapshot: Snapshot, lowers: Sequence[str], *, data: str, tree: str) -> Mount:
    """The answer that needs nothing assembled.

    Args:
        data: the store's data directory, where the snapshot's own upper is.
        tree: the same directory as the snapshot's container sees it: `data`, or the id-mapped tree of its range.
    """
    active = snapshot.info.kind is Kind.ACTIVE
    writable = "rw" if active else "ro"
    if snapshot.unpacked and snapshot.mapping is None:
        # A bind would make containerd apply the layer's whiteouts, to nothing, and lose them for the parent to come.
        lowers = (snapshot.nothing,)
    if not lowers:
        return Mount("bind", f"{tree}/{snapshot.fs}", (writable, "rbind"))
    if not active and len(lowers) == 1:
        return Mount("bind", f"{tree}/{lowers[0]}", ("ro", "rbind"))
    own = (f"workdir={data}/{snapshot.work}", f"upperdir={data}/{snapshot.fs}") if active else ("ro",)
    lower = f"lowerdir={tree}/" + f":{tree}/".join(lowers)
    return Mount("overlay", "overlay", (*own, lower, *OVERLAY_OPTIONS))


def bind_answer(root: str) -> Mount:
    """A bind of a root file system that is assembled at `root`."""
    return Mount("bind", root, ("rw", "rbind"))


def helper_answer(program: str, plan: str) -> Mount:
    """A mount that `program`, flatmount-assemble, makes of the description at `plan`.

    containerd runs `mount.fuse3 PLAN TARGET -o rw -t PROGRAM` for it, and that runs the program through a shell; an
    absolute path is found whatever PATH containerd has.
    """
    return Mount(f"fuse3.{program}", plan, ("rw",))


def helper_plan(snapshot: Snapshot, lowers: Sequence[str], *, data: str, detached: bool) -> str:
    """The description that `flatmount-assemble` reads: one word and its value a line.

    `detached` says that overlayfs takes lowers of a detached mount here (Linux 6.15).
    """
    lines = [f"data {data}", *(f"lower {path}" for path in lowers), f"upper {snapshot.fs}", f"work {snapshot.work}"]
    if snapshot.mapping is not None:
        lines += (f"uid {r.container} {r.host} {r.size}" for r in snapshot.mapping.uids)
        lines += (f"gid {r.container} {r.host} {r.size}" for r in snapshot.mapping.gids)
    lines.append(f"ids {'host' if snapshot.host_ids else 'container'}")
    lines.append(f"layers {'detached' if detached else 'attached'}")
    return "\n".join(lines) + "\n"
