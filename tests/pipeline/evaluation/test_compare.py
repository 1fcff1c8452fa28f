"""Two runs item by item: exact where nothing differs, honest about what does."""

import json
import re

import numpy as np
import pytest

from pipeline.__main__ import main
from pipeline.errors import RefusedError
from pipeline.evaluation.compare import MEASURED, Comparison, compare_columns, compare_runs
from pipeline.evaluation.comparison_text import render_comparison
from pipeline.evaluation.run_columns import RunColumns
from pipeline.runs.parquet_sink import ParquetSink
from pipeline.runs.run import finish, open_run, pending_shards
from tests.support.runs.run_folders import failed_row, make_config, make_row, put_media


def write_run(folder, model_folder, media, *, change=None, finished=True, **sections):
    """A run over the media; ``change(n, item)`` gives what differs in the n-th row."""
    config = make_config(model_folder, input={"uri": str(media)}, output={"uri": str(folder)}, **sections)
    run = open_run(config)
    sink = ParquetSink(run)
    for index in pending_shards(run):
        rows = []
        for n, item in enumerate(run.shard(index).items, start=index * run.items_per_shard):
            changes = change(n) if change else {}
            rows.append(failed_row(run, index, item) if changes is None else make_row(run, index, item, **changes))
        sink.publish(index, rows)
    if finished:
        finish(run, {})
    return str(folder)


@pytest.fixture
def media(tmp_path):
    put_media(str(tmp_path / "media"), 10)
    return tmp_path / "media"


def test_a_run_with_itself_differs_by_exactly_zero(tmp_path, model_folder, media):
    uri = write_run(tmp_path / "a", model_folder, media, change=lambda n: {"score": n % 2, "latency_s": 0.1 * n})
    comparison = compare_runs(uri, uri)
    assert [d.name for d in comparison.differences] == ["score", *MEASURED]
    for difference in comparison.differences:
        interval = difference.difference
        assert (interval.mean, interval.low, interval.high) == (0.0, 0.0, 0.0)
        assert difference.first_mean == difference.second_mean
    assert comparison.mcnemar.p_value == 1.0
    assert (comparison.num_pairs, comparison.num_same_text, comparison.differing_config) == (10, 10, {})


