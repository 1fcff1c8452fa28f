"""Sets how plots look, and writes a matplotlib figure as SVG text: the same for the same figure, on every machine.

Draws without a display and without `pyplot`'s global figures.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
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
    with without_glyph_warnings():
        _written(figure)  # for the layout: letters have the widths that an SVG gives them
        _round_layout(figure)
        return _written(figure)


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Let letters be missing from our font: the viewer's fonts draw the text."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def _written(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _round_layout(figure: Figure) -> None:
    """Keep the layout that was found, its shares of the figure rounded to 12 digits.

    The constrained layout's solver sums in the order of its variables' addresses, so its last digit differs from
    process to process. The file would show it: in the names of clip rectangles, which are a hash of all digits, and in
    places that lie in the middle between two of the file's digits, since letters are multiples of 1/64 wide.
    """
    figure.set_layout_engine("none")
    for part in figure.subfigs:
        part.bbox_relative.set_points(part.bbox_relative.get_points().round(12))
    for ax in figure.axes:
        ax.set_position(tuple(np.round(ax.get_position().bounds, 12)))
    for text in figure.texts:
        text.set_position(tuple(np.round(text.get_position(), 12)))


def label(text: str, most: int = 60) -> str:
    """Shorten a name so that it fits beside a plot, control characters spelled out."""
    text = " ".join(visible(text).split())
    return text if len(text) <= most else f"{text[: most - 1]}…"
