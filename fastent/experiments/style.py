"""The look of the report and of its figures: one palette for light screens and print, one for dark screens.

Series colours are those of Okabe and Ito, which readers with colour-blindness tell apart, lightened for dark
screens; no figure tells series apart by colour alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Theme:
    """Colours of a figure, as hexadecimal RGB."""

    paper: str
    ink: str
    faint: str
    train: str
    test: str
    entropy: str
    norm: str
    signal: str


LIGHT = Theme("#ffffff", "#1c2430", "#c9d0d9", "#7a8594", "#0072b2", "#d55e00", "#009e73", "#a3477f")
DARK = Theme("#12161c", "#e3e8ef", "#3a4452", "#9aa5b4", "#56b4e9", "#f08a3c", "#2fc79a", "#e08fc0")

CSS = """
:root {
  --paper: #ffffff; --ink: #1c2430; --soft: #5a6675; --line: #d9dee5; --panel: #f5f7f9; --link: #00639c;
  --yes: #00684b; --part: #8a5300; --no: #a3261b; --none: #5a6675;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #12161c; --ink: #e3e8ef; --soft: #9aa5b4; --line: #2c3541; --panel: #1a2029; --link: #6fbdf0;
    --yes: #4fd1a5; --part: #f0b45c; --no: #f58d83; --none: #9aa5b4;
  }
}
* { box-sizing: border-box; }
html { color-scheme: light dark; scroll-behavior: smooth; }
body {
  margin: 0 auto; max-width: 68rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
}
header h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
header p { margin: 0; color: var(--soft); max-width: 48rem; }
nav { margin: 1.25rem 0 0; border: solid var(--line); border-width: 1px 0; padding: .6rem 0; font-size: .92rem; }
nav ol { margin: 0; padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; }
a { color: var(--link); text-decoration: none; }
a:hover, a:focus { text-decoration: underline; }
section { margin-top: 2.5rem; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 .75rem; }
p, ul { max-width: 48rem; margin: .6rem 0; }
ul { padding-left: 1.25rem; }
li { margin: .25rem 0; }
p.note { border-left: 3px solid var(--line); padding-left: .9rem; color: var(--soft); font-size: .94rem; }
code {
  font: .88em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--panel);
  padding: .1em .3em; border-radius: .25em; overflow-wrap: anywhere;
}
pre {
  background: var(--panel); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem .9rem;
  overflow-x: auto;
}
pre code { background: none; padding: 0; overflow-wrap: normal; }
.scroll { overflow-x: auto; margin: 1.1rem 0; }
table {
  border-collapse: collapse; max-width: 100%; min-width: min(100%, 30rem); font-size: .9rem; line-height: 1.45;
}
table:has(th:nth-child(5)) { min-width: 46rem; }
caption { text-align: left; color: var(--soft); padding-bottom: .5rem; max-width: 52rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .7rem .4rem 0; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; vertical-align: bottom; }
td:last-child, th:last-child { padding-right: 0; }
.number { text-align: right; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.verdict { font-weight: 600; white-space: nowrap; }
.verdict.yes { color: var(--yes); }
.verdict.part { color: var(--part); }
.verdict.no { color: var(--no); }
.verdict.none { color: var(--none); font-weight: 400; }
figure { margin: 1.5rem 0; }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .92rem; max-width: 52rem; margin-top: .5rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
}
"""