def test_what_differs_is_said(tmp_path, model_folder, media, capsys):
    first = write_run(tmp_path / "a", model_folder, media, change=lambda n: {"score": 1.0} if n != 9 else None)
    second = write_run(
        tmp_path / "b",
        model_folder,
        media,
        change=lambda n: {"score": float(n > 2), "num_vision_tokens_kept": 400, "text": "other"},
        sampling={"max_new_tokens": 7},
    )
    comparison = compare_runs(first, second)
    score, tokens = comparison.differences[:2]
    assert (score.name, score.first_mean, score.second_mean) == ("score", 1.0, 6 / 9)
    assert score.difference.mean == pytest.approx(-3 / 9)
    assert score.difference.low < -3 / 9 < score.difference.high <= 0
    assert (tokens.difference.low, tokens.difference.high, tokens.ratio) == (-400.0, -400.0, 0.5)
    assert (comparison.mcnemar.only_first, comparison.mcnemar.only_second) == (3, 0)
    assert comparison.mcnemar.p_value == pytest.approx(0.25)  # 2 / 2^3
    assert (comparison.num_pairs, comparison.failed_first, comparison.failed_second) == (9, 1, 0)
    assert comparison.num_same_text == 0
    assert comparison.differing_config == {"sampling.max_new_tokens": (128, 7)}
    assert main(["compare", first, second]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == render_comparison(comparison)
    assert "sampling.max_new_tokens: 128 -> 7" in printed


def test_categories_and_flipped_items_are_told_in_words_as_json_and_drawn(tmp_path, model_folder, media, capsys):
    def of_run(right):
        def change(n):
            known = {"category": ("even", "odd")[n % 2], "prompt": f"Which is {n}?", "reference": f"ref {n}"}
            return known | {"score": float(n in right), "text": f"said {n in right}", "answer": None}

        return change

    first = write_run(tmp_path / "a", model_folder, media, change=of_run({0, 1, 2, 3}))
    plan = {"steps": [{"stage": "decoder_input", "reducer": {"kind": "illava", "keep_ratio": 0.5}}]}
    second = write_run(tmp_path / "b", model_folder, media, change=of_run({0, 2, 3, 4, 6}), reduction=plan)
    assert main(["compare", first, second, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    even, odd = said["categories"]["even"], said["categories"]["odd"]
    assert (even["first_mean"], even["second_mean"], even["only_first"], even["only_second"]) == (0.4, 0.8, 0, 2)
    assert (odd["first_mean"], odd["second_mean"], odd["only_first"], odd["only_second"]) == (0.4, 0.2, 1, 0)
    assert [(one["place"], one["scores"]) for one in said["flipped"]] == [(1, [1, 0]), (4, [0, 1]), (6, [0, 1])]
    lost = said["flipped"][0]
    assert (lost["category"], lost["question"], lost["reference"]) == ("odd", "Which is 1?", "ref 1")
    assert lost["texts"] == ["said True", "said False"]
    assert said["differing_config"]["reduction"][1]["steps"][0]["reducer"]["keep_ratio"] == 0.5

    target = tmp_path / "flips.html"
    assert main(["compare", first, second, "--report", str(target)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^even +0\.4 +0\.8 +0\.4 .* 5 +0 +2$", printed, flags=re.MULTILINE)
    assert re.search(
        r"^right in A, wrong in B: 1\n  clip-001.mp4: \[odd\] Which is 1\? \| reference: ref 1", printed, re.M
    )
    assert re.search(r"^wrong in A, right in B: 2$", printed, flags=re.MULTILINE)
    assert '"reducer": {"kind": "illava", "per": "medium", "keep_ratio": 0.5' in printed, "whole, where it differs"
    page = target.read_text()
    assert page.count("<article>") == 3
    assert page.index("A right, B wrong") < page.index("A wrong, B right")
    assert page.count("frames: the model&#39;s preprocessor cannot be loaded here") == 3, (
        "a reason in place of a picture"
    )
    assert "&#34;keep_ratio&#34;: 0.5" in page


def test_configuration_differs_where_it_differs():
    long = {"a": {"same": "x" * 200, "b": [1, {"c": "old"}]}}
    other = {"a": {"same": "x" * 200, "b": [1, {"c": "new"}]}}
    comparison = Comparison(
        "A", "B", 1, 1, 0, 0, 0, 1, (), None, {"task.schema": (long, other), "kept": (None, "y" * 120)}
    )
    lines = render_comparison(comparison).splitlines()
    assert "  task.schema.a.b.1.c: old -> new" in lines
    assert lines[-3:] == ["  kept:", "    A  None", f"    B  {'y' * 120}"]


def test_scores_between_zero_and_one_have_no_mcnemar(tmp_path, model_folder, media):
    uri = write_run(tmp_path / "a", model_folder, media, change=lambda n: {"score": n / 10})
    assert compare_runs(uri, uri).mcnemar is None


def test_runs_without_scores_are_compared_by_what_they_measured(tmp_path, model_folder, media):
    uri = write_run(tmp_path / "a", model_folder, media)
    comparison = compare_runs(uri, uri)
    assert comparison.mcnemar is None
    assert [d.name for d in comparison.differences] == list(MEASURED)


def test_other_manifests_are_refused(tmp_path, model_folder, media, capsys):
    first = write_run(tmp_path / "a", model_folder, media)
    put_media(str(media), 1, start=77)
    second = write_run(tmp_path / "b", model_folder, media)
    with pytest.raises(RefusedError, match=r"different manifests \(10 items, .* 11 items"):
        compare_runs(first, second)
    assert main(["compare", first, second]) == 4
    assert "different manifests" in capsys.readouterr().err


def test_a_run_that_is_not_finished_is_refused(tmp_path, model_folder, media):
    first = write_run(tmp_path / "a", model_folder, media, finished=False)
    with pytest.raises(RefusedError, match="not finished"):
        compare_runs(first, first)


def test_runs_that_share_no_answered_item_are_refused(tmp_path, model_folder, media):
    first = write_run(tmp_path / "a", model_folder, media, change=lambda n: None)
    second = write_run(tmp_path / "b", model_folder, media)
    with pytest.raises(RefusedError, match="no item was answered by both"):
        compare_runs(first, second)


def simulated(scores, media, latencies_s):
    """Columns as of a run with these scores."""
    count = len(scores)
    columns = {name: [1.0] * count for name in MEASURED}
    columns |= {
        "item_id": [str(n) for n in range(count)],
        "uris": [[f"{mm_item}.mp4"] for mm_item in media],
        "status": ["ok"] * count,
        "text": [""] * count,
        "answer": [None] * count,
        "prompt": ["?"] * count,
        "reference": [None] * count,
        "category": [None] * count,
        "fields": [{}] * count,
        "score": list(scores),
        "latency_s": list(latencies_s),
    }
    return RunColumns("run", {"manifest_digest": "same", "recipe": {}, "num_items": count}, columns)


def test_a_seeded_effect_is_covered_in_at_least_90_of_100_simulations():
    # 240 questions on 80 media. The second run is right more rarely by 5 points and slower by 0.2 s; both share how
    # hard a medium is, and media differ in how much they are affected.
    num_media, per_medium, effect, slower_s = 80, 3, -0.05, 0.2
    covered = {"score": 0, "latency_s": 0}
    for seed in range(100):
        generator = np.random.default_rng(seed)
        media = np.repeat(np.arange(num_media), per_medium)
        ease = generator.uniform(0.3, 0.8, num_media)[media]
        affected = effect + generator.uniform(-0.15, 0.15, num_media)[media]
        draw = generator.uniform(size=len(media))
        redraw = np.where(generator.uniform(size=len(media)) < 0.7, draw, generator.uniform(size=len(media)))
        base_s = generator.lognormal(size=len(media))
        drift_s = slower_s + generator.normal(scale=0.3, size=num_media)[media]
        first = simulated((draw < ease).astype(float), media, base_s)
        second = simulated((redraw < ease + affected).astype(float), media, base_s + drift_s)
        found = {d.name: d.difference for d in compare_columns(first, second, seed=seed).differences}
        for name, true_value in (("score", effect), ("latency_s", slower_s)):
            covered[name] += found[name].low <= true_value <= found[name].high
    assert covered["score"] >= 90
    assert covered["latency_s"] >= 90
    assert max(covered.values()) < 100, "an interval that always covers is too wide"
