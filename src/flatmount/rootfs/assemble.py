"""One root file system with one call, for programs that embed flatmount."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext

from flatmount.errors import UsageError
from flatmount.plan.mapping import Mapping
from flatmount.rootfs.assembler import Assembler, Rootfs
from flatmount.rootfs.image import choose_for, probe_store, specification
from flatmount.rootfs.ranges import RangePool
from flatmount.rootfs.records import check_id, new_id
from flatmount.rootfs.signals import undivided
from flatmount.store import Store, StoredImage
from flatmount.strategies import AUTO, Attach, Upper


@contextmanager
def assemble(
    store: Store,
    image: StoredImage,
    mapping: Mapping,
    target: str | None = None,
    *,
    strategy: str = AUTO,
    attach: Attach = Attach.HOST,
    read_only: bool = False,
    name: str | None = None,
    pool: RangePool | None = None,
) -> Iterator[Rootfs]:
    """Assemble the root file system of `image` for the time of a `with` block.

    On entry, one mount is attached at `target` in the calling thread's mount namespace (Attach.HOST), or none
    (Attach.NONE: `rootfs.descriptor` is a detached mount to move or to walk). On exit it is taken off and its upper
    removed. Nobody else is told: a mount that must survive this process, or be found after it was killed, is made by
    flatmount.rootfs.mounting.

    Args:
        mapping: the container's ids; must cover every owner in the image.
        target: an existing directory, absolute; not with Attach.NONE.
        strategy: a strategy's name, which builds the flat tree or the shifted copy it needs, once; or `auto`, which
            does not wait for a flat tree (`store.ensure_flat` builds it).
        read_only: no upper; the root file system cannot be written to.
        name: the upper's name in the store, one path component; made up unless given.
        pool: ranges to share with other calls. Without it, host and range are probed and made for this one alone.

    Raises: UsageError, MappingError, MissingFeature; OperationFailed with everything undone; InUse on exit, while
        something still uses it.
    Kernel: CAP_SYS_ADMIN; 6.15, or what `flatmount probe` shows for the strategy.
    """
    if (attach is Attach.HOST) == (target is None):
        raise UsageError("a root file system is attached at a target, or nowhere", hint="give exactly one of the two")
    own = pool is None
    ranges = pool or RangePool(store.data, probe_store(store).facts)
    choice = choose_for(strategy, store, image, ranges.facts)
    scratch = os.path.join(store.root, "v1", ".ovl-")
    spec = specification(
        store,
        image,
        choice,
        mapping=mapping,
        upper=Upper.NONE if read_only else Upper.STORE,
        attach=attach,
        scratch=scratch,
    )
    made = Assembler(
        spec, choice.name, ranges, uppers=os.path.join(store.data, "uppers"), scratch=scratch, ephemeral=True
    )
    with closing(ranges) if own else nullcontext(), ExitStack() as undoing:
        with undivided():
            rootfs = made.assemble(mapping, new_id() if name is None else check_id(name), target or "")
            undoing.callback(rootfs.undo)
        yield rootfs
