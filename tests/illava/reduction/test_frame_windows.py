"""Windows of neighbouring frames before the language model: what joins, how much stays, and what is counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from illava import VLM, Request, SamplingParams, load_preprocessor
from illava.families.model_shape import load_model_shape
from illava.plan import ReductionPlan
from illava.reducers import Evidence, Ward
from illava.reduction.scopes import VisualCounts, planned_lengths
from illava.token_counts import VisualShape, expected_counts
from illava.tokens import Tokens
from illava.visual_tokens import TokenSpan
from tests.support.closeness import assert_close
from tests.support.models.families import make_folder
from tests.support.reducer_cases import dense

RAGGED = {"stage": "vision_output", "reducer": {"kind": "ward", "max_merge_error": 0.3}}


def windows(window: int = 2, *before: dict, stage: str = "decoder_input", **budget) -> ReductionPlan:
    reducer = {"kind": "ward", "window": window, **(budget or {"keep_ratio": 0.4})}
    step = {"stage": stage, "reducer": reducer} | ({"layers": [1]} if stage == "decoder_layer" else {})
    return ReductionPlan.model_validate({"steps": [*before, step]})


def still_and_moving(pre, num_frames: int, *, frames_per_patch: int = 1):
    """A clip of one noisy picture, in which a square goes from left to right; every third frame is blank."""
    still = np.random.default_rng(5).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    frames = [still.copy() for _ in range(num_frames)]
    for n, frame in enumerate(frames):
        frame[8:20, min(3 * n, 28) : 3 * n + 12] = (255, 0, 0)
        if n // frames_per_patch % 3 == 1:
            frame[:] = 90
    return pre.video(frames)


@pytest.fixture(scope="module", params=["llava_onevision", "qwen2_5_vl"])
def loaded(request, tmp_path_factory):
    folder = str(make_folder(request.param, tmp_path_factory.mktemp(request.param)))
    return VLM.from_pretrained(folder, kv_cache_bytes=8 << 20), load_preprocessor(folder), folder


@pytest.mark.numeric
def test_tokens_join_within_their_window_as_if_it_were_alone(loaded):
    vlm, pre, _ = loaded
    before = (RAGGED,) if vlm.family.model_type == "qwen2_5_vl" else ()  # the other restores every frame's grid
    depth = getattr(pre.geometry, "frames_per_patch", 1)
    clip = still_and_moving(pre, 8 * depth, frames_per_patch=depth)
    plan = windows(3, *before)
    whole = vlm.family.encode([clip], plan, trace=False)[0]
    request = Request("clip", ("See", clip, "go"), SamplingParams(max_new_tokens=2, min_new_tokens=2), trace=True)
    (done,) = vlm.generate([request], plan=plan)
    (step,) = [step for step in done.trace.steps if step.stage == "decoder_input"]
    matrix_KT, frame_T = step.matrix.to_dense(), whole.coord_K3[:, 0].clone()
    frame_T[whole.coord_K3[:, 1] < 0] = -1
    ragged = len({int((frame_T == f).sum()) for f in frame_T.unique() if f >= 0}) > 1
    assert ragged == bool(before)
    rank_T = torch.searchsorted(frame_T.unique()[frame_T.unique() >= 0], frame_T)
    reducer, slow, total = plan.at("decoder_input"), torch.zeros_like(matrix_KT), 0
    for window in (0, 1, 2):
        (index_N,) = ((rank_T // 3 == window) & (frame_T >= 0)).nonzero(as_tuple=True)
        own = Tokens(whole.feature_KD[index_N], (len(index_N),), whole.coord_K3[index_N])
        alone = dense(reducer.assign(own, Evidence(), "decoder_input"))
        assert len(alone) == round(0.4 * len(index_N))
        slow[total : total + len(alone), index_N] = alone
        total += len(alone)
        if window < 2:
            assert any(len(frame_T[row > 0].unique()) > 1 for row in slow[:total]), "still tokens join across frames"
    for separator in (frame_T < 0).nonzero().flatten().tolist():
        slow[total, separator] = 1.0
        total += 1
    assert_close(matrix_KT, slow)
    assert done.usage.num_vision_tokens_kept == total


def test_counts_before_a_run_are_those_of_the_run_and_a_batch_is_its_items(loaded):
    vlm, pre, folder = loaded
    stage = "decoder_layer" if vlm.family.model_type == "qwen2_5_vl" else "decoder_input"
    picture = np.random.default_rng(6).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    image, clip, shape = pre.images([picture])[0], still_and_moving(pre, 10), load_model_shape(folder)
    contents = {"clip": (clip, "Go"), "image": (image, "What?"), "both": ("A", clip, "then", image, "B")}
    sampling = SamplingParams(max_new_tokens=2, min_new_tokens=2)
    requests = [Request(name, content, sampling) for name, content in contents.items()]
    plan = windows(2, stage=stage)
    media = {"clip": [VisualShape("video", 40, 40, 10)], "image": [VisualShape("image", 64, 48, 1)]}
    media["both"] = media["clip"] + media["image"]
    given = {"num_vision_blocks": shape.num_vision_blocks, "num_decoder_layers": shape.num_decoder_layers}
    for request, batched in zip(requests, vlm.generate(requests, plan=plan), strict=True):
        (alone,) = vlm.generate([request], plan=plan)
        assert alone.usage == batched.usage
        assert alone.token_ids == batched.token_ids
        expected = expected_counts(shape.geometry, plan, media[request.request_id], **given)
        assert expected.num_decoder_tokens_kept == alone.usage.num_decoder_tokens_kept, request.request_id
        assert expected.exact
        assert alone.usage.num_decoder_tokens_kept < alone.usage.num_vision_tokens


def test_frames_without_tokens_are_not_counted_and_what_has_no_frame_stays():
    video = [TokenSpan(n, 0, 0, frame) for frame, n in enumerate((4, 0, 4, 2))]
    spans = [TokenSpan(3), *video, TokenSpan(1, 0, 0, -1), TokenSpan(2), TokenSpan(9, 1, 1, -1)]
    reducer = Ward(keep_ratio=0.5, window=2)
    counts = VisualCounts.of([spans])
    assert counts.knows(reducer)
    chosen = counts.select(reducer)
    assert chosen.lengths == (8, 2, 9)  # frames 0 and 2; frame 3; an image without frames
    assert chosen.scope_of_span == (-1, 0, -1, 0, 1, -1, -1, 2)
    plan = ReductionPlan.model_validate({"steps": [{"stage": "decoder_input", "reducer": reducer}]})
    assert planned_lengths(spans, plan, 2) == [3 + 4 + 1 + 1 + 2 + 4] * 2
    left = counts.reduced(chosen, [4, 1, 4])
    assert left.knows(reducer)
    assert not left.knows(Ward(keep_ratio=0.5, per="frame"))


def test_a_ceiling_holds_in_the_scope_that_per_names_and_bounds_what_is_reserved(loaded):
    vlm, pre, _ = loaded
    rng = np.random.default_rng(7)
    first, second = (pre.images([rng.integers(0, 256, (64, 48, 3), dtype=np.uint8)])[0] for _ in range(2))
    request = Request("both", (first, "and", second, "?"), SamplingParams(max_new_tokens=2, min_new_tokens=2))
    for per, kept in (("prompt", 5), ("medium", 10)):
        reducer = {"kind": "ward", "max_merge_error": 0.01, "max_tokens": 5, "per": per}
        plan = ReductionPlan.model_validate({"steps": [{"stage": "decoder_input", "reducer": reducer}]})
        (done,) = vlm.generate([request], plan=plan)
        assert done.usage.num_vision_tokens_kept == kept
    spans = [TokenSpan(3), TokenSpan(20, 0, 0, 0), TokenSpan(4, 1, 0, 0)]
    assert planned_lengths(spans, plan, 1) == [3 + 5 + 4]


def test_windows_are_refused_where_nothing_is_ranked_so():
    for wrong in ({"per": "frame"}, {"per": "prompt"}, {"keep_per_frame": 4, "keep_ratio": None}):
        with pytest.raises(ValueError, match="leave `per`, or `keep_per_frame`, or `window` out"):
            Ward.model_validate({"keep_ratio": 0.5, "window": 2, **wrong})
