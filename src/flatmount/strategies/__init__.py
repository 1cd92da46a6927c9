"""Strategies: pure functions from (what to build, what this host can do) to a mount plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flatmount.errors import MissingFeature, UsageError
from flatmount.plan.facts import HostFacts
from flatmount.plan.operations import MountPlan
from flatmount.strategies import chown, common_parent, detached, flat, per_layer
from flatmount.strategies.parts import pin, pin_image, pin_superblock, unpin, upper_ids
from flatmount.strategies.spec import MOST_LOWERS, Attach, Ids, RootDirectory, RootfsSpec, Upper
from flatmount.strategies.usual import require_plain_paths

Strategy = Callable[[RootfsSpec, HostFacts], MountPlan]

STRATEGIES: dict[str, Strategy] = {
    module.NAME: module.build for module in (per_layer, common_parent, detached, flat, chown)
}
# Those that share a pinned id-mapped parent between the containers of a range.
PINNING = (detached.NAME, flat.NAME)
# Those that put paths into the options of mount(2).
BY_OPTIONS = (per_layer.NAME, common_parent.NAME)
AUTO = "auto"
NAMES = (*STRATEGIES, AUTO)


@dataclass(frozen=True, slots=True)
class Choice:
    """What `auto` takes, and why. `erofs`: strategy `flat` takes the EROFS image and not the tree of hard links."""

    name: str
    reason: str
    erofs: bool = False


def choose(name: str, facts: HostFacts, *, flat_ready: bool, layers: int) -> Choice:
    """The strategy that `name` stands for on this host.

    Args:
        name: a strategy's name, or `auto` for the best that the probes allow.
        facts: what the probes found.
        flat_ready: whether the image has a flat tree, or may be given one now.
        layers: how many layers it has.

    Raises:
        UsageError: no such strategy. MissingFeature: nothing but copying would work, and nobody asked for that.
    """
    if name in STRATEGIES:
        return Choice(name, "asked for by name")
    if name != AUTO:
        raise UsageError(f"there is no strategy {name!r}", hint=f"one of {', '.join(NAMES)}")
    if not facts.idmapped_layers:
        raise MissingFeature(
            "this host cannot id-map layers, so that no strategy of a constant cost works",
            hint="`flatmount probe` shows why; --strategy chown copies the files instead",
        )
    how = (
        "layers from a detached id-mapped parent"
        if facts.detached_layers
        else "the id-mapped parent attached in a helper namespace, since overlayfs takes no detached layers here"
    )
    if flat_ready:
        return Choice(flat.NAME, f"one lower at any number of layers; {how}")
    if facts.lowerdir_append and layers <= MOST_LOWERS:
        return Choice(detached.NAME, f"the flat tree is not ready; {how}")
    return Choice(common_parent.NAME, "the flat tree is not ready and overlayfs does not know lowerdir+")


__all__ = [
    "AUTO",
    "BY_OPTIONS",
    "MOST_LOWERS",
    "NAMES",
    "PINNING",
    "STRATEGIES",
    "Attach",
    "Choice",
    "HostFacts",
    "Ids",
    "RootDirectory",
    "RootfsSpec",
    "Strategy",
    "Upper",
    "choose",
    "pin",
    "pin_image",
    "pin_superblock",
    "require_plain_paths",
    "unpin",
    "upper_ids",
]
