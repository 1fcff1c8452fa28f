"""The committed results can be drawn: every panel, every line, with the values of the JSON."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benchmarks.accuracy import report
from benchmarks.toy_model.training import curve

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """What was drawn, beside its SVG."""
    drawn: list[Figure] = []
    for module in (report, curve):
        svg_of = module.svg_of
        monkeypatch.setattr(module, "svg_of", lambda figure, svg_of=svg_of: drawn.append(figure) or svg_of(figure))
    return drawn


def test_accuracy_has_a_panel_a_task_and_a_line_a_method(figures) -> None:
    plans = json.loads((RESULTS / "accuracy.json").read_text())["plans"]
    ET.fromstring(report.svg_plot(plans))
    (figure,) = figures
    assert [panel.get_title() for panel in figure.axes] == list(plans["none"]["tasks"])
    for panel in figure.axes:
        lines = {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
        for name, plan in plans.items():
            method = name.partition("@")[0].partition(":")[0]
            if method != "none":
                assert [plan["patches_kept"], plan["tasks"][panel.get_title()]["accuracy"]] in lines[method]


def test_a_training_has_a_line_a_task(figures) -> None:
    result = json.loads((RESULTS / "toy_training.json").read_text())
    ET.fromstring(curve.svg_plot(result))
    (panel,) = figures[0].axes
    for line, task in zip(panel.lines, curve.SHOWN, strict=True):
        assert line.get_label() == task
        assert line.get_ydata().tolist() == [one["exact_match"][task] for one in result["validations"]]
