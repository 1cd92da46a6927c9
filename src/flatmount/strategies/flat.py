"""`flat`: as `detached`, with one flat tree in place of all layers: the cost no longer knows how many there were.
The tree is a directory of hard links or an EROFS image, which all containers of a pool share as one superblock.
Mount operations: 1. Linux 6.15, or 5.19 with the parent attached in a helper namespace of our own."""

from __future__ import annotations

from flatmount.errors import UsageError
from flatmount.plan.facts import HostFacts
from flatmount.plan.operations import MountPlan
from flatmount.strategies.parts import pinned_overlay, read_only_clone, read_only_image
from flatmount.strategies.spec import RootfsSpec, Upper, require_idmapped_layers

NAME = "flat"


def build(spec: RootfsSpec, facts: HostFacts) -> MountPlan:
    """Hand the flat tree to overlayfs as the only lower."""
    require_idmapped_layers(facts, NAME)
    if spec.erofs is not None:
        return read_only_image(spec, facts) if spec.upper is Upper.NONE else pinned_overlay(spec, facts, "lowerdir", ())
    if spec.flat is None:
        raise UsageError("the image has no flat tree yet", hint="it is built on first use; or use --strategy detached")
    if spec.upper is Upper.NONE:
        return read_only_clone(spec, spec.flat)
    return pinned_overlay(spec, facts, "lowerdir", [spec.flat])
