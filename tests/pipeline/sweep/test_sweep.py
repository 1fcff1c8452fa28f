"""Sweeps: points from tables, one tidy Parquet that goes on where it was stopped, refusals, and the picture."""

from __future__ import annotations

import json
import mmap
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from illava.analysis.peak_memory import PeakMemory
from illava.errors import RandomWeightsError
from illava.families.model_shape import load_model_shape
from illava.model_files import declare_random_weights
from illava.plan import ReductionPlan
from illava.token_counts import VisualShape, expected_counts
from pipeline.config import load
from pipeline.config.base import result_field
from pipeline.config.load import load_as
from pipeline.config.schema import JobConfig, SamplingConfig
from pipeline.errors import ConfigError, RefusedError
from pipeline.sweep.command import sweep_cli
from pipeline.sweep.config import RowConfig, SweepConfig, expand_row
from pipeline.sweep.measure import measure_point
from pipeline.sweep.picture import draw_sweep, sweep_figure
from pipeline.sweep.results import FILE, SweepRow, read_results, write_results
from pipeline.sweep.run import open_sweep, run_sweep
from pipeline.sweep.svg import plot_style
from pipeline.sweep.table import markdown_table
from tests.support.media import clips

ROOT = Path(__file__).resolve().parents[3]
KEEP = {"steps": [{"stage": "decoder_layer", "layers": [1], "reducer": {"kind": "$method", "keep_ratio": "$keep"}}]}


@pytest.fixture
def folder(tmp_path, onevision_folder) -> Path:
    """Two pictures and a clip with questions; of the last the answer is known."""
    for n in range(2):
        Image.fromarray(clips.barcode_frame(n, width=64, height=48)).save(tmp_path / f"{n}.png")
    clips.write_barcode_video(tmp_path / "2.mp4", 2, num_frames=6, width=64, height=48)
    asked = {"question": "What?", "metric": "exact_match"}
    lines = [{"uri": f"{n}.png", **asked, "reference": "never said"} for n in range(2)]
    lines.append({"uri": "2.mp4", **asked})
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def config_of(folder: Path, model: Path, **changes) -> SweepConfig:
    rows = [
        {"name": "whole", "plan": {"preset": "none"}},
        {"name": "{method} {keep}", "plan": KEEP, "over": {"method": ["illava", "random"], "keep": [0.5]}},
    ]
    data = {
        "input": {"uri": str(folder), "manifest": str(folder / "items.jsonl")},
        "media": {"num_frames": 2},
        "models": {"tiny": {"model_id": str(model), "device": "cpu", "dtype": "float32", "kv_cache_bytes": 8 << 20}},
        "tables": {"decoder": rows},
        "task": {"kind": "question", "metric": "auto"},
        "sampling": {"max_new_tokens": 3},
        "speed": {"num_items": 1, "rounds": 1, "num_new_tokens": 2},
        "output": {"uri": str(folder / "out")},
    }
    return SweepConfig.model_validate(data | changes)


def test_a_sweep_is_measured_once_and_only_what_is_missing_is_measured(folder, onevision_folder) -> None:
    config = config_of(folder, onevision_folder)
    measured: list[str] = []

    def stopped_after_two(vlm, config, loaded, requests, plan):
        measured.append(plan.digest())
        if len(measured) == 2:
            signal.raise_signal(signal.SIGTERM)
        return measure_point(vlm, config, loaded, requests, plan)

    assert run_sweep(config, measure=stopped_after_two) == 143
    assert [row.row for row in read_results(config.output.uri)] == ["whole", "illava 0.5"]
    first = read_results(config.output.uri)
    assert run_sweep(config, measure=stopped_after_two) == 0
    assert len(measured) == len(set(measured)) == 3
    rows = read_results(config.output.uri)
    assert rows[:2] == first
    whole, illava, _ = rows
    assert (whole.num_items, whole.num_not_loaded, whole.num_failed) == (3, 0, 0)
    assert (whole.kept_ratio, whole.agreement_top1) == (1.0, 1.0)
    assert whole.agreement_kl_nats == pytest.approx(0, abs=1e-6)
    assert illava.axes == {"method": "illava", "keep": "0.5"}
    assert illava.kept_ratio == pytest.approx(0.5, abs=0.02)
    assert illava.num_vision_tokens_kept == illava.num_vision_tokens > illava.num_decoder_tokens_kept
    assert illava.agreement_kl_nats > 0
    assert (illava.accuracy, illava.difference, illava.scores) == (0.0, 0.0, [0.0, 0.0])
    assert min(illava.vision_s, illava.prefill_s, illava.decode_s, illava.whole_prefill_s, illava.items_per_s) > 0
    assert ReductionPlan.model_validate_json(illava.plan) == config.points()[1].plan
    table = pq.read_table(folder / "out" / "sweep.parquet")
    assert table.column_names == list(SweepRow.__dataclass_fields__)
    ET.parse(folder / "out" / "decoder.svg")
    run_sweep(config, measure=stopped_after_two)
    assert len(measured) == 3, "nothing is measured again"


