"""The style sheet of a page: light, dark and paper, and one colour and dash for each strategy.

The colours keep apart for the usual kinds of colour blindness, have a contrast of 3:1 at least against either
background, and are never the only sign: lines differ in their dash, bars have their name beside them.
"""

from __future__ import annotations

# strategy: (colour on white, colour on black, dash of its line). Others take the spare ones in order.
_KNOWN = {
    "per-layer": ("#c2410c", "#fb8a57", "none"),
    "common-parent": ("#7c3aed", "#b69cf7", "7 4"),
    "detached": ("#1d6fd1", "#66b2ff", "2 3.5"),
    "flat": ("#0b7f6b", "#3fd0b0", "none"),
}
_SPARE = (
    ("#64748b", "#a3b1c6", "9 3 2 3"),
    ("#a16207", "#e5b84b", "5 2"),
    ("#be185d", "#f48fb9", "1 3"),
)

_SHEET = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #16202c; --soft: #586475; --rule: #e3e7ec; --panel: #f6f8fa;
}
@media (prefers-color-scheme: dark) {
  :root { --paper: #10151c; --ink: #e8edf3; --soft: #9aa7b6; --rule: #2a3440; --panel: #18202a; }
}
* { box-sizing: border-box; }
html { background: var(--paper); }
body {
  margin: 0 auto; padding: 3rem 1.5rem 4rem; max-width: 60rem; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  font-variant-numeric: tabular-nums;
}
header p.kicker { margin: 0; color: var(--soft); font-size: .85rem; letter-spacing: .04em; }
h1 { margin: .1rem 0 .9rem; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; font-weight: 650; }
p.outcome { font-size: 1.16rem; line-height: 1.5; margin: 0 0 1.6rem; max-width: 52rem; }
h2 { margin: 3rem 0 .2rem; font-size: 1.2rem; line-height: 1.3; font-weight: 650; }
h2 + p { margin: 0 0 .8rem; color: var(--soft); max-width: 48rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12.5rem, 1fr)); gap: .8rem; }
.tile {
  background: var(--panel); border: 1px solid var(--rule); border-radius: .5rem; padding: .85rem 1rem .8rem;
}
.tile b { display: block; font-size: 1.75rem; line-height: 1.2; font-weight: 650; letter-spacing: -.02em; }
.tile span { display: block; color: var(--soft); font-size: .86rem; line-height: 1.4; }
figure { margin: 0; }
.scroll { overflow-x: auto; }
svg { display: block; width: 100%; min-width: 34rem; height: auto; }
svg text { fill: var(--soft); font-size: 12.5px; }
svg text.name { fill: var(--ink); font-size: 14px; }
svg text.value {
  fill: var(--ink); font-size: 14px; paint-order: stroke; stroke: var(--paper); stroke-width: 4px;
}
.grid { stroke: var(--rule); stroke-width: 1; }
.line {
  fill: none; stroke: var(--c); stroke-width: 2.2; stroke-dasharray: var(--dash); stroke-linejoin: round;
}
.dot { fill: var(--c); }
.bar { fill: var(--c); }
svg.flame { min-width: 60rem; }
svg.flame text { fill: #1a1a1a; font: 11px ui-monospace, "Liberation Mono", monospace; pointer-events: none; }
svg.flame .cool rect { fill: #e6c48f; } svg.flame .hot rect { fill: #f0694d; } svg.flame .grace rect { fill: #b4bcc8; }
.range { fill: none; stroke: var(--ink); stroke-width: 1.4; }
ul.legend {
  display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: .2rem 0 .5rem; padding: 0; list-style: none;
}
ul.legend li { display: flex; align-items: center; gap: .5rem; font-size: .9rem; }
ul.legend svg { width: 30px; min-width: 0; height: 10px; }
table { width: 100%; margin: .9rem 0 0; border-collapse: collapse; font-size: .9rem; }
th, td {
  padding: .32rem .55rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap;
}
th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
th small { display: block; font-weight: 400; font-size: .78rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
td i {
  display: inline-block; width: .7rem; height: .7rem; margin-right: .5rem; border-radius: 2px;
  background: var(--c);
}
section > ul { margin: .4rem 0 .6rem; padding-left: 1.2rem; }
.finding { border-left: 3px solid var(--c); padding-left: 1rem; margin-top: 2.2rem; }
.finding h2 { margin-top: 0; }
.finding p.remedy { margin: .5rem 0; }
.badge {
  color: var(--c); border: 1px solid var(--c); border-radius: 1rem; padding: .05rem .55rem; margin-right: .3rem;
  font-size: .78rem; font-weight: 600; vertical-align: .12em; white-space: nowrap;
}
.critical { --c: light-dark(#b42318, #ff8a7a); } .warning { --c: light-dark(#a16207, #e5b84b); }
.note { --c: var(--soft); }
details { margin: .6rem 0 0; } summary { color: var(--soft); font-size: .9rem; cursor: pointer; }
details p { margin: .5rem 0; max-width: 48rem; font-size: .93rem; }
code { font: .82rem/1.4 ui-monospace, "Liberation Mono", monospace; }
.bad { color: light-dark(#b42318, #ff8a7a); font-weight: 600; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 0 2.5rem; }
dl { margin: .6rem 0 0; }
dl div {
  display: flex; justify-content: space-between; gap: 1.5rem; padding: .32rem 0;
  border-bottom: 1px solid var(--rule);
}
dt { color: var(--soft); } dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
footer { margin-top: 3rem; color: var(--soft); font-size: .86rem; }
footer li { margin: .25rem 0; } footer ul { padding-left: 1.1rem; margin: .4rem 0 0; }
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --rule: #ccc; --panel: #fff; }
  html { font-size: 11px; }
  body { padding: 0; max-width: none; font-size: 1rem; }
  h2 { margin-top: 1.6rem; }
  h2, .legend { break-after: avoid; } figure, section, .tile, tr { break-inside: avoid; }
  .scroll { overflow: visible; } svg { min-width: 0; width: 84%; }
  .bar, .dot, td i, svg.flame rect { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def style_sheet(strategies: tuple[str, ...]) -> str:
    """The whole sheet for a page that shows these strategies."""
    looks = _looks(strategies)
    light = "\n".join(f".{style_of(i)} {{ --c: {look[0]}; --dash: {look[2]}; }}" for i, look in enumerate(looks))
    dark = "\n".join(f".{style_of(i)} {{ --c: {look[1]}; }}" for i, look in enumerate(looks))
    return f"{_SHEET}{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def style_of(index: int) -> str:
    """The class of the strategy at this place of the tuple that `style_sheet` was given."""
    return f"s{index}"


def _looks(strategies: tuple[str, ...]) -> list[tuple[str, str, str]]:
    unknown = [name for name in strategies if name not in _KNOWN]
    return [_KNOWN[name] if name in _KNOWN else _SPARE[unknown.index(name) % len(_SPARE)] for name in strategies]
