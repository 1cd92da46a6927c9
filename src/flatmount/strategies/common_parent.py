"""`common-parent`: the layers' common directory id-mapped and attached once, for each of two passes. The usual code
after its fix (containerd 2.0.7, 2.1.5, 2.2). Mount operations: 6, and the first pass's overlay taken off."""

from __future__ import annotations

import os.path
from collections.abc import Sequence

from flatmount.plan.facts import HostFacts
from flatmount.plan.operations import Mkdir, MountPlan, Operation, Parameter, Rmdir, Text, Unmount
from flatmount.strategies.spec import RootfsSpec, lowers_of, require_idmapped_layers
from flatmount.strategies.usual import id_mapped_attach, two_passes

NAME = "common-parent"


def build(spec: RootfsSpec, facts: HostFacts) -> MountPlan:
    """Attach the parent, mount an overlay over directories below it, take the parent off again; twice."""
    require_idmapped_layers(facts, NAME)
    lowers = lowers_of(spec, NAME)
    parent = os.path.commonpath([os.path.dirname(layer) for layer in lowers])

    def once(place: Text) -> tuple[Sequence[Operation], Sequence[str], Sequence[Operation]]:
        before = (Mkdir(place), *id_mapped_attach((Parameter.DATA, "/" + parent), place))
        return before, [os.path.relpath(layer, parent) for layer in lowers], (Unmount(place), Rmdir(place))

    return two_passes(spec, once, NAME)
