"""A diagnosis for a terminal, as a page, and as one line for node-problem-detector."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable
from html import escape

from flatmount.observe.doctor.findings import Diagnosis, Finding, Severity
from flatmount.observe.doctor.pages import PAGES
from flatmount.report.page import document, header, plain_table, section, tiles

_COLOURS = {Severity.CRITICAL: "\x1b[1;31m", Severity.WARNING: "\x1b[33m", Severity.NOTE: "\x1b[2m"}
_PLAIN = "\x1b[0m"
_HEADS = {
    Severity.CRITICAL: "critical findings: they hurt now",
    Severity.WARNING: "warnings: should be looked at",
    Severity.NOTE: "notes: need nobody",
}
_MOST_IMAGES = 8
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
    if diagnosis.images:
        lines += ["", "mount operations of one start with a user namespace of its own, by image:"]
        for cost in diagnosis.images[:_MOST_IMAGES]:
            count = "–" if cost.operations is None else f"{cost.operations:,}"
            lines += _wrapped(f"{count:>7}  {cost.name}, {cost.layers} layers ({cost.how})", width, "  ")
        if len(diagnosis.images) > _MOST_IMAGES:
            lines.append(f"  and {len(diagnosis.images) - _MOST_IMAGES:,} more images (--json has all)")
    lines.append("")
    lines += [line for what in diagnosis.unseen for line in _wrapped(f"not seen: {what}", width, "")]
    lines.append(f"{diagnosis.mounts:,} mounts, Linux {diagnosis.kernel}, looked for {diagnosis.seconds:.1f} s")
    if diagnosis.findings:
        lines.append("`flatmount doctor --explain ID` has a page for each finding")
    return "\n".join(lines) + "\n"


def page(diagnosis: Diagnosis) -> str:
    """The whole HTML document. Works without a network, in light and dark, and on paper."""
    counts = Counter(finding.severity for finding in diagnosis.findings)
    kicker = f"{diagnosis.taken_at} · Linux {diagnosis.kernel} · looked for {diagnosis.seconds:.1f} s"
    shown = [
        (f"{diagnosis.mounts:,}", "mounts in the table"),
        *((f"{counts[one]:,}", _HEADS[one]) for one in Severity if counts[one] or one is not Severity.NOTE),
    ]
    parts = [header(kicker, "Diagnosis", diagnosis.verdict), tiles(shown[:1] + shown[:0:-1])]
    parts += [_finding(finding) for finding in diagnosis.findings]
    if diagnosis.findings:
        rows = [
            [escape(one.title), escape(str(one.severity)), "now" if one.now else "may", escape(one.owner)]
            for one in diagnosis.findings
        ]
        heads = ["finding", "severity|", "happens|", "owner|"]
        parts.append(section("All findings", "The most severe first.", plain_table(heads, rows)))
    if diagnosis.images:
        rows = [
            [
                escape(one.name),
                escape(one.engine),
                f"{one.layers:,}",
                "–" if one.operations is None else f"{one.operations:,}",
                escape(one.how),
            ]
            for one in diagnosis.images
        ]
        heads = ["image", "store of|", "layers|", "operations|of one start", "why|"]
        text = "Mount operations of one container with a user namespace of its own, by what is known of its engine."
        parts.append(section("What a start of each image costs", text, plain_table(heads, rows)))
    if diagnosis.unseen:
        unseen = "".join(f"<li>{escape(text)}</li>" for text in diagnosis.unseen)
        parts.append(f"<section><h2>Not seen</h2><ul>{unseen}</ul></section>")
    return document("Diagnosis", (), parts)


def _finding(finding: Finding) -> str:
    evidence = "".join(f"<li>{escape(text)}</li>" for text in finding.evidence)
    about = PAGES.get(finding.id, "")
    paragraphs = "".join(f"<p>{escape(part)}</p>" for part in about.split("\n\n"))
    told = f"<details><summary>{escape(finding.id)}: what this is</summary>{paragraphs}</details>" if about else ""
    return (
        f'<section class="finding {finding.severity}"><h2><span class="badge">{finding.severity}</span> '
        f"{escape(finding.title)}</h2><ul>{evidence}</ul>"
        f'<p class="remedy"><b>{escape(finding.owner)}</b>: {escape(finding.remedy)}</p>{told}</section>'
    )


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
