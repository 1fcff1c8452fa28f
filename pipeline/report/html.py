"""Renders a template as a self-contained HTML page: no script, no network, everything from outside escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.redaction import visible

_FOLDER = Path(__file__).parent


def render_html(
    template: str,
    *,
    title: str,
    max_characters: int | None = None,
    filters: dict[str, Callable[..., str]] | None = None,
    **values: Any,
) -> str:
    """Render the page. Its policy allows pictures within it and its own style, nothing else.

    Args:
        template: a file here that extends ``base.html.jinja``.
        title: of the page.
        max_characters: of one text; the rest is cut off, which is said. None cuts nothing.
        filters: of the template, by name.
        values: of the template.
    """
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: _shown(value, max_characters),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters or {}
    style = (_FOLDER / "page.css").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return environment.get_template(template).render(title=title, style=Markup(style), policy=policy, **values)


def base64_of(png: bytes) -> Markup:
    """Encode a picture as text that is shown as it is."""
    return Markup(base64.b64encode(png).decode())


def _shown(value: Any, max_characters: int | None) -> Any:
    """Every text on its way into the page: control characters spelled out, no secrets, not endless."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = visible(value)
    if max_characters is None or len(text) <= max_characters:
        return text
    return f"{text[:max_characters]} ... ({len(text):,} characters)"