def test_figures_of_another_configuration_are_refused(folder, onevision_folder) -> None:
    nothing = {"num_failed": 0}
    config = config_of(folder, onevision_folder, quality=False)
    run_sweep(config, measure=lambda *_: nothing)
    for changes in ({"sampling": {"max_new_tokens": 2}}, {"quality": True}, {"speed": {"rounds": 2}}):
        with pytest.raises(RefusedError, match="name another output"):
            open_sweep(config_of(folder, onevision_folder, **{"quality": False} | changes))
    fewer = {"decoder": [{"name": "whole", "plan": {"preset": "none"}}]}
    with pytest.raises(RefusedError, match="not in this configuration"):
        open_sweep(config_of(folder, onevision_folder, quality=False, tables=fewer))


class NextSampling(SamplingConfig):
    """As a later version may have it."""

    next_penalty: float = result_field(1.0, ge=1)


class NextJob(JobConfig):
    """The job of a version with a key more."""

    sampling: NextSampling = result_field(NextSampling())


def next_version(monkeypatch) -> None:
    """Sweeps stand for jobs with a key more from here on."""
    as_job = SweepConfig.job

    def job(self, model, plan) -> NextJob:
        return NextJob.model_validate(as_job(self, model, plan).model_dump() | {"reduction": plan})

    monkeypatch.setattr(SweepConfig, "job", job)
    monkeypatch.setattr(load, "JobConfig", NextJob)


def test_a_later_key_orphans_no_sweep_and_what_differs_is_named(folder, onevision_folder, monkeypatch) -> None:
    """To see this fail: compare the digests alone, as it was."""
    config = config_of(folder, onevision_folder, quality=False)
    run_sweep(config, measure=lambda *_: {"num_failed": 0})
    next_version(monkeypatch)
    assert open_sweep(config).pending == []
    with pytest.raises(RefusedError, match=r"\(sampling.max_new_tokens: 3 there, 2 here\): name another"):
        open_sweep(config_of(folder, onevision_folder, quality=False, sampling={"max_new_tokens": 2}))
    with pytest.raises(RefusedError, match=r"\(speed: .*\"rounds\": 1.* there, .*\"rounds\": 2.* here\)"):
        open_sweep(config_of(folder, onevision_folder, quality=False, speed={"rounds": 2}))
    monkeypatch.setattr("pipeline.sweep.point_record.__version__", "9.9")
    with pytest.raises(RefusedError, match=r"versions.illava: .* there, \"9.9\" here"):
        open_sweep(config)  # figures are times, and a release may be faster


def test_the_first_sweeps_without_that_column_go_on(folder, onevision_folder, monkeypatch) -> None:
    config = config_of(folder, onevision_folder, quality=False)
    run_sweep(config, measure=lambda *_: {"num_failed": 0})
    path = folder / "out" / "sweep.parquet"
    pq.write_table(pq.read_table(path).drop_columns("depends_on"), path)
    with pytest.raises(RefusedError, match="under other settings"):
        open_sweep(config_of(folder, onevision_folder, quality=True))
    sweep = open_sweep(config)
    assert sweep.pending == []
    write_results(config.output.uri, sweep.done)
    next_version(monkeypatch)
    assert open_sweep(config).pending == [], "what they depend on is known from now on"
    pq.write_table(pq.read_table(path).append_column("later", [[1, 2, 3]]), path)
    with pytest.raises(RefusedError, match="has other columns than this version writes"):
        open_sweep(config)


def test_damaged_results_are_told_with_what_to_do(tmp_path) -> None:
    (tmp_path / FILE).write_bytes(b"no Parquet")
    with pytest.raises(RefusedError, match=r"sweep\.parquet is no readable Parquet file .* name another output\.uri"):
        read_results(str(tmp_path))


