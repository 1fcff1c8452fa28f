"""Tests that all that an input holds is accounted for in one sum, wherever the sum is said.

Takes 2 s of the five minutes.
"""

from __future__ import annotations

import json

import pytest

from pipeline.errors import InputError
from pipeline.inputs.build_manifest import build_manifest
from pipeline.inputs.input_counts import InputCounts
from pipeline.inputs.manifest import manifest_bytes, read_manifest
from pipeline.inspection.status import render_status, run_status
from pipeline.planning.dry_run import _size
from pipeline.runs.run import open_run, plan_run
from pipeline.storage import storage
from tests.support.runs.run_folders import complete

NAMES = ["a.mp4", "b.mp4", "c.MP4", "d.mov", "deep/e.mp4", "deep/f.Mp4", "g.txt", "h.jpg", "README", "i.mp4.part"]


@pytest.fixture
def media(root):
    """A prefix with media, other files, and names that differ in case."""
    for name in NAMES:
        storage.write_atomic(storage.join(root, "in", name), name.encode())
    return storage.join(root, "in")


def adds_up(counts: InputCounts, num_listed: int) -> bool:
    return counts.num_listed == num_listed == sum(count for count, _ in counts.terms())


@pytest.mark.parametrize("pattern", ["**/*", "**/*.mp4", "*.mp4", "**/*.[mM][pP]4", "deep/*", "**/*.mov", "[a-c].*"])
@pytest.mark.parametrize("limit", [None, 1])
def test_the_terms_add_up_to_what_was_listed(config, media, pattern, limit):
    manifest = build_manifest(config(input={"uri": media, "pattern": pattern, "limit": limit}))
    assert adds_up(manifest.counts, len(NAMES))
    assert manifest.counts.num_items == len(manifest)
    assert read_manifest(manifest_bytes(manifest)).counts == manifest.counts


def test_what_the_pattern_keeps_out_is_counted_and_case_is_named(config, media):
    counts = build_manifest(config(input={"uri": media, "pattern": "**/*.mp4"})).counts
    assert counts.outside_pattern[".MP4"] == counts.outside_pattern[".Mp4"] == 1
    assert counts.num_other_case == 2
    total, case = counts.lines()
    assert total.startswith("10 in the input = 3 items + 7 outside input.pattern (")
    assert case.startswith("2 of them lie outside input.pattern by upper and lower case alone")
    both = build_manifest(config(input={"uri": media, "pattern": "**/*.[mM][pP]4"}))
    assert (len(both), both.counts.num_other_case) == (5, 0)
    with pytest.raises(
        InputError, match=r"no objects; 10 files \(.*lie outside the pattern, 1 by upper and lower case"
    ):
        build_manifest(config(input={"uri": media, "pattern": "**/*.JPG"}))


def test_the_second_nights_sum_has_what_the_first_did(config, root, media):
    dataset = storage.join(root, "captions")

    def night(number, **changes):
        output = {"uri": storage.join(dataset, f"night-{number}")}
        return config(input={"uri": media, "exclude_runs": dataset, **changes}, output=output)

    complete(open_run(night(1, pattern="**/*.mp4", limit=2)))
    run = open_run(night(2, limit=2))
    assert adds_up(run.manifest.counts, len(NAMES))
    assert [words for _, words in run.manifest.counts.terms()][1:3] == ["done by earlier runs", "over input.limit"]
    said = "10 in the input = 2 items + 2 done by earlier runs + 3 over input.limit + 3 of no known media extension"
    assert said in run.manifest.counts.lines()[0]
    assert said in render_status(run_status(run.uri))
    assert plan_run(night(2, limit=2)).manifest.counts == run.manifest.counts


def test_a_manifests_rows_add_up_and_unknown_sizes_are_no_zero(config, root):
    uri = storage.join(root, "m.jsonl")
    rows = [{"uri": f"s3://bucket/{n}.mp4"} | ({"size": 2000} if n == 4 else {}) for n in range(5)]
    storage.write_atomic(uri, "\n".join(map(json.dumps, rows[:4])).encode())
    manifest = build_manifest(config(input={"manifest": uri, "limit": 3}))
    assert adds_up(manifest.counts, 4)
    assert _size(manifest) == "3 of unknown size"
    storage.write_atomic(uri, "\n".join(map(json.dumps, rows)).encode())
    assert _size(build_manifest(config(input={"manifest": uri}))) == "2 kB and 4 of unknown size"
