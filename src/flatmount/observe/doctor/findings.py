"""What the doctor says, as frozen values with a schema name. `flatmount.doctor/1` grows by additions only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from flatmount.decoding import decode
from flatmount.errors import UsageError

SCHEMA = "flatmount.doctor/1"


class Severity(StrEnum):
    """A note needs nobody; a warning should be looked at; critical hurts now."""

    NOTE = "note"
    WARNING = "warning"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found: what, by which figures, who has to act, and how.

    `id` names its page (`doctor --explain ID`). `now` tells what happens at this moment from what may happen.
    """

    id: str
    severity: Severity
    title: str
    evidence: tuple[str, ...]
    owner: str
    remedy: str
    now: bool


@dataclass(frozen=True, slots=True)
class ImageCost:
    """An image here, and the mount operations of one start of it with a user namespace of its own.

    `operations` is None where the engine copies the image instead of id-mapping its layers, or is not known; `how` says
    it in words.
    """

    engine: str
    name: str
    layers: int
    operations: int | None
    how: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings, the most severe first, with a verdict in one sentence and what could not be seen.

    `images` are those in the engines' stores, the dearest to start first.
    """

    taken_at: str
    kernel: str
    seconds: float
    mounts: int
    verdict: str
    findings: tuple[Finding, ...]
    unseen: tuple[str, ...]
    images: tuple[ImageCost, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether there are notes at most."""
        return all(finding.severity is Severity.NOTE for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """As one JSON object with its schema's name; `from_json` gives an equal diagnosis."""
        return {"schema": SCHEMA, "healthy": self.healthy, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, value: object) -> Diagnosis:
        """The diagnosis that `value`, as `json.load` returned it, holds. Raises: UsageError naming the field."""
        if not isinstance(value, dict) or value.get("schema") != SCHEMA:
            raise UsageError("not a diagnosis", hint=f"give a file with schema {SCHEMA}")
        return decode(cls, value, "doctor")


def verdict(findings: tuple[Finding, ...], unseen: tuple[str, ...]) -> str:
    """The one sentence. `findings` are ordered."""
    serious = [finding for finding in findings if finding.severity is not Severity.NOTE]
    if not serious:
        partly = ", as far as could be seen" if unseen else ""
        return f"Nothing points to mounts as this node's trouble{partly}."
    acting = [finding for finding in serious if finding.now]
    others = len(serious) - 1
    more = "" if not others else f" (and {others} more finding{'' if others == 1 else 's'})"
    if acting:
        return f"Mounts are hurting this node: {acting[0].title}{more}. {acting[0].owner}: {acting[0].remedy}."
    return f"Mounts do not hurt now but will: {serious[0].title}{more}. {serious[0].owner}: {serious[0].remedy}."
