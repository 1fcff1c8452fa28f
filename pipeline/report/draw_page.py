"""Renders items with their facts and pictures as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.html import render_html
from pipeline.report.picture import Picture, shown


@dataclass(frozen=True, slots=True)
class Section:
    """Holds one item: its facts as (name, text), then its pictures."""

    title: str
    facts: tuple[tuple[str, str], ...]
    pictures: tuple[Picture, ...]


def render_page(title: str, sections: Sequence[Section]) -> str:
    """Render the page of all sections, in order."""
    items = [
        {"title": one.title, "facts": one.facts, "pictures": [shown(picture) for picture in one.pictures]}
        for one in sections
    ]
    return render_html("kept_tokens.html.jinja", title=title, sections=items)
