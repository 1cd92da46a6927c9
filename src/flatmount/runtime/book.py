"""What containers have of a store, in its book: a lease on their image, and host ids that nobody else has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flatmount.kernel.process import owned_name, owner_is_gone
from flatmount.plan.mapping import Mapping
from flatmount.runtime.subids import RANGE_SIZE, host_ids
from flatmount.store import Store, StoredImage
from flatmount.store.ranges import HostIds

_PREFIX = "container:"


def reserve(
    store: Store,
    image: StoredImage,
    container_id: str,
    mapping: Mapping | None,
    pool: Sequence[HostIds],
    also_taken: Iterable[HostIds] = (),
    *,
    trees: Iterable[str] = (),
) -> tuple[str, Mapping]:
    """Take the image, with `trees` of it, and host ids for a container: those of `mapping`, or a free range of `pool`.

    Returns what the book knows the container as, and its mapping. The name carries this process's mark, so that what
    it takes is given back if it is killed before the container has a record.

    Raises: InUse where somebody has one of the ids; MissingFeature where the pool is used up; StoreError;
    FlatmountError where one of `trees` was replaced meanwhile.
    """
    holder = owned_name(_PREFIX + container_id)
    store.hold(image, holder, trees=trees)
    try:
        if mapping is not None:
            store.ranges.take(holder, host_ids(mapping))
            return holder, mapping
        taken = store.ranges.take_free(holder, pool, RANGE_SIZE, also_taken=also_taken)
        return holder, Mapping.single(taken.first, taken.size)
    except BaseException:
        store.release(holder)
        raise


def release(store: Store, holder: str) -> None:
    """Give back everything that a container has. Nothing is no error."""
    if holder:
        store.release(holder)
        store.ranges.release(holder)


def orphans(store: Store) -> tuple[str, ...]:
    """Holders whose process is gone; those that no record names are nobody's."""
    held = {lease.holder for lease in store.holders()} | store.ranges.holders()
    return tuple(sorted(name for name in held if name.startswith(_PREFIX) and owner_is_gone(name)))