def test_random_weights_are_for_speed_only(folder, onevision_folder) -> None:
    model = folder / "model"
    model.mkdir()
    for path in onevision_folder.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    declare_random_weights(model)
    with pytest.raises(RandomWeightsError, match="random weights say nothing about quality"):
        run_sweep(config_of(folder, model))
    assert not (folder / "out").exists()
    only_whole = {"speed": [{"name": "whole", "plan": {"preset": "none"}}]}
    assert run_sweep(config_of(folder, model, quality=False, tables=only_whole)) == 0
    (row,) = read_results(str(folder / "out"))
    assert (row.agreement_top1, row.accuracy) == (None, None)
    assert row.prefill_s > 0


def test_rows_become_points() -> None:
    row = RowConfig(name="{method} at {keep}", plan=KEEP, over={"method": ["illava", "fastv"], "keep": [0.5, 0.25]})
    points = expand_row(row)
    assert [name for name, _, _ in points] == ["illava at 0.5", "illava at 0.25", "fastv at 0.5", "fastv at 0.25"]
    assert points[3][2].steps[0].reducer.model_dump(exclude_none=True)["keep_ratio"] == 0.25


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"name": "x", "plan": KEEP, "over": {"method": ["illava"]}}, r"\$keep is no axis"),
        ({"name": "{method} {keep}", "plan": KEEP, "over": {"method": ["x"], "keep": [0.5]}}, "no reducer of kind 'x'"),
        ({"name": "x", "plan": {"preset": "none"}, "over": {"keep": [1]}}, r"the plan has no \$keep"),
        ({"name": "{what}", "plan": {"preset": "none"}}, "no axis 'what'"),
    ],
)
def test_rows_that_mean_nothing_are_refused(row, message) -> None:
    with pytest.raises(ValueError, match=message):
        RowConfig.model_validate(row)


def test_names_and_models_are_checked(folder, onevision_folder) -> None:
    whole = {"name": "whole", "plan": {"preset": "none"}}
    for changes, message in (
        ({"only": ["other"]}, "no table 'other'"),
        ({"tables": {"t": [whole | {"models": ["7b"]}]}}, "no model '7b'"),
        ({"tables": {"t": [whole, whole]}}, "two rows 'whole'"),
        ({"task": {"kind": "document"}}, "window by window"),
    ):
        with pytest.raises(ValueError, match=message):
            config_of(folder, onevision_folder, **changes)


def test_an_unknown_key_is_told_with_the_nearest(tmp_path) -> None:
    data = yaml.safe_load((ROOT / "configs/sweep_demo.yaml").read_text())
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(data | {"modells": {}}))
    with pytest.raises(ConfigError, match="modells: unknown key; did you mean models"):
        load_as(SweepConfig, str(tmp_path / "x.yaml"))


def test_the_papers_tables_fit_the_published_shapes() -> None:
    """SigLIP so400m up to the block that is read, 27 x 27 patches, and Qwen2 of 28 and 24 layers."""
    config = load_as(SweepConfig, str(ROOT / "configs" / "sweep_paper.yaml"))
    names = {*(f"table-{n}" for n in range(4, 10)), "figure-2", "figures-4-5"}
    assert set(config.tables) == names
    assert {point.model for point in config.points() if point.table == "figures-4-5"} == {"7b", "0.5b"}
    for point in config.points():
        assert max(point.plan.layers("vision_block"), default=0) < 26
        assert max(point.plan.layers("decoder_layer"), default=0) < {"7b": 28, "0.5b": 24}[point.model]
    left = [729 - 4 * int(point.axes["r"]) for point in config.points() if point.table == "table-5" and point.axes]
    assert left == [577, 425, 361, 289, 225, 169]


def test_the_demo_sweep_fits_the_bundled_model() -> None:
    config = load_as(SweepConfig, str(ROOT / "configs" / "sweep_demo.yaml"))
    shape = load_model_shape(str(ROOT / "configs/demo/model"))
    for point in config.points():
        counts = expected_counts(
            shape.geometry,
            point.plan,
            [VisualShape("video", 112, 112, num_frames=8)],
            num_vision_blocks=shape.num_vision_blocks,
            num_decoder_layers=shape.num_decoder_layers,
        )
        assert counts.num_vision_tokens == 393


def row_of(name: str, **more) -> SweepRow:
    return SweepRow("t", name, "m", {}, "{}", [], "d", 2, 0, 0, **more)


