"""`per-layer`: every layer id-mapped and attached, for each of two passes. The usual code before its fix (containerd
2.0.0-2.0.6, 2.1.0-2.1.4). Mount operations for L layers: 2(1+2L), and the first pass's overlay taken off."""

from __future__ import annotations

from collections.abc import Sequence

from flatmount.plan.facts import HostFacts
from flatmount.plan.operations import Mkdir, MountPlan, Operation, Parameter, Rmdir, Text, Unmount
from flatmount.strategies.parts import below
from flatmount.strategies.spec import RootfsSpec, lowers_of, require_idmapped_layers
from flatmount.strategies.usual import id_mapped_attach, two_passes

NAME = "per-layer"


def build(spec: RootfsSpec, facts: HostFacts) -> MountPlan:
    """Attach each layer, mount an overlay over them, take each off again; twice."""
    require_idmapped_layers(facts, NAME)
    lowers = lowers_of(spec, NAME)

    def each(place: Text) -> tuple[Sequence[Operation], Sequence[str], Sequence[Operation]]:
        before: list[Operation] = [Mkdir(place)]
        after: list[Operation] = []
        for i, layer in enumerate(lowers):
            point = below(place, f"/{i}")
            before += (Mkdir(point), *id_mapped_attach((Parameter.DATA, "/" + layer), point))
            after += (Unmount(point), Rmdir(point))
        return before, [str(i) for i in range(len(lowers))], [*after, Rmdir(place)]

    return two_passes(spec, each, NAME)
