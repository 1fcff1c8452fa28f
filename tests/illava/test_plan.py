"""Plans: the shipped presets against the table of the method, the YAML forms, refusals in words, and the digest."""

from __future__ import annotations

import pytest
import yaml
from pydantic import ValidationError

from benchmarks.accuracy.compared_plans import compared_plans
from illava.errors import PlanError
from illava.plan import EMPTY_PLAN, ReductionPlan, dump_digest, preset
from illava.presets import PRESETS

STEP = {"stage": "vision_block", "layers": [3], "reducer": {"kind": "illava", "num_merged": 4}}


def left_of(num_tokens: int, plan: ReductionPlan) -> int:
    for layer in plan.layers("vision_block"):
        num_tokens = plan.at("vision_block", layer).num_kept(num_tokens)
    return num_tokens


# name: (patches, left of them, vision blocks), (decoder layer, share kept, score), tokens a frame (geometric)
TABLE = {
    "illava-paper": ((729, 361, (3, 4, 5, 6)), (2, 0.70, "paper"), None),
    "illava-image": ((729, 361, (5, 6, 7, 8)), (8, 0.70, "released"), None),
    "illava-video": ((729, 361, (3, 4, 5, 6)), (2, 0.70, "released"), 100),
    "illava-draw": ((729, 169, (2, 3, 4, 5, 6, 7, 8)), (8, 0.50, "released"), None),
    "illava-draw-video": ((729, 169, (2, 3, 4, 5, 6, 7, 8)), (2, 0.50, "released"), 49),
    "illava-next-image": ((576, 288, (5, 6, 7, 8)), (8, 0.70, "released"), None),
    "illava-small": ((196, 100, (2, 3, 4, 5)), (1, 0.70, "released"), None),
    "illava-small-video": ((196, 100, (2, 3, 4, 5)), (1, 0.70, "released"), 25),
}


@pytest.mark.parametrize("layout", ["geometric", "released"])
@pytest.mark.parametrize("name", TABLE)
def test_presets_follow_the_table(name, layout):
    (patches, left, blocks), (decoder, keep, score), per_frame = TABLE[name]
    plan = preset(name, layout=layout)
    assert plan.layout == layout
    assert plan.layers("vision_block") == blocks
    assert left_of(patches, plan) == left
    assert plan.layers("decoder_layer") == (decoder,)
    last = plan.at("decoder_layer", decoder)
    assert (last.keep_ratio, last.score, last.per) == (keep, score, "prompt")
    budget = plan.at("decoder_input")
    if layout == "released" or per_frame is None:
        assert budget is None
    else:
        assert (budget.keep_per_frame, budget.per) == (per_frame, "frame")


# name: vision blocks, share of groups kept by each; decoder layers, share kept by each; method
SHARES = {
    "illava-qwen2-vl": ((12, 13, 14, 15), 0.84, (6, 7, 8), 0.90, "illava"),
    "illava-qwen2.5-vl": ((7, 15, 23), 0.80, (6, 7, 8), 0.90, "illava"),
    "illava-qwen3.5": ((12, 13, 14, 15), 0.84, (4, 8), 0.85, "illava"),
    "illava-2026": ((5, 6, 7, 8), 0.90, (15, 17, 19, 21), 0.85, "illava_2026"),
}


@pytest.mark.parametrize("name", SHARES)
def test_presets_of_native_resolution_follow_the_table(name):
    blocks, vision_keep, layers, decoder_keep, kind = SHARES[name]
    plan = preset(name)
    assert (plan.layers("vision_block"), plan.layers("decoder_layer")) == (blocks, layers)
    for stage, where, keep in (("vision_block", blocks, vision_keep), ("decoder_layer", layers, decoder_keep)):
        for layer in where:
            reducer = plan.at(stage, layer)
            assert (reducer.kind, reducer.keep_ratio) == (kind, keep)
    assert (plan.at("decoder_layer", layers[0]).per, plan.at("decoder_input")) == ("prompt", None)