TIMES = {f"{side}{state}": 0.5 for side in ("", "whole_") for state in ("vision_s", "prefill_s", "decode_s")}
MEASURED = {"kept_ratio": 0.5, "agreement_top1": 0.9, "items_per_s": 2.0, "peak_memory_bytes": 1 << 30}


def drawn(rows: list[SweepRow]) -> dict[str, list[tuple[float, float]]]:
    """The points of each panel by its axis's title; of a column below, by its own."""
    panels = {}
    with plot_style():
        for ax in sweep_figure("t", rows).axes:
            if name := ax.get_xlabel() or ax.get_title(loc="left"):
                panels[name] = [tuple(float(value) for value in line.get_xydata()[0]) for line in ax.lines]
    return panels


def test_the_picture_shows_what_was_measured_and_nothing_else() -> None:
    kept, time = "visual tokens in the last layer, % of the whole model's", "seconds an item, in a batch"
    other = row_of("other", kept_ratio=0.25, items_per_s=4.0)
    assert drawn([row_of("x", **MEASURED), other]) == {
        kept: [(50.0, 0.9)],
        time: [(0.5, 0.9)],
        "top-1 agreement, 95 %": [(0.9, 0.0)],
        "peak memory, MiB": [],
    }
    assert drawn([row_of("x", **TIMES)]) == {"one request, seconds": []}, "the bars alone"
    scored = MEASURED | {"accuracy": 0.7, "accuracy_low": 0.6, "accuracy_high": 0.8}
    assert drawn([row_of("x", **scored)])[kept] == [(50.0, 0.7)]


@pytest.mark.parametrize("name", ["accuracy", "agreement_top1"])
def test_quality_has_its_interval_and_equal_marks_stand_side_by_side(name) -> None:
    measured = MEASURED | {name: 0.7, f"{name}_low": 0.6, f"{name}_high": 0.8}
    rows = [row_of(f"row {n}", **measured) for n in range(3)] + [row_of("apart", **measured | {"kept_ratio": 0.9})]
    with plot_style():
        figure = sweep_figure("t", rows)
        figure.draw_without_rendering()
        scatter, _, _, column, *_ = figure.axes
        for ax, axis in ((scatter, 1), (column, 0)):
            ends = [[float(end[axis]) for end in lines.get_segments()[0]] for lines in ax.collections]
            assert ends == [[0.6, 0.8]] * 4
        places = [line.get_window_extent() for line in scatter.lines]
    assert [line.get_xydata()[0].tolist() for line in scatter.lines][:3] == [[50.0, 0.7]] * 3, "all at 50 %"
    centres = [(place.x0 + place.x1) / 2 for place in places[:3]]
    side_px = 5 / 72 * figure.dpi
    assert min(centres[1] - centres[0], centres[2] - centres[1]) > side_px, "none covers another"
    assert centres[1] == pytest.approx(scatter.transData.transform((50.0, 0.7))[0], abs=0.01), "around their place"


def test_a_request_is_drawn_beside_the_whole_models_with_its_slowest_round() -> None:
    times = TIMES | {"prefill_s": 0.1, "decode_s": 0.1, "request_s_low": 0.6, "request_s_high": 0.9}
    with plot_style():
        _, column = sweep_figure("t", [row_of("x", **times)]).axes
    whole, rounds = (one.get_segments()[0].tolist() for one in column.collections)
    assert [end[0] for end in whole] == [1.5, 1.5]
    assert [end[0] for end in rounds] == [0.6, 0.9]
    assert sum(bar.get_width() for bar in column.patches) == pytest.approx(0.7)
    assert "2.14x" in [text.get_text() for text in column.texts]


def test_ticks_are_round() -> None:
    rows = [row_of(str(n), **MEASURED | TIMES | {"agreement_top1": 0.9137 + 0.0071 * n}) for n in range(4)]
    with plot_style():
        figure = sweep_figure("t", rows)
        figure.draw_without_rendering()
        for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
            ticks = axis.get_majorticklocs()
            assert len(ticks) <= 9
            for step in np.diff(ticks):
                assert round(float(step) / 10.0 ** np.floor(np.log10(step) + 1e-9), 6) in (1, 2, 5), ticks


@pytest.fixture
def placed_otherwise(monkeypatch):
    """Axes whose places end at another last digit."""
    add_axes = Figure.add_axes

    def begin() -> None:
        monkeypatch.setattr(Figure, "add_axes", lambda figure, rect: add_axes(figure, np.nextafter(rect, 1.0)))

    return begin


