"""`flatmount plan`: the operations that would build a root file system, and their count. Needs no root."""

from __future__ import annotations

import argparse
import os

from flatmount.cli.common import look_at_store, map_options, mapping_of, print_json, store_options
from flatmount.errors import EXIT_FINE
from flatmount.plan import MountPlan, Parameter, as_data, explain
from flatmount.rootfs.image import NEWEST, choose_for, probe_store
from flatmount.store import Catalogue, FlatForm, Store, StoredImage
from flatmount.strategies import (
    AUTO,
    NAMES,
    PINNING,
    STRATEGIES,
    Choice,
    RootDirectory,
    RootfsSpec,
    Upper,
    pin,
    pin_image,
    pin_superblock,
)


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "plan",
        help="print the operations of a mount, and do none of them",
        description="Print the kernel operations that a strategy makes for one container, in order; "
        "a * marks mount operations, those that attach or detach a mount.",
        epilog="example: flatmount plan demo --strategy per-layer --map 0:100000:65536",
    )
    parser.add_argument("image", metavar="IMAGE", help="an image of the store")
    parser.add_argument("--strategy", default=AUTO, choices=NAMES, help="default: %(default)s")
    parser.add_argument("--read-only", action="store_true", help="no upper")
    map_options(parser, required=True)
    store_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    mapping = mapping_of(args)
    with look_at_store(args) as store:
        image = store.image(args.image)
        image.owners.require(mapping)
        may_probe = store if isinstance(store, Store) and os.geteuid() == 0 else None
        probed = may_probe is not None
        facts = probe_store(may_probe).facts if may_probe is not None else NEWEST
        choice = choose_for(args.strategy, store, image, facts)
        plan = STRATEGIES[choice.name](_specification(store, image, choice, read_only=args.read_only), facts)
        once, shared = pin((Parameter.DATA,), facts, id_mapped=True), choice.name in PINNING
        image_once = pin_superblock(facts) if choice.erofs else None
        if choice.erofs:
            once = MountPlan((*once.operations, *pin_image(facts).operations))
        values = _values(store)
        values[Parameter.IMAGE] = store.flat_tree(image, FlatForm.EROFS) or "erofs/N"
    if args.json:
        facts_said = {
            "image": image.digest,
            "layers": len(image.layers),
            "map": str(mapping),
            "strategy": choice.name,
            "reason": choice.reason,
            "mount_operations": plan.mount_operations,
            "operations": as_data(plan, values),
            "once_for_all": as_data(image_once, values) if image_once is not None else [],
            "once_for_a_range": as_data(once, values) if shared else [],
            "probed": probed,
        }
        print_json("plan", facts_said)
        return EXIT_FINE
    print(f"strategy {choice.name} ({choice.reason}), {len(image.layers)} layers, map {mapping}")
    if not probed:
        print("assuming a kernel that has everything; as root, it would be probed")
    if image_once is not None:
        print("once for the image, in each process:")
        print(explain(image_once, values))
    if shared:
        print("once for a range:")
        print(explain(once, values))
        print("for each container:")
    print(explain(plan, values))
    print(f"{len(plan.operations)} operations, {plan.mount_operations} of them mount operations")
    return EXIT_FINE


def _specification(store: Store | Catalogue, image: StoredImage, choice: Choice, *, read_only: bool) -> RootfsSpec:
    """As for a mount, but without making a flat tree or a copy that is not there yet."""
    return RootfsSpec(
        layers=tuple(layer.path for layer in image.layers),
        flat=store.flat_tree(image) or "flat/N",
        erofs=store.flat_tree(image, FlatForm.EROFS) if choice.erofs else None,
        shifted="shifted/N",
        upper=Upper.NONE if read_only else Upper.STORE,
        root=RootDirectory(image.root.mode, image.root.uid, image.root.gid, image.root.mtime_ns),
    )


def _values(store: Store | Catalogue) -> dict[Parameter, str]:
    return {Parameter.DATA: store.data, Parameter.UPPERS: os.path.join(store.data, "uppers"), Parameter.UPPER: "ID"}
