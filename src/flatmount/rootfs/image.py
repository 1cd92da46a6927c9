"""From an image of the store to what a strategy is given."""

from __future__ import annotations

import os
from dataclasses import replace

from flatmount.errors import FlatmountError
from flatmount.kernel.probes import Probes, probe
from flatmount.plan.facts import HostFacts
from flatmount.plan.mapping import Mapping
from flatmount.store import Catalogue, FlatForm, Store, StoredImage
from flatmount.strategies import MOST_LOWERS, Attach, Choice, RootDirectory, RootfsSpec, Upper, choose, detached, flat

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
        choice: of `choose_for`: the strategy, and for `flat` the form of the tree.
        mapping: checked against the image's owners; required by strategy `chown`, whose copy is made for it.

    Raises: MappingError where an owner of the image has no host id; StoreError.
    """
    if mapping is not None:
        image.owners.require(mapping)
    shifted = store.ensure_shifted(image, mapping) if choice.name == "chown" and mapping is not None else None
    return RootfsSpec(
        layers=tuple(layer.path for layer in image.layers),
        flat=store.ensure_flat(image) if choice.name == flat.NAME and not choice.erofs else None,
        erofs=store.ensure_flat(image, FlatForm.EROFS) if choice.name == flat.NAME and choice.erofs else None,
        top=store.ensure_root(image) if choice.name == detached.NAME and upper is Upper.NONE else None,
        shifted=shifted,
        upper=upper,
        fresh_upper=fresh_upper,
        upper_made=upper_made,
        root=RootDirectory(image.root.mode, image.root.uid, image.root.gid, image.root.mtime_ns),
        attach=attach,
        make_target=make_target,
        scratch_bytes=max(len(os.fsencode(scratch)) + 16, 24),
    )


def trees_of(spec: RootfsSpec) -> tuple[str, ...]:
    """What a root file system of this specification is made of, for `Store.hold`: it must be there when it is held."""
    merged = spec.erofs or spec.flat or spec.shifted
    top = () if spec.top is None else (spec.top,)
    return (merged,) if merged is not None else (*top, *spec.layers)


def choose_for(
    name: str,
    store: Store | Catalogue,
    image: StoredImage,
    facts: HostFacts,
    *,
    flat_form: FlatForm = FlatForm.HARDLINK,
) -> Choice:
    """The strategy that `name` stands for, and for `flat` the form of the tree.

    `auto` does not wait for a flat tree that is not there, unless nothing else of a constant cost can be had: for an
    image without layers, of more than overlayfs takes, or before `lowerdir+`. Where there are both forms, the one that
    was asked for last is taken if this host mounts it; where there is none and one must be built, `flat_form`.

    Raises: UsageError, MissingFeature.
    """
    form = _ready_form(store, image, facts)
    others = facts.lowerdir_append and 0 < len(image.layers) < MOST_LOWERS
    choice = choose(name, facts, flat_ready=form is not None or not others, layers=len(image.layers))
    if choice.name != flat.NAME:
        return choice
    if form is None:
        form = flat_form if facts.erofs else FlatForm.HARDLINK
    if form is FlatForm.EROFS:
        return replace(choice, erofs=True, reason=f"{choice.reason}; an EROFS image")
    return choice


def _ready_form(store: Store | Catalogue, image: StoredImage, facts: HostFacts) -> FlatForm | None:
    wanted = store.flat_form(image)
    for form in (wanted, *(form for form in FlatForm if form is not wanted)):
        if store.flat_tree(image, form) is not None and (form is FlatForm.HARDLINK or facts.erofs):
            return form
    return None


def probe_store(store: Store, *, images: bool = False) -> Probes:
    """What this host can do for this store; once for each command.

    Whether it mounts EROFS images is tried only where the store has one or one may be made (`images`): trying takes as
    long as the rest.
    """
    return probe(store.data, images=images or store.has_flat_trees(FlatForm.EROFS))


def require_root(verb: str) -> None:
    """Refuse, in one line, what needs privilege; the kernel's EPERM comes late and from deep inside."""
    if os.geteuid() != 0:
        raise FlatmountError(f"{verb} makes mounts, which needs CAP_SYS_ADMIN", hint="run it as root")


__all__ = ["NEWEST", "choose_for", "probe_store", "require_root", "specification", "trees_of"]
