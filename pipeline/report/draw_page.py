"""Renders items with their facts and pictures as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.html import base64_of, render_html


@dataclass(frozen=True, slots=True)
class Figure:
    """Holds one picture and what stands above it."""

    caption: str
    png: bytes


@dataclass(frozen=True, slots=True)
class Section:
    """Holds one item: its facts as (name, text), then its pictures."""

    title: str
    facts: tuple[tuple[str, str], ...]
    figures: tuple[Figure, ...]


def render_page(title: str, sections: Sequence[Section]) -> str:
    """Render the page of all sections, in order."""
    shown = [
        {
            "title": section.title,
            "facts": section.facts,
            "figures": [{"caption": one.caption, "reason": "", "data": base64_of(one.png)} for one in section.figures],
        }
        for section in sections
    ]
    return render_html("kept_tokens.html.jinja", title=title, sections=shown)
