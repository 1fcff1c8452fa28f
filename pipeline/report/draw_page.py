"""One self-contained HTML page of pictures: no script, no network, everything that came from outside escaped.

Knows nothing of traces or models.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_STYLE = (
    "body{font:14px sans-serif;margin:24px;max-width:1200px}figure{margin:0 0 24px}"
    "img{max-width:100%;image-rendering:pixelated;border:1px solid #ccc}figcaption{margin-bottom:4px}"
    "pre{white-space:pre-wrap;background:#f4f4f4;padding:8px}"
)


@dataclass(frozen=True, slots=True)
class Figure:
    """One picture and what stands above it."""

    caption: str
    png: bytes


@dataclass(frozen=True, slots=True)
class Section:
    """One item: its facts as (name, text), then its pictures."""

    title: str
    facts: tuple[tuple[str, str], ...]
    figures: tuple[Figure, ...]


def render_page(title: str, sections: Sequence[Section]) -> str:
    """The page. Its policy allows pictures within it and its own style, nothing else."""
    style_hash = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style_hash}'; base-uri 'none'; form-action 'none'"
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>"
    )
    return "\n".join([head, *map(_section, sections), "</body></html>"]) + "\n"


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    parts += [f"<div>{escape(name)}<pre>{escape(text)}</pre></div>" for name, text in section.facts]
    for figure in section.figures:
        data = base64.b64encode(figure.png).decode()
        caption = escape(figure.caption)
        parts.append(
            f'<figure><figcaption>{caption}</figcaption><img alt="{caption}" src="data:image/png;base64,{data}">'
            "</figure>"
        )
    return "\n".join(parts)
