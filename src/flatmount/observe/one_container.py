"""One root file system of ours from its assembly to its undoing, in a process that did everything else before.

    python -m flatmount.observe.one_container PARENT_PID STORE IMAGE STRATEGY PLACE

writes a line when it is ready, and does it when it reads one: what happens in between is a container's own part.
"""

from __future__ import annotations

import os
import sys

from flatmount.kernel.mounts import die_with_parent
from flatmount.plan.mapping import Mapping
from flatmount.rootfs.assembler import Assembler
from flatmount.rootfs.image import choose_for, probe_store, specification
from flatmount.rootfs.ranges import RangePool
from flatmount.store import Store
from flatmount.strategies import Upper

_FIRST_HOST_ID = 1 << 20


def main() -> None:
    parent, root, reference, strategy, place = sys.argv[1:]
    die_with_parent(int(parent))
    with Store.open(root) as store:
        image = store.image(reference)
        facts = probe_store(store).facts
        choice = choose_for(strategy, store, image, facts)
        uppers, scratch = f"{place}/uppers", f"{place}/scratch-"
        os.makedirs(uppers, exist_ok=True)
        spec = specification(store, image, choice, upper=Upper.ELSEWHERE, make_target=True, scratch=scratch)
        pool = RangePool(store.data, facts)
        assembler = Assembler(spec, choice.name, pool, uppers=uppers, scratch=scratch, ephemeral=True)
        print(choice.name, flush=True)
        sys.stdin.readline()
        assembler.assemble(Mapping.single(_FIRST_HOST_ID), "one", f"{place}/root").undo()


if __name__ == "__main__":
    main()
