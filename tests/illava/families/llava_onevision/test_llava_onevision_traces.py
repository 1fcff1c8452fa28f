"""LLaVA-OneVision's scores for later stages, its traces, and counts that differ from tile to tile."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import interpolate

from illava.errors import PlanError
from illava.plan import ReductionPlan
from tests.support.closeness import assert_close
from tests.support.models.onevision_tower import GRID, clip, encode_one, picture, plan, projected, tower_kept_tokens

pytestmark = pytest.mark.numeric

# Scores for decoder_input


@pytest.mark.parametrize("layout", ["geometric", "released"])
def test_scores_follow_the_layout_and_never_offer_a_separator(family, preprocessor, monkeypatch, layout):
    from illava.reduction import vision

    seen = []
    real = vision.attention_received

    def spy(*args, **kwargs):
        seen.append(real(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(vision, "attention_received", spy)
    mm_item, which = preprocessor.video(clip(2)), plan(layout, budget={"keep_ratio": 0.5})
    encoded = encode_one(family, mm_item, which)
    assert len(seen) == 5  # four merges and the last block
    last = seen[-1]
    assert last.shape == (50,)
    assert_close(last.view(2, 25).sum(1), torch.ones(2))
    assert encoded.score_K.dtype == torch.float32
    assert math.isinf(encoded.score_K[-1])
    assert encoded.score_K[:-1].isfinite().all()
    if layout == "released":
        grid = last.view(2, 1, 5, 5)
    else:
        _, _, representative = tower_kept_tokens(family, mm_item, which)
        cells = [representative[f, r, c] for f in range(2) for r in range(GRID) for c in range(GRID)]
        grid = last[cells].view(2, 1, GRID, GRID)
    side = math.ceil(grid.shape[-1] / 2)
    assert_close(encoded.score_K[:-1], interpolate(grid, size=(side, side), mode="bilinear").flatten())


def test_scores_are_computed_only_when_asked_for(family, preprocessor):
    (mm_item,) = preprocessor.images([picture(60, 60)])
    assert encode_one(family, mm_item, plan()).score_K is None
    asked = ReductionPlan(steps=[{"stage": "decoder_input", "reducer": {"kind": "illava", "keep_ratio": 0.5}}])
    encoded = encode_one(family, mm_item, asked)
    separators = encoded.coord_K3[:, 1] < 0
    assert torch.equal(encoded.score_K.isinf(), separators)
    assert encoded.feature_KD.shape[0] == encoded.num_placeholders


def test_vision_output_reduces_by_the_last_blocks_attention(family, preprocessor):
    mm_item = preprocessor.video(clip(2))
    steps = [
        {"stage": "vision_block", "layers": [7], "reducer": {"kind": "illava", "num_merged": 9}},
        {"stage": "vision_output", "reducer": {"kind": "illava", "num_merged": 4}},
    ]
    encoded = encode_one(family, mm_item, ReductionPlan(layout="released", steps=steps), trace=True)
    assert [(step.stage, step.layer, step.matrix.shape[0]) for step in encoded.trace] == [
        ("vision_block", 7, 80),
        ("vision_output", None, 72),
        ("layout", None, 19),
    ]


# Traces


@pytest.mark.parametrize("layout", ["geometric", "released"])
@pytest.mark.parametrize("kind", ["image", "over budget", "several", "video"])
def test_the_trace_tells_what_every_token_is_made_of(family, preprocessor, tight, layout, kind):
    if kind == "over budget":
        _, family, preprocessor = tight
    media = {
        "image": lambda: preprocessor.images([picture(60, 150)]),
        "over budget": lambda: preprocessor.images([picture(100, 150)]),
        "several": lambda: preprocessor.images([picture(60, 60), picture(60, 80)]),
        "video": lambda: [preprocessor.video(clip(2)), preprocessor.video(clip(3))],
    }[kind]()
    which = plan(layout)
    for encoded, mm_item in zip(family.encode(media, which, trace=True), media, strict=True):
        assert [(step.stage, step.layer) for step in encoded.trace] == [
            *(("vision_block", block) for block in (2, 3, 4, 5)),
            ("layout", None),
        ]
        size, into_tower = encoded.num_patches, torch.eye(encoded.num_patches)
        for step in encoded.trace:
            assert step.matrix.shape[1] == size
            assert step.coords.shape == (step.matrix.shape[0], 4)
            size = step.matrix.shape[0]
        for step in encoded.trace[:-1]:
            assert_close(step.matrix.to_dense().sum(1), torch.ones(step.matrix.shape[0]))
            into_tower = step.matrix.to_dense() @ into_tower
        # in the tower every patch ends in exactly one kept token, which stands at a place of its own content
        assert ((into_tower > 0).sum(0) == 1).all()
        layout_step = encoded.trace[-1]
        separators = layout_step.coords[:, 2] < 0
        sums = layout_step.matrix.to_dense().sum(1)
        assert_close(sums, (~separators).float())
        assert torch.equal(layout_step.coords[:, 1:], encoded.coord_K3)
        # the matrix applied to the projected kept tokens gives the features
        mixed = layout_step.matrix.to_dense() @ projected(family, mm_item, which)
        assert_close(mixed[~separators], encoded.feature_KD[~separators])
        assert encoded.patch_coord_P4.shape == (encoded.num_patches, 4)


def test_without_a_trace_none_is_recorded(family, preprocessor):
    encoded = encode_one(family, preprocessor.video(clip(1)), plan())
    assert encoded.trace == ()
    assert encoded.patch_coord_P4 is None


# Counts may differ from tile to tile


@pytest.mark.parametrize("layout", ["geometric", "released"])
def test_counts_that_differ_between_tiles(family, preprocessor, layout):
    steps = [
        {"stage": "vision_block", "layers": [3], "reducer": {"kind": "prumerge", "saliency": "attention_received"}}
    ]
    which = ReductionPlan(layout=layout, steps=steps)
    if layout == "released":
        with pytest.raises(PlanError, match="depends on the picture"):
            family.check(which)
        return
    family.check(which)
    media = [preprocessor.images([picture(60, 150)])[0], preprocessor.video(clip(3))]
    together = family.encode(media, which, trace=True)
    assert len({int(n) for n in torch.bincount(together[0].trace[0].coords[:, 1])}) > 1
    for encoded, mm_item in zip(together, media, strict=True):
        alone = encode_one(family, mm_item, which)
        assert_close(encoded.feature_KD, alone.feature_KD)
        assert torch.equal(encoded.placeholder_K, alone.placeholder_K)
