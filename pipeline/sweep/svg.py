"""Sets how plots look, and writes a matplotlib figure as SVG text: the same for the same figure, on every machine.

Draws without a display and without `pyplot`'s global figures.
"""

from __future__ import annotations

import io
import re
import warnings
from contextlib import AbstractContextManager

from matplotlib import style
from matplotlib.figure import Figure

from pipeline.redaction import visible

INKS = ("#1f6fb4", "#d1495b", "#2e8b57", "#8e6bbf", "#e08e2b", "#444444", "#e377c2", "#12a5a5", "#a0a020", "#7a4a2b")
_STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "font.size": 8,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "illava",
    "text.parse_math": False,  # a dollar in a name is a dollar
}


def plot_style() -> AbstractContextManager[None]:
    """Put the project's style in place of the machine's `matplotlibrc`."""
    return style.context(["default", _STYLE])


def svg_of(figure: Figure) -> str:
    """Render the figure as a whole SVG file."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the viewer's fonts draw the text
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _number_clips(buffer.getvalue())


def _number_clips(svg: str) -> str:
    """Number the clip rectangles by their place in the file.

    matplotlib names them by a hash of all their digits, and the constrained layout's solver sums in the order of its
    variables' addresses: the last digit, which the file does not show, differs from process to process.
    """
    for number, name in enumerate(re.findall(r'<clipPath id="(\w+)"', svg)):
        svg = svg.replace(f'"{name}"', f'"clip{number}"').replace(f"url(#{name})", f"url(#clip{number})")
    return svg


def label(text: str, most: int = 60) -> str:
    """Shorten a name so that it fits beside a plot, control characters spelled out."""
    text = " ".join(visible(text).split())
    return text if len(text) <= most else f"{text[: most - 1]}…"