# name: vision blocks, share kept by all of them, share kept before the LLM
WARD = {
    "ward-image-50": ((6, 8), 0.50, None),
    "ward-image-25": ((6, 8), 0.25, None),
    "ward-video-50": ((6, 8), 0.50, 0.50),
    "ward-video-25": ((6, 8), 0.25, 0.25),
    "ward-qwen2-vl-50": ((13, 15), 0.50, None),
    "ward-qwen2-vl-25": ((13, 15), 0.25, None),
    "ward-qwen2.5-vl-50": ((7, 15, 23), 0.50, None),
    "ward-qwen2.5-vl-25": ((7, 15, 23), 0.25, None),
}


@pytest.mark.parametrize("name", WARD)
def test_wards_presets_keep_their_share_and_tell_the_language_model_sizes(name):
    blocks, keep, decoder_keep = WARD[name]
    plan = preset(name)
    assert plan.layers("vision_block") == blocks
    assert left_of(10_000, plan) == pytest.approx(10_000 * keep, rel=0.01)
    budget = plan.at("decoder_input")
    assert (None if budget is None else budget.keep_ratio) == decoder_keep
    assert budget is None or budget.per == "frame"
    for step in plan.steps:
        assert (step.reducer.contrast, step.reducer.alpha) == (1, 0), "no attention score is asked for"
    assert plan.size_bias
    assert not preset(name, layout="released").size_bias
    assert plan.at("vision_block", blocks[0]).biases_attention


def test_wards_preset_for_documents_leaves_the_tower_whole():
    plan = preset("ward-document")
    assert plan.layers("vision_block") == ()
    assert plan.at("decoder_input").max_merge_error == 0.1
    assert plan.size_bias


PYRAMIDS = {"pyramiddrop": (8, 16, 24), "pyramiddrop-28": (7, 14, 21)}


@pytest.mark.parametrize("name", PYRAMIDS)
def test_pyramiddrop_halves_at_every_quarter_of_the_decoder(name):
    plan = preset(name)
    assert plan.layers("decoder_layer") == PYRAMIDS[name]
    assert {step.stage for step in plan.steps} == {"decoder_layer"}
    left = 576
    for layer in PYRAMIDS[name]:
        left = plan.at("decoder_layer", layer).num_kept(left)
    assert left == 576 // 8


# name: patches left of 196, share of a frame's tokens kept before the LLM; its row in configs/compare_methods.yaml
SMALL_WARD = {
    "ward-small-image-50": (100, None, "ward@50%", 0),
    "ward-small-image-25": (44, None, "ward@25%", 0),
    "ward-small-video-50": (100, 0.51, "ward and ward@50%, clips", 1),
    "ward-small-video-25": (44, 0.26, "ward and ward@25%, clips", 1),
}


@pytest.mark.parametrize("name", SMALL_WARD)
def test_wards_presets_of_the_demo_model_are_the_plans_that_were_measured(name):
    left, decoder_keep, row, side = SMALL_WARD[name]
    plan = preset(name)
    assert left_of(196, plan) == left
    assert (plan.at("decoder_input").keep_ratio if decoder_keep else plan.at("decoder_input")) == decoder_keep
    assert plan.digest() == compared_plans()[f"compare:{row}"][side].digest()


def test_tomes_preset_of_the_demo_model_is_the_plan_that_its_accuracy_was_measured_with():
    steps = (
        "steps: [{stage: vision_block, layers: [2, 3, 4, 5], reducer: {kind: tome, num_merged: 24}}, {stage: "
        "decoder_layer, layers: [2], reducer: {kind: illava, keep_ratio: 0.3, score: causal_normalised, per: prompt}}]"
    )
    assert preset("tome-small-video").digest() == read(steps).digest()


def refuse(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(text)


JOIN = "{stage: vision_block, layers: [%s], reducer: {kind: frame_merging}}"
CUT = "{stage: vision_block, layers: [%s], reducer: {kind: illava, num_merged: 3}}"


def test_frames_are_joined_before_single_cells_go():
    read(f"steps: [{JOIN % '1, 2'}, {CUT % 4}]")
    refuse(f"steps: [{CUT % 1}, {JOIN % 4}]", "'frame_merging' merges frames cell by cell, but 'illava' before it")
    behind = "{stage: vision_output, reducer: {kind: frame_merging}}"
    refuse(f"steps: [{CUT % 1}, {behind}]", "put the merging first")
    read(f"{{unmerge: {{}}, steps: [{CUT % 1}, {behind}]}}")  # the cells are all back by then


def test_unmerge_needs_a_true_grid_and_something_to_undo():
    plan = read(f"{{unmerge: {{kind: knn_delta, num_neighbours: 2}}, steps: [{CUT % 1}]}}")
    assert plan.unmerge.num_neighbours == 2
    assert plan.digest() != read(f"steps: [{CUT % 1}]").digest()
    assert read("{preset: illava-image, unmerge: {}}").unmerge.num_neighbours == 4
    refuse("{unmerge: {}}", "restores what vision_block steps drop")
    gives_up = "the true grid, which layout 'released' gives up"
    refuse(f"{{layout: released, unmerge: {{}}, steps: [{CUT % 1}]}}", gives_up)


def test_size_bias_is_for_plans_that_merge_on_a_true_grid():
    plan = read(f"{{size_bias: true, steps: [{CUT % 1}]}}")
    assert plan.size_bias
    assert plan.digest() != read(f"steps: [{CUT % 1}]").digest()
    assert read(f"{{size_bias: false, steps: [{CUT % 1}]}}").digest() == read(f"steps: [{CUT % 1}]").digest()
    assert read("{preset: illava-image, size_bias: true}").size_bias
    refuse("{size_bias: true}", "the plan merges nothing: leave it out")
    refuse(f"{{layout: released, size_bias: true, steps: [{CUT % 1}]}}", "which layout 'released' gives up")
    refuse("{budget: auto, epsilon: 0.2, size_bias: true}", "layout and size_bias out")


def test_digests_of_plans_written_before_size_bias_stay():
    before = {"layout": "geometric", "unmerge": None, "budget": None, "epsilon": None, "steps": []}
    assert EMPTY_PLAN.digest() == dump_digest(before)


def test_nothing_given_beside_a_preset_is_dropped():
    refuse("{preset: illava-image, budget: auto, epsilon: 0.2}", "chooses the steps itself")
    refuse("{preset: illava-image, layuot: released}", "layuot")


def test_proportional_attention_is_for_blocks_of_the_tower():
    tome = "reducer: {kind: tome, num_merged: 3, proportional_attention: true}"
    read(f"steps: [{{stage: vision_block, layers: [1], {tome}}}]")
    refuse(f"steps: [{{stage: decoder_layer, layers: [1], {tome}}}]", "the decoder's cache holds keys of")
    refuse(f"steps: [{{stage: vision_output, {tome}}}]", "behind 'vision_output' there are none")
    read("steps: [{stage: vision_output, reducer: {kind: ward, num_merged: 3}}]")  # on where it can be, unasked
    ward = "reducer: {kind: ward, num_merged: 3, proportional_attention: true}"
    read(f"steps: [{{stage: vision_block, layers: [1], {ward}}}]")
    refuse(f"steps: [{{stage: vision_output, {ward}}}]", "behind 'vision_output' there are none")


def test_every_preset_is_in_the_table_and_geometric_unless_asked():
    assert set(PRESETS) == {*TABLE, *SHARES, *PYRAMIDS, *WARD, *SMALL_WARD, "ward-document", "none", "tome-small-video"}
    assert {preset(name).layout for name in PRESETS} == {"geometric"}
    assert preset("none") == EMPTY_PLAN


def read(text: str) -> ReductionPlan:
    return ReductionPlan.model_validate(yaml.safe_load(text))


def test_yaml_forms():
    assert read("{preset: illava-video}") == preset("illava-video")
    assert read("{preset: illava-video, layout: released}") == preset("illava-video", layout="released")
    assert read("{}") == read("{steps: []}") == read("{preset: null}") == EMPTY_PLAN
    written = read(
        """
        layout: geometric
        steps:
          - {stage: vision_block,  layers: [5, 6, 7, 8], reducer: {kind: illava, num_merged: 92}}
          - {stage: decoder_layer, layers: [8],
             reducer: {kind: illava, keep_ratio: 0.70, score: released, per: prompt}}
        """
    )
    assert written == preset("illava-image")
    assert ReductionPlan.model_validate_json(written.model_dump_json()) == written


def test_places():
    plan = preset("illava-video")
    assert plan.at("vision_block", 3).num_merged == 92
    assert plan.at("vision_block", 7) is None
    assert plan.at("vision_output") is None
    assert EMPTY_PLAN.layers("vision_block") == ()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"steps": [STEP, STEP]}, "two reduction steps at vision_block 3"),
        ({"steps": [{**STEP, "stage": "decoder_input", "layers": []}] * 2}, "two reduction steps at decoder_input"),
        ({"steps": [{**STEP, "stage": "decoder_layer", "layers": [0, 2]}]}, "first possible layer is 1"),
        ({"steps": [{**STEP, "stage": "decoder_input"}]}, r"'decoder_input' takes no `layers`; got \[3\]"),
        ({"steps": [{**STEP, "layers": []}]}, "'vision_block' needs `layers`"),
        ({"steps": [{**STEP, "layers": [5, 4]}]}, "ascending"),
        ({"steps": [{**STEP, "layers": [4, 4]}]}, "distinct"),
        ({"steps": [{**STEP, "layers": [-1]}]}, "not negative"),
        ({"steps": [{**STEP, "stage": "media", "layers": []}]}, "cannot act at stage 'media'; it can at: decoder_"),
        ({"preset": "illava-vidio"}, "no preset named 'illava-vidio'; the presets are: illava-2026, illava-draw"),
        ({"preset": "illava-video", "steps": [STEP]}, "either `preset` or `steps`, not both"),
        ({"steps": [{**STEP, "reducer": {"kind": "illava", "num_merged": 4, "keep_ratio": 0.5}}]}, "exactly one of"),
        ({"steps": [{**STEP, "reducer": {"kind": "illava"}}]}, "exactly one of .* got none"),
        ({"steps": [{**STEP, "reducer": {"kind": "illava", "num_merged": 0}}]}, "greater than or equal to 1"),
        ({"steps": [{**STEP, "reducer": {"kind": "illava", "keep_ratio": 1.0}}]}, "less than 1"),
        ({"layout": "square"}, "'geometric' or 'released'"),
        ({"step": []}, "Extra inputs are not permitted"),
    ],
)
def test_refused_in_words(plan, message):
    with pytest.raises(ValidationError, match=message):
        ReductionPlan.model_validate(plan)


