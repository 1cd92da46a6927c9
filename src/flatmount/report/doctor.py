"""A diagnosis for a terminal, and as one line for node-problem-detector."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

from flatmount.observe.doctor.findings import Diagnosis, Severity

_COLOURS = {Severity.CRITICAL: "\x1b[1;31m", Severity.WARNING: "\x1b[33m", Severity.NOTE: "\x1b[2m"}
_PLAIN = "\x1b[0m"
_NPD_CHARACTERS = 80  # node-problem-detector cuts a message there unless it is configured otherwise


def render_diagnosis(diagnosis: Diagnosis, *, width: int = 100, colour: bool = False) -> str:
    """Verdict, findings, and what could not be seen, as text of at most `width` columns that ends with a newline."""
    paint = _painter(colour)
    lines = _wrapped(diagnosis.verdict, width, "")
    for finding in diagnosis.findings:
        lines.append("")
        lines += _wrapped(f"{finding.severity}: {finding.title}  [{finding.id}]", width, "", paint, finding.severity)
        for evidence in finding.evidence:
            lines += _wrapped(evidence, width, "    ")
        lines += _wrapped(f"{finding.owner}: {finding.remedy}", width, "  → ")
    lines.append("")
    lines += [line for what in diagnosis.unseen for line in _wrapped(f"not seen: {what}", width, "")]
    lines.append(f"{diagnosis.mounts:,} mounts, Linux {diagnosis.kernel}, looked for {diagnosis.seconds:.1f} s")
    if diagnosis.findings:
        lines.append("`flatmount doctor --explain ID` has a page for each finding")
    return "\n".join(lines) + "\n"


def npd_line(diagnosis: Diagnosis) -> str:
    """The verdict as node-problem-detector takes it: one line of at most 80 characters."""
    serious = [finding for finding in diagnosis.findings if finding.severity is not Severity.NOTE]
    if not serious:
        return f"mounts are fine: {diagnosis.mounts:,} in the table"
    more = f" (+{len(serious) - 1})" if len(serious) > 1 else ""
    room = _NPD_CHARACTERS - len(more)
    text = serious[0].title
    return (text if len(text) <= room else text[: room - 1] + "…") + more


def _wrapped(
    text: str,
    width: int,
    lead: str,
    paint: Callable[[str, Severity | None], str] = lambda text, severity: text,
    severity: Severity | None = None,
) -> list[str]:
    lines = textwrap.wrap(text, width, initial_indent=lead, subsequent_indent=" " * len(lead), break_on_hyphens=False)
    return [paint(line, severity) for line in lines]


def _painter(colour: bool) -> Callable[[str, Severity | None], str]:
    def paint(text: str, severity: Severity | None) -> str:
        return f"{_COLOURS[severity]}{text}{_PLAIN}" if colour and severity else text

    return paint
