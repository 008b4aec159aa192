"""The frame of the pages in `page`: one style, sections, tables; no script, no font, no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2129;--dim:#5c6470;--line:#dfe3e8;--back:#fff;--card:#f6f7f9;
--c0:#2563eb;--c1:#d9480f;--c2:#0f8a5f;--c3:#9333ea;--c4:#b8860b;--c5:#db2777;--c6:#0891b2;--c7:#6b7280}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8eb;--dim:#9aa3af;--line:#343a43;--back:#15181d;
--card:#1d2127;--c0:#6ea8fe;--c1:#ff9d5c;--c2:#4fd1a1;--c3:#c79bff;--c4:#e6c34d;--c5:#ff8ac2;
--c6:#5fd3ea;--c7:#a3abb6}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1080px;padding:1rem;background:var(--back);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:.2rem 0;overflow-wrap:anywhere}h2{font-size:1.05rem;margin:0 0 .5rem}
p,figcaption,.dim{color:var(--dim);overflow-wrap:anywhere}
.tiles,.plots{display:grid;gap:.8rem;margin:1rem 0}
.tiles{grid-template-columns:repeat(auto-fit,minmax(9rem,1fr))}
.plots{grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr))}
.tile,section{background:var(--card);border:1px solid var(--line);border-radius:.6rem;
padding:.7rem .9rem;min-width:0}
.tile b{display:block;font-size:1.25rem;font-variant-numeric:tabular-nums}
.tile span{color:var(--dim);font-size:.85rem}
figcaption{font-size:.85rem;margin-top:.5rem}
svg{width:100%;height:auto;display:block}svg text{fill:var(--dim);font:12px system-ui,sans-serif}
svg polyline{stroke-width:1.5}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem .9rem;padding:0;margin:.4rem 0 0;
font-size:.85rem}
.legend i{display:inline-block;width:.7rem;height:.7rem;border-radius:2px;margin-right:.35rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;width:100%}
th,td{text-align:right;padding:.25rem .5rem;border-bottom:1px solid var(--line);white-space:nowrap;
font-variant-numeric:tabular-nums}
th:first-child,td:first-child{text-align:left}
code,pre{font-size:.85rem;white-space:pre-wrap;overflow-wrap:anywhere}
"""


def section(title: str, body: str, note: str = "") -> str:
    """A card with a title and a caption; nothing if it has no body."""
    if not body:
        return ""
    said = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return (
        f"<section><h2>{escape(title)}</h2><figure style='margin:0'>{body}{said}</figure></section>"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls sideways where it is too wide."""
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead>{lines}</table></div>'


def page(title: str, body: str) -> str:
    """The whole document."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )
