"""The comparison of all methods: no method is missing, tokens are equal, and random weights are refused."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from benchmarks.accuracy import accuracy
from benchmarks.accuracy.compared_plans import about, compared_plans, left_out
from benchmarks.accuracy.report import scope_notes
from benchmarks.accuracy.sweep_plans import plan_named
from benchmarks.common.random_onevision import make_random_onevision
from illava import VLM, Request, SamplingParams, load_preprocessor
from illava.errors import RandomWeightsError
from illava.families.model_shape import load_model_shape
from illava.plan import ReductionPlan
from illava.reducers import REDUCERS
from illava.token_counts import VisualShape, expected_counts


def test_every_registered_method_is_compared_or_left_out_with_a_reason() -> None:
    """Else add a row (or a reason) to configs/compare_methods.yaml."""
    plans = [plan for pair in compared_plans().values() for plan in pair]
    kinds = {step.reducer.kind for plan in plans for step in plan.steps}
    assert kinds | left_out().keys() == REDUCERS.keys()
    assert not kinds & left_out().keys()


WHOLE = {0: 406, 1: 8 * 49 + 1}  # a picture's tokens with its newlines, a clip's of eight frames


def sides_at_a_share() -> Iterator[tuple[str, int, ReductionPlan, float]]:
    """(name, 0 for pictures or 1 for clips, plan, share) of all rows that promise equal tokens to the language model.

    A clip's frames have their grids restored behind the tower: cut there alone, all its tokens go on.
    """
    for name, pair in compared_plans().items():
        share = next((share for share in (0.5, 0.25, 0.12) if f"@{share:.0%}" in name), None)
        if share is not None:
            for side, plan in enumerate(pair):
                whole_frames = all(
                    step.stage.startswith("vision") and step.reducer.kind != "frame_merging" for step in plan.steps
                )
                restored = side == 1 and whole_frames and plan.layout == "geometric"
                if plan.steps:
                    yield name, side, plan, 1.0 if restored else share


@pytest.mark.long
def test_rows_of_one_share_keep_equal_tokens_as_measured() -> None:
    vlm = VLM.from_pretrained(str(accuracy.MODEL), dtype="float32", device="cpu", kv_cache_bytes=16 << 20)
    preprocessor, rng = load_preprocessor(str(accuracy.MODEL)), np.random.default_rng(0)
    frames = rng.integers(0, 256, (8, 112, 112, 3), dtype=np.uint8)
    media = {0: preprocessor.images(frames[:1])[0], 1: preprocessor.video(frames)}
    for name, side, plan, share in sides_at_a_share():
        (done,) = vlm.generate([Request("x", (media[side], "What?"), SamplingParams(max_new_tokens=1))], plan=plan)
        assert done.error is None, (name, side)
        assert done.usage.num_decoder_tokens_kept / WHOLE[side] == pytest.approx(share, abs=0.04), (name, side)


def test_rows_of_one_share_keep_equal_tokens_as_counted() -> None:
    shape = load_model_shape(str(accuracy.MODEL))
    media = {0: VisualShape("image", 112, 112), 1: VisualShape("video", 112, 112, num_frames=8)}
    num_counted = 0
    for name, side, plan, share in sides_at_a_share():
        mm_item = media[side]
        counts = expected_counts(
            shape.geometry,
            plan,
            [mm_item],
            num_vision_blocks=shape.num_vision_blocks,
            num_decoder_layers=shape.num_decoder_layers,
        )
        if counts.exact:  # else the data decide: measured in the long suite
            num_counted += 1
            assert counts.num_decoder_tokens_kept / WHOLE[side] == pytest.approx(share, abs=0.04), (name, side)
    assert num_counted > 8


def test_the_bundled_model_accepts_every_plan() -> None:
    family = VLM.from_pretrained(str(accuracy.MODEL), dtype="float32", device="cpu", kv_cache_bytes=1 << 20).family
    for name, pair in compared_plans().items():
        for clip in (False, True):
            family.check(plan_named(name, clip=clip))
            assert plan_named(name, clip=clip) == pair[clip]
    with pytest.raises(SystemExit, match=r"compare_methods\.yaml"):
        plan_named("compare:nothing")


def test_the_layouts_differ_in_nothing_but_the_layout() -> None:
    for side in (0, 1):
        released, geometric = (compared_plans()[f"compare:illava@50%{end}"][side] for end in (", layout released", ""))
        assert (released.layout, geometric.layout) == ("released", "geometric")
        towers = [[step for step in plan.steps if step.stage == "vision_block"] for plan in (released, geometric)]
        assert towers[0] == towers[1]


def test_what_is_left_out_stands_under_the_table_with_its_reason() -> None:
    notes = "\n".join(scope_notes({"compared": about(), "left_out": left_out()}))
    assert len(left_out()) == 4
    assert all(f"`{kind}` is not among them: {reason}" in notes for kind, reason in left_out().items())
    assert scope_notes({}) == []


def test_a_model_of_random_weights_is_refused_with_the_reason(tmp_path) -> None:
    folder = make_random_onevision(tmp_path / "random", "tiny")
    with pytest.raises(RandomWeightsError, match="random weights say nothing about quality"):
        accuracy.main(["--model", str(folder), "--plans", "compare", "--work-dir", str(tmp_path / "work")])
    assert not (tmp_path / "work").exists()