def test_preset_call_raises_plan_error():
    with pytest.raises(PlanError, match="no preset named 'x'"):
        preset("x")


def test_frame_budget_refuses_another_scope():
    step = {"stage": "decoder_input", "reducer": {"kind": "illava", "keep_per_frame": 9, "per": "prompt"}}
    with pytest.raises(ValidationError, match="leave `per` out or set it to frame"):
        ReductionPlan.model_validate({"steps": [step]})


def test_digest_is_stable():
    # Written into every row and into run fingerprints: a change here makes old runs unresumable. Say so in CHANGELOG.
    assert preset("illava-video").digest() == "889fde3ae0855bbe"
    frames = "steps: [{{stage: media, reducer: {{kind: fewer_frames, keep_ratio: 0.5{}}}}}]"
    assert read(frames.format("")).digest() == "53b94c30e5be6f71" != read(frames.format(", by: packets")).digest()
    assert read("{preset: illava-video, layout: geometric}").digest() == preset("illava-video").digest()


def test_digest_changes_exactly_with_the_plan():
    base = {"steps": [STEP]}
    changed = [
        {**base, "layout": "released"},
        {"steps": [{**STEP, "layers": [4]}]},
        {"steps": [{**STEP, "layers": [3, 4]}]},
        {"steps": [{**STEP, "reducer": {"kind": "illava", "num_merged": 5}}]},
        {"steps": [{**STEP, "reducer": {"kind": "illava", "num_merged": 4, "score": "released"}}]},
        {"steps": [{**STEP, "reducer": {"kind": "illava", "num_merged": 4, "per": "prompt"}}]},
        {"steps": [{**STEP, "stage": "decoder_layer"}]},
        {},
    ]
    digests = [ReductionPlan.model_validate(plan).digest() for plan in [base, *changed]]
    assert len(set(digests)) == len(digests)
    assert ReductionPlan.model_validate(base).digest() == digests[0]
    presets = {preset(name, layout=layout).digest() for name in PRESETS for layout in ("geometric", "released")}
    assert len(presets) == 2 * len(PRESETS) - 1  # the small model's two plans are one in the released layout
