"""The few SVG marks that the benchmarks' plots are made of."""

from __future__ import annotations

from collections.abc import Iterable


def drawing(width: float, height: float, marks: Iterable[str], *, font_px: int) -> str:
    """A whole file: the marks on white."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
    head += f'font-size="{font_px}"><rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, *marks, "</svg>"]) + "\n"


def line(x1: float, y1: float, x2: float, y2: float, ink: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{ink}"/>'


def polyline(points: Iterable[tuple[float, float]], ink: str, *, width: float = 1) -> str:
    """A line through points."""
    way = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{way}" fill="none" stroke="{ink}" stroke-width="{width}"/>'


def text(x: float, y: float, words: str, *, anchor: str = "start", ink: str = "#333333") -> str:
    """Words that start, end or are centred (``anchor``) at a point."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{ink}">{words}</text>'