def test_a_picture_is_the_same_each_time_and_shows_names_as_they_are(placed_otherwise) -> None:
    names = ['<b>"a" & b', "$x_1$ for $2", "_hidden", "\x01\n漢字", "long " * 40]
    rows = [row_of(name, **MEASURED, **TIMES) for name in names]
    svg = draw_sweep("a <title>", rows)
    assert svg == draw_sweep("a <title>", rows)
    placed_otherwise()
    assert svg == draw_sweep("a <title>", rows), "a last digit that no file shows"
    words = ["".join(element.itertext()) for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    for name in ('<b>"a" & b', "$x_1$ for $2", "_hidden", "\\x01 漢字"):
        assert words.count(name) == 1, "one line a row"
    assert "a <title>" in words
    assert max(map(len, words)) <= 60
    assert "2 items; a mark stands for the same row everywhere" in words
    assert "<script" not in svg


def test_no_two_labels_of_a_picture_overlap() -> None:
    rows = [row_of(f"attention_pruning before layer {n}, keep 0.5", **MEASURED, **TIMES) for n in range(40)]
    with plot_style():
        figure = sweep_figure("t", rows)
        figure.draw_without_rendering()
        axes = [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)]
        outside = [
            words
            for axis in axes
            for place, words in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
            if not min(axis.get_view_interval()) <= place <= max(axis.get_view_interval())
        ]
        texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
        texts = [text for text in texts if text not in outside]
    boxes = [text.get_window_extent() for text in texts]
    width, height = figure.bbox.max
    for n, box in enumerate(boxes):
        assert 0 <= box.x0 < box.x1 <= width, texts[n]
        assert 0 <= box.y0 < box.y1 <= height, texts[n]
        for other, theirs in zip(texts[:n], boxes[:n], strict=True):
            assert not box.overlaps(theirs), (texts[n], other)


def test_a_sweep_that_cannot_draw_says_so_before_it_measures(folder, onevision_folder, monkeypatch, capsys) -> None:
    config = folder / "sweep.yaml"
    config.write_text(yaml.safe_dump(config_of(folder, onevision_folder).model_dump(mode="json", exclude_none=True)))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("picture", "svg"):
        monkeypatch.delitem(sys.modules, f"pipeline.sweep.{name}")
    assert sweep_cli("", ["--config", str(config)]) == 2
    said = capsys.readouterr().err
    assert "no package 'matplotlib'" in said
    assert f"-m pip install -e '{ROOT}[plots]'" in said
    assert not (folder / "out").exists()
    assert sweep_cli("", ["--config", str(config), "--dry-run"]) == 0, "counting tokens draws nothing"


def test_what_a_point_needs_is_imported_before_the_first() -> None:
    """Else the first point's resident memory is smaller than the others' by what came later."""
    code = "import sys, pipeline.sweep.run; print('scipy.stats' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_the_table_says_what_was_measured() -> None:
    line = markdown_table([row_of("x", kept_ratio=0.25, **TIMES | {"prefill_s": 0.25})]).splitlines()[-1]
    assert line == "| x | m | 25 % | - | - | - | 1.00x, 2.00x, 1.00x | - | - |"


def test_peak_memory_sees_what_was_held_and_given_back() -> None:
    with PeakMemory(torch.device("cpu")) as before:
        pass
    # Fresh pages of the system: a heap may have free ones at hand, and nothing would grow.
    fresh = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with PeakMemory(torch.device("cpu")) as memory, mmap.mmap(-1, 64 << 20, flags=fresh) as held:
        held[:: mmap.PAGESIZE] = b"x" * (len(held) // mmap.PAGESIZE)
    assert memory.num_bytes is not None, "Linux tells"
    assert memory.num_bytes - before.num_bytes > 48 << 20


def test_a_plan_that_does_not_fit_the_model_is_told_before_anything_is_measured(folder, onevision_folder) -> None:
    deep = {"steps": [{"stage": "decoder_layer", "layers": [9], "reducer": {"kind": "illava", "keep_ratio": 0.5}}]}
    rows = [{"name": "whole", "plan": {"preset": "none"}}, {"name": "deep", "plan": deep}]
    with pytest.raises(ValueError, match="before decoder layer 9"):
        run_sweep(config_of(folder, onevision_folder, tables={"t": rows}))
    assert read_results(str(folder / "out")) == []
