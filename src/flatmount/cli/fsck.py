"""`flatmount fsck`: is everything in the store what it was when it was stored?"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from typing import Any

from flatmount.cli.common import open_store, print_json, run_directory, store_options
from flatmount.cli.image_pull import reachable
from flatmount.config import Config, load
from flatmount.errors import EXIT_FAILED, EXIT_FINE
from flatmount.image import ImageSource, open_source
from flatmount.image.registry import open_registry, stored_image
from flatmount.image.registry_reference import Reference
from flatmount.rootfs.mounting import recover
from flatmount.store import Checked, Finding, Origins, Part, Repair, Store

_EXAMPLES = """examples:
  flatmount fsck                            every entry, with the content of every file
  flatmount fsck --quick                    all but the content
  flatmount fsck --repair                   bad layers of pulled images come from their registry again
  flatmount fsck --repair --source ./web    or from a layout or archive of the image they came from
  flatmount fsck --repair --from registry.example:5000/team/app
"""
_PASSES = 8  # a layer that is linked to a bad one is seen to be bad when that one is right again


def add_parser(verbs: Any) -> None:
    """Add the verb."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "fsck",
        help="check the store, and repair it",
        description="Hold every layer against the entries and digests that were kept when it was unpacked, every "
        "flat tree against its layers, and the book against the documents. Exits 1 where something is wrong and "
        "not repaired.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="do not read files to compare their content")
    parser.add_argument("--repair", action="store_true", help="put right what can be, one tree at a time")
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="PATH[:NAME]",
        help="where bad layers can be read again: an image layout or archive; may be repeated",
    )
    parser.add_argument(
        "--from",
        dest="registries",
        action="append",
        default=[],
        metavar="HOST/NAME[:TAG][@DIGEST]",
        help="a registry's repository that has bad layers, or with a tag or digest an image there; may be repeated. "
        "Behind these come the registries that the image was pulled from",
    )
    parser.add_argument("--plain-http", action="store_true", help="speak to registries without TLS")
    store_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    with ExitStack() as stack:
        store = stack.enter_context(open_store(args))
        checked = _check(store, args)
        repairs: list[Repair] = []
        if args.repair and checked.findings:
            recover(run_directory(), store)
            repairs = _repair(store, checked, _sources(store, checked, args, stack), args)
    if args.json:
        print_json("fsck", _facts(checked, repairs))
    else:
        _tell(checked, repairs, args.repair)
    bad = [repair for repair in repairs if not repair.done] if args.repair else checked.findings
    return EXIT_FAILED if bad else EXIT_FINE


def _sources(store: Store, checked: Checked, args: argparse.Namespace, stack: ExitStack) -> list[ImageSource]:
    """Where bad layers may be had again, in the order in which they are asked; `stack` closes them.

    Of a registry that is no tag's or digest's, nothing is asked for but a bad layer, by its digest.
    """

    def opened(source: ImageSource) -> ImageSource:
        stack.callback(source.close)
        return source

    sources = [opened(open_source(source)) for source in args.source]
    named = {name for finding in checked.findings if finding.part is Part.LAYER for name in finding.images}
    bad = {image.digest: image for image in store.images() if {image.name, image.digest} & named}
    known = {digest: store.origins(image) for digest, image in bad.items()}
    if not args.registries and not any(origins.references for origins in known.values()):
        return sources
    config = load()
    for text in args.registries:
        reference = Reference.parse(text)
        if "@" in text or ":" in text.partition("/")[2]:
            sources.append(opened(open_registry(reference, reachable(config, reference, args))))
        else:
            sources += [opened(_stored(reference, origins, config, args)) for origins in known.values()]
    for origins in known.values():
        for text in origins.references:
            sources.append(opened(_stored(Reference.parse(text), origins, config, args)))
    return sources


def _stored(reference: Reference, origins: Origins, config: Config, args: argparse.Namespace) -> ImageSource:
    return stored_image(reference, reachable(config, reference, args), origins.manifest_raw, origins.config_raw)


def _check(store: Store, args: argparse.Namespace) -> Checked:
    terminal = sys.stderr.isatty()

    def report(what: str) -> None:
        sys.stderr.write(f"\r\x1b[K{what}")
        sys.stderr.flush()

    try:
        return store.check(content=not args.quick, report=report if terminal else None)
    finally:
        if terminal:
            sys.stderr.write("\r\x1b[K")


def _repair(store: Store, checked: Checked, sources: list[ImageSource], args: argparse.Namespace) -> list[Repair]:
    """Until a check finds nothing that is new: what was repaired may show what depends on it."""
    repairs: list[Repair] = []
    findings = checked.findings
    for _ in range(_PASSES):
        repairs += store.repair(findings, sources)
        known = {repair.finding.subject for repair in repairs if not repair.done}
        findings = tuple(finding for finding in _check(store, args).findings if finding.subject not in known)
        if not findings:
            break
    done = {repair.finding.subject for repair in repairs if repair.done}
    whys = {True: "it is bad again after its repair", False: "it was found while others were repaired; repair again"}
    return repairs + [Repair(finding, why=whys[finding.subject in done]) for finding in findings]


def _facts(checked: Checked, repairs: list[Repair]) -> dict[str, Any]:
    return {
        "layers": checked.layers,
        "flat_trees": checked.flat_trees,
        "entries": checked.entries,
        "content": checked.content,
        "findings": [_finding(finding) for finding in checked.findings],
        "repairs": [
            {"subject": repair.finding.subject, "done": repair.done or None, "why": repair.why or None}
            for repair in repairs
        ],
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "part": finding.part.value,
        "subject": finding.subject,
        "total": finding.total,
        "details": list(finding.details),
        "images": list(finding.images),
    }


def _tell(checked: Checked, repairs: list[Repair], repairing: bool) -> None:
    for finding in checked.findings:
        users = f" (of {', '.join(finding.images)})" if finding.images else ""
        print(f"{finding.part.value} {finding.subject}{users}:")
        for detail in finding.details:
            print(f"  {detail}")
        if finding.total > len(finding.details):
            print(f"  and {finding.total - len(finding.details)} more")
    for repair in repairs:
        print(f"{repair.finding.subject}: {repair.done or f'not repaired: {repair.why}'}")
    looked = f"{checked.layers} layers, {checked.flat_trees} flat trees, {checked.entries} entries"
    how = "with their content" if checked.content else "without their content"
    print(f"{looked}, {how}: {len(checked.findings) or 'no'} finding{'s' if len(checked.findings) != 1 else ''}")
    if checked.findings and not repairing:
        print("`flatmount fsck --repair` repairs what it can; --source or --from names where layers are read again")
