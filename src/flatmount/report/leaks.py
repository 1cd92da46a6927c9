"""What is left on a node, for a terminal and for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from flatmount.observe.leak_results import Cleaned, Found, Holder, Kind, Leak

_MOST_SHOWN = 20


def as_data(found: Found, cleaned: Sequence[Cleaned] | None) -> dict[str, Any]:
    """Everything as plain data; `cleaned` is None for a look."""
    return {
        "leaks": [asdict(leak) for leak in found.leaks],
        "unseen": list(found.unseen),
        "cleaned": None
        if cleaned is None
        else [
            {
                "where": one.leak.where,
                "id": one.leak.id,
                "namespace": one.namespace,
                "refused": one.refused or None,
            }
            for one in cleaned
        ],
    }


def render_leaks(found: Found, cleaned: Sequence[Cleaned] | None, *, may_clean: bool) -> str:
    """The list as text, ending with a newline."""
    lines = [line for leak in found.leaks[:_MOST_SHOWN] for line in _of(leak)]
    if len(found.leaks) > _MOST_SHOWN:
        lines.append(f"and {len(found.leaks) - _MOST_SHOWN:,} more (--json has all)")
    lines.append(_sum(found))
    lines += [f"not looked at: {what}" for what in found.unseen]
    if any(leak.kind is Kind.LAYER_WORK for leak in found.leaks):
        lines.append("layer work is containerd's to take off, which it does when it starts: restart it")
    if cleaned is not None:
        gone = [one for one in cleaned if not one.refused]
        elsewhere = len({one.namespace for one in gone if one.namespace is not None})
        where = f", in this table and in {_namespaces(elsewhere)}" if elsewhere else ""
        lines.append(f"taken off: {len(gone):,}{where}")
        refused = Counter(one.refused.partition(", operation")[0] for one in cleaned if one.refused)
        lines += [f"left as it is ({count:,}): {why}" for why, count in refused.most_common(_MOST_SHOWN)]
    elif may_clean and any(leak.removable for leak in found.leaks):
        here = sum(leak.here and leak.removable > 0 for leak in found.leaks)
        copies = [copy for leak in found.leaks if leak.removable for copy in leak.copies]
        foreign = f" and {len(copies):,} in {_namespaces(len({copy.namespace for copy in copies}))}" if copies else ""
        lines.append(f"`flatmount leaks --clean` would take off {here:,} of this table{foreign}, and delete no file")
    return "\n".join(lines) + "\n"


def _namespaces(count: int) -> str:
    return f"{count:,} other mount namespace{'' if count == 1 else 's'}"


def _of(leak: Leak) -> list[str]:
    table = "" if leak.here else ", only in another mount namespace"
    shared = ", shared" if leak.shared else ""
    return [
        f"{leak.where}  ({leak.kind}, of {leak.owner}, {leak.device}{leak.root}{shared}{table})",
        *(f"    held by {_holder(one)}" for one in leak.holders),
    ]


def _holder(one: Holder) -> str:
    if one.pid is None:
        return f"a mount on {one.name}"
    others = f" and {one.processes - 1:,} more processes" if one.processes > 1 else ""
    return f"the {one.how} of {one.name} [{one.pid}]{others} (mnt:[{one.namespace}])"


def _sum(found: Found) -> str:
    if not found.leaks:
        return "nothing is left"
    kinds = Counter(leak.kind for leak in found.leaks)
    owners = Counter(leak.owner for leak in found.leaks)
    said = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    whose = ", ".join(f"{owner} {count:,}" for owner, count in owners.most_common())
    return f"{said}; of {whose}"
