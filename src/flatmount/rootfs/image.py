"""From an image of the store to what a strategy is given."""

from __future__ import annotations

import os

from flatmount.errors import FlatmountError
from flatmount.kernel.probes import Probes, probe
from flatmount.plan.facts import HostFacts
from flatmount.plan.mapping import Mapping
from flatmount.store import Store, StoredImage
from flatmount.strategies import Attach, Choice, RootDirectory, RootfsSpec, Upper, choose

# A kernel that has everything: what `plan` assumes where it may not probe.
NEWEST = HostFacts(**dict.fromkeys(HostFacts.__dataclass_fields__, True))


def specification(
    store: Store,
    image: StoredImage,
    choice: Choice,
    *,
    mapping: Mapping | None = None,
    upper: Upper = Upper.STORE,
    fresh_upper: bool = True,
    upper_made: bool = False,
    attach: Attach = Attach.HOST,
    make_target: bool = False,
    scratch: str = "",
) -> RootfsSpec:
    """What to build for containers of `image`; makes its flat tree or its shifted copy if the strategy needs one.

    Args:
        mapping: checked against the image's owners; required by strategy `chown`, whose copy is made for it.

    Raises: MappingError where an owner of the image has no host id; StoreError.
    """
    if mapping is not None:
        image.owners.require(mapping)
    shifted = store.ensure_shifted(image, mapping) if choice.name == "chown" and mapping is not None else None
    return RootfsSpec(
        layers=tuple(layer.path for layer in image.layers),
        flat=store.ensure_flat(image) if choice.name == "flat" else None,
        shifted=shifted,
        upper=upper,
        fresh_upper=fresh_upper,
        upper_made=upper_made,
        root=RootDirectory(image.root.mode, image.root.uid, image.root.gid, image.root.mtime_ns),
        attach=attach,
        make_target=make_target,
        scratch_bytes=max(len(os.fsencode(scratch)) + 16, 24),
    )


def choose_for(name: str, image: StoredImage, facts: HostFacts) -> Choice:
    """The strategy that `name` stands for; an image's flat tree may be built now, so it counts as ready."""
    return choose(name, facts, flat_ready=True, layers=len(image.layers))


def probe_store(store: Store) -> Probes:
    """What this host can do for this store; once for each command."""
    return probe(store.data)


def require_root(verb: str) -> None:
    """Refuse, in one line, what needs privilege; the kernel's EPERM comes late and from deep inside."""
    if os.geteuid() != 0:
        raise FlatmountError(f"{verb} makes mounts, which needs CAP_SYS_ADMIN", hint="run it as root")


__all__ = ["NEWEST", "choose_for", "probe_store", "require_root", "specification"]
