"""`detached`: layers go to overlayfs through a pinned id-mapped parent that is never attached to the host; one pass.
Mount operations: 1. Linux 6.15, or 6.7 with the parent attached in a helper namespace of our own."""

from __future__ import annotations

from flatmount.errors import MissingFeature, TooManyLayers
from flatmount.plan.facts import HostFacts
from flatmount.plan.operations import MountPlan
from flatmount.strategies.parts import pinned_overlay, read_only_clone
from flatmount.strategies.spec import MOST_LOWERS, RootfsSpec, Upper, lowers_of, require_idmapped_layers

NAME = "detached"


def build(spec: RootfsSpec, facts: HostFacts) -> MountPlan:
    """Hand every layer to overlayfs as a short string below the pinned parent."""
    require_idmapped_layers(facts, NAME)
    lowers = lowers_of(spec, NAME)
    if spec.upper is Upper.NONE and spec.top is not None:
        lowers = (spec.top, *lowers)
        if len(lowers) > MOST_LOWERS:
            raise TooManyLayers(
                f"strategy {NAME} hands {len(lowers)} directories to overlayfs, the root's own attributes among them, "
                f"and its limit is {MOST_LOWERS}",
                hint="--strategy flat has no such limit",
            )
    if spec.upper is Upper.NONE and len(lowers) == 1:
        return read_only_clone(spec, lowers[0])
    if not facts.lowerdir_append:
        raise MissingFeature(
            "strategy detached needs overlayfs's lowerdir+ (Linux 6.7), which this kernel does not know",
            hint="--strategy flat needs only 5.19",
        )
    return pinned_overlay(spec, facts, "lowerdir+", lowers)
