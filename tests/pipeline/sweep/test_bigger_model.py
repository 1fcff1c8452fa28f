"""The sweep of a bigger model with fewer tokens beside a smaller one with all: its points fit the published sizes.

Its picture is that of every sweep; both models are in each of its panels.
"""

from __future__ import annotations

from pathlib import Path

from illava.families.internvl.geometry import TileGroupGeometry
from illava.families.internvl.plan_check import check_internvl
from illava.token_counts import VisualShape, expected_counts
from pipeline.config.load import load_as
from pipeline.sweep.config import SweepConfig
from pipeline.sweep.picture import sweep_figure
from pipeline.sweep.results import SweepRow

ROOT = Path(__file__).resolve().parents[3]
TILES = TileGroupGeometry(tile_px=448, patch_px=14, group_side=2, min_tiles=1, max_tiles=12)


def test_points_fit_the_published_sizes_and_only_the_bigger_model_is_merged() -> None:
    config = load_as(SweepConfig, str(ROOT / "configs" / "sweep_bigger_model.yaml"))
    assert all(model.revision for model in config.models.values())
    kept = {}
    for point in config.points():
        check_internvl(point.plan, "internvl", TILES, num_blocks=24)
        shape = VisualShape("video", 720, 1280, num_frames=1)
        counts = expected_counts(TILES, point.plan, [shape], num_vision_blocks=24, num_decoder_layers=36)
        kept[point.model, point.row] = counts.num_vision_tokens_kept
    whole = {("8b", "whole"): 256, ("4b", "whole"): 256}
    merged = {0.9: 167, 0.8: 105, 0.7: 62, 0.6: 33}  # each rounded, block by block
    assert kept == whole | {("8b", f"keep {keep} in four blocks"): count for keep, count in merged.items()}


def test_both_models_stand_in_one_panel() -> None:
    rows = [
        SweepRow("figure-5", "whole", model, {}, "{}", [], "d", 2, 0, 0, items_per_s=speed, agreement_top1=1.0)
        for model, speed in (("8b", 1.0), ("4b", 2.0))
    ]
    figure = sweep_figure("figure-5", rows)
    panels = [ax for ax in figure.axes if ax.get_xlabel() == "seconds an item, in a batch"]
    assert [len(ax.lines) for ax in panels] == [2]
