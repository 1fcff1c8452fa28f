"""Windows of neighbouring frames in every family's tower: still cells are told once, and no window sees another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from illava import VLM, Request, SamplingParams, load_preprocessor
from illava.families.model_shape import load_model_shape
from illava.plan import EMPTY_PLAN, ReductionPlan
from illava.reduction.segments import Segments
from illava.token_counts import VisualShape, expected_counts
from tests.support.closeness import assert_close
from tests.support.models.cells import TOWER_BLOCKS, family_params
from tests.support.models.families import make_folder


def joining(layers, *others, window=2, keep_ratio=0.5, **options) -> ReductionPlan:
    reducer = {"kind": "ward", "window": window, "keep_ratio": keep_ratio}
    steps = [{"stage": "vision_block", "layers": list(layers), "reducer": reducer}, *others]
    return ReductionPlan.model_validate({"steps": steps, **options})


@pytest.fixture(scope="module", params=family_params(TOWER_BLOCKS))
def loaded(request, tmp_path_factory):
    folder = str(make_folder(request.param, tmp_path_factory.mktemp(request.param)))
    return VLM.from_pretrained(folder, kv_cache_bytes=8 << 20), load_preprocessor(folder), folder


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)  # is not resized by any number


def clip_of(pre, seeds):
    """A video of one picture a frame, as the tower counts frames."""
    depth = getattr(pre.geometry, "frames_per_patch", 1)
    return pre.video([picture(seed) for seed in seeds for _ in range(depth)])


@pytest.mark.numeric
@torch.inference_mode()
def test_what_stands_still_is_told_once_a_window_without_loss(loaded):
    vlm, pre, _ = loaded
    image, clip = pre.images([picture(9)])[0], clip_of(pre, [1, 1, 1, 2, 2, 2, 3])
    plan = joining(TOWER_BLOCKS[vlm.family.model_type][:1], window=3, keep_ratio=1 / 3)
    vlm.family.check(plan)
    (whole,), (windows,) = (vlm.family.encode([clip], which, trace=True) for which in (EMPTY_PLAN, plan))
    per_frame = windows.num_patches // 7
    assert 2 * per_frame < windows.num_patches_kept < 2.5 * per_frame
    matrix_KT = windows.trace[0].matrix.to_dense()
    assert_close(matrix_KT.sum(1), torch.ones(len(matrix_KT)))
    same = [(row.nonzero().flatten() % per_frame).unique().numel() for row in matrix_KT[: 2 * per_frame]]
    assert set(same) == {1}, "every token is of one cell, in the three frames of its window"
    still = windows.coord_K3[:, 0] < 6
    slots = windows.placeholder_K[still]
    assert_close(windows.feature_KD[still], whole.feature_KD[slots])
    for ours, theirs in zip(windows.deepstack, whole.deepstack, strict=True):
        assert_close(ours[still], theirs[slots])
    assert sum(count for _, count in windows.frame_counts) == len(windows.placeholder_K)
    ((alone,), (_, beside)) = (vlm.family.encode(media, plan, trace=False) for media in ([clip], [image, clip]))
    assert_close(beside.feature_KD, alone.feature_KD)


@pytest.mark.numeric
@torch.inference_mode()
def test_a_window_is_as_it_is_alone(loaded):
    vlm, pre, _ = loaded
    plan = joining(TOWER_BLOCKS[vlm.family.model_type])
    (both,) = vlm.family.encode([clip_of(pre, range(6))], plan, trace=False)
    parts = [vlm.family.encode([clip_of(pre, own)], plan, trace=False)[0] for own in ((0, 1), (2, 3), (4, 5))]
    parts_KD = torch.cat([part.feature_KD[part.coord_K3[:, 1] >= 0] for part in parts])
    assert_close(both.feature_KD[both.coord_K3[:, 1] >= 0], parts_KD)
    frames = [dict(part.frame_counts) for part in parts]
    assert [count for frame, count in both.frame_counts if frame >= 0] == [own[f] for own in frames for f in (0, 1)]


@pytest.mark.parametrize("stage", ["vision_block", "vision_output"])
def test_counts_before_a_run_are_those_of_the_run_and_a_batch_is_its_items(loaded, stage):
    vlm, pre, folder = loaded
    layers = {"layers": list(TOWER_BLOCKS[vlm.family.model_type])} if stage == "vision_block" else {}
    reducer = {"kind": "ward", "window": 2, "keep_ratio": 0.4}
    later = {"stage": "decoder_input", "reducer": {"kind": "ward", "keep_ratio": 0.5}}
    plan = ReductionPlan.model_validate({"steps": [{"stage": stage, "reducer": reducer, **layers}, later]})
    vlm.family.check(plan)
    image, clip, shape = (
        pre.images([picture(9)])[0],
        pre.video([picture(n) for n in range(10)]),
        load_model_shape(folder),
    )
    contents = {"clip": (clip, "Go"), "image": (image, "What?"), "both": ("A", clip, "then", image, "B")}
    media = {"clip": [VisualShape("video", 32, 32, 10)], "image": [VisualShape("image", 32, 32, 1)]}
    media["both"] = media["clip"] + media["image"]
    given = {"num_vision_blocks": shape.num_vision_blocks, "num_decoder_layers": shape.num_decoder_layers}
    sampling = SamplingParams(max_new_tokens=2, min_new_tokens=2)
    requests = [Request(name, content, sampling, trace=True) for name, content in contents.items()]
    for request, batched in zip(requests, vlm.generate(requests, plan=plan), strict=True):
        (alone,) = vlm.generate([request], plan=plan)
        assert (alone.usage, alone.token_ids) == (batched.usage, batched.token_ids)
        usage, counts = alone.usage, expected_counts(shape.geometry, plan, media[request.request_id], **given)
        assert (counts.num_patches_kept, counts.num_vision_tokens_kept) == (
            usage.num_patches_kept,
            usage.num_vision_tokens_kept,
        ), request.request_id
        assert counts.exact
        assert usage.num_patches_kept < usage.num_patches
        assert alone.trace.matrix().shape == (usage.num_decoder_tokens_kept, usage.num_patches)


@pytest.mark.numeric
@torch.inference_mode()
def test_unmerge_restores_the_grid_behind_windows(loaded):
    vlm, pre, _ = loaded
    clip = clip_of(pre, [1, 1, 2, 2])
    plan = joining(TOWER_BLOCKS[vlm.family.model_type][:1], unmerge={"num_neighbours": 1})
    (whole,), (restored,) = (vlm.family.encode([clip], which, trace=False) for which in (EMPTY_PLAN, plan))
    assert torch.equal(restored.placeholder_K, whole.placeholder_K)
    assert restored.frame_counts == whole.frame_counts
    assert_close(restored.feature_KD, whole.feature_KD)  # of still pairs nothing was lost


def test_segments_join_by_frames_and_stay_larger_windows():
    segments = Segments.of([5, 2, 3], [True, False, True])
    pairs, lengths = segments.join_frames((4,) * 10, 2)
    assert pairs.tiles == ((0, 1), (2, 3), (4,), (0,), (1,), (0, 1), (2,))
    assert lengths == (8, 8, 4, 4, 4, 8, 4)
    assert pairs.select(segments, range(10)) == [0, 2, 4, 5, 6, 7, 9]
    assert pairs.join_frames(lengths, 2) == (pairs, lengths)
    fours, lengths = pairs.join_frames(lengths, 4)
    assert fours.tiles == ((0, 1, 2, 3), (4,), (0,), (1,), (0, 1, 2))
    assert fours.join_frames(lengths, 2) == (fours, lengths)
    dropped = segments.cls_dropped(pairs, (4,) * 10, torch.device("cpu"))
    assert dropped is not None
    assert dropped.tolist() == [5, 15, 40]


def test_windows_in_the_tower_are_refused_where_frames_must_stay_apart():
    with pytest.raises(ValueError, match="layout 'released' re-reads every frame's"):
        joining([1], layout="released")
    merging = {"stage": "vision_block", "layers": [3], "reducer": {"kind": "frame_merging"}}
    with pytest.raises(ValueError, match="put the merging first"):
        joining([1], merging)
