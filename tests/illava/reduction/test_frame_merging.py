"""Merging frames in every family's tower: equal frames lose nothing, kept tokens keep their coordinates, and an
image alone is refused.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from illava import VLM, Request, SamplingParams, load_preprocessor
from illava.errors import PlanError, ReductionDidNotFireError
from illava.families import FAMILIES
from illava.families.model_shape import load_model_shape
from illava.plan import EMPTY_PLAN, ReductionPlan
from illava.token_counts import VisualShape, expected_counts
from tests.support.closeness import assert_close
from tests.support.models.cells import TOWER_BLOCKS, family_params
from tests.support.models.families import make_folder


def merging(layers, *others, num_frames=2, **options) -> ReductionPlan:
    join = {"kind": "frame_merging", "num_frames": num_frames}
    steps = [{"stage": "vision_block", "layers": list(layers), "reducer": join}, *others]
    return ReductionPlan.model_validate({"steps": steps, **options})


@pytest.fixture(scope="module", params=family_params(TOWER_BLOCKS))
def loaded(request, tmp_path_factory):
    folder = str(make_folder(request.param, tmp_path_factory.mktemp(request.param)))
    return VLM.from_pretrained(folder, kv_cache_bytes=8 << 20), load_preprocessor(folder), folder


def picture(seed, height=40, width=40):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def still_pairs(vlm, pre, count):
    """A video of ``count`` pairs of equal frames, as the tower counts frames."""
    same = 2 * getattr(pre.geometry, "frames_per_patch", 1)
    return pre.video([picture(seed) for seed in range(count) for _ in range(same)])


@pytest.mark.numeric
@torch.inference_mode()
def test_equal_neighbours_are_joined_without_loss_where_they_stood(loaded):
    vlm, pre, _ = loaded
    image, clip = pre.images([picture(9)])[0], still_pairs(vlm, pre, 3)
    plan = merging(TOWER_BLOCKS[vlm.family.model_type][:1])
    vlm.family.check(plan)
    (whole_image, whole), (image_again, merge_frames) = (
        vlm.family.encode([image, clip], which, trace=True) for which in (EMPTY_PLAN, plan)
    )
    assert_close(image_again.feature_KD, whole_image.feature_KD)
    assert image_again.noop_steps == ("'frame_merging' at vision_block " + str(plan.steps[0].layers[0]),)
    assert merge_frames.noop_steps == ()
    place, frames = merge_frames.coord_K3[merge_frames.coord_K3[:, 1] >= 0], [0, 2, 4]
    assert place[:, 0].unique().tolist() == frames
    assert merge_frames.num_placeholders == whole.num_placeholders
    slots = merge_frames.placeholder_K
    assert torch.equal(merge_frames.coord_K3, whole.coord_K3[slots])  # nothing was dropped there: slots are tokens
    assert_close(merge_frames.feature_KD, whole.feature_KD[slots])
    for ours, theirs in zip(merge_frames.deepstack, whole.deepstack, strict=True):
        assert_close(ours, theirs[slots])
    counts = [count for frame, count in merge_frames.frame_counts if frame >= 0 and count]
    assert len(counts) == 3
    assert sum(count for _, count in merge_frames.frame_counts) == len(slots)
    matrix = merge_frames.trace[0].matrix.to_dense()
    assert_close(matrix.sum(1), torch.ones(len(matrix)))
    assert ((matrix > 0).sum(1) == 2).all()


def test_a_request_without_a_video_is_refused_alone_and_in_a_batch(loaded):
    vlm, pre, _ = loaded
    image, clip = pre.images([picture(9)])[0], still_pairs(vlm, pre, 2)
    short = pre.video([picture(1)])
    sampling = SamplingParams(max_new_tokens=2, min_new_tokens=2)
    contents = {
        "image": (image, "What?"),
        "both": (clip, "and", image),
        "clip": (clip, "Go"),
        "one frame": (short, "?"),
    }
    requests = [Request(name, content, sampling) for name, content in contents.items()]
    plan = merging(TOWER_BLOCKS[vlm.family.model_type][:1])
    together = vlm.generate(requests, plan=plan, errors="return")
    for request, batched in zip(requests, together, strict=True):
        (alone,) = vlm.generate([request], plan=plan, errors="return")
        assert type(alone.error) is type(batched.error)
        refused = request.request_id in ("image", "one frame")
        assert isinstance(alone.error, ReductionDidNotFireError) == refused, request.request_id
        if not refused:
            assert (alone.token_ids, alone.usage) == (batched.token_ids, batched.usage)
            assert alone.usage.num_vision_tokens_kept < alone.usage.num_vision_tokens


def test_two_joins_and_a_cut_behind_them_count_as_expected(loaded):
    vlm, pre, folder = loaded
    cut = {"stage": "vision_output", "reducer": {"kind": "uniform_stride", "keep_ratio": 0.5}}
    plan = merging(TOWER_BLOCKS[vlm.family.model_type], cut)
    clip, shape = pre.video([picture(n) for n in range(11)]), load_model_shape(folder)
    request = Request("clip", (clip, "Go"), SamplingParams(max_new_tokens=2, min_new_tokens=2), trace=True)
    (done,) = vlm.generate([request], plan=plan)
    assert done.error is None
    given = {"num_vision_blocks": shape.num_vision_blocks, "num_decoder_layers": shape.num_decoder_layers}
    counts = expected_counts(shape.geometry, plan, [VisualShape("video", 40, 40, 11)], **given)
    usage = done.usage
    assert counts.exact
    assert (counts.num_patches, counts.num_vision_tokens) == (usage.num_patches, usage.num_vision_tokens)
    assert counts.num_patches_kept == usage.num_patches_kept < usage.num_patches
    assert (counts.num_vision_tokens_kept, counts.num_decoder_tokens_kept) == (
        usage.num_vision_tokens_kept,
        usage.num_decoder_tokens_kept,
    )
    matrix = done.trace.matrix()
    assert matrix.shape == (usage.num_decoder_tokens_kept, usage.num_patches)


def test_the_released_layout_merges_frames_too(onevision_folder):
    vlm, pre = (
        VLM.from_pretrained(str(onevision_folder), kv_cache_bytes=8 << 20),
        load_preprocessor(str(onevision_folder)),
    )
    cut = {"stage": "vision_block", "layers": [4], "reducer": {"kind": "illava", "num_merged": 24}}
    plan = merging([2], cut, layout="released")
    vlm.family.check(plan)
    with torch.inference_mode():
        (encoded,) = vlm.family.encode([pre.video([picture(n) for n in range(5)])], plan, trace=True)
    assert encoded.frame_counts == ((0, 9), (2, 9), (4, 9), (-1, 1))
    assert encoded.placeholder_K.tolist() == list(range(28))
    assert encoded.num_placeholders == 28


def test_a_family_of_images_refuses(tmp_path):
    vlm = VLM.from_pretrained(str(make_folder("llava_next", tmp_path)), kv_cache_bytes=8 << 20)
    with pytest.raises(PlanError, match="merges a video's frames, but this model reads images only"):
        vlm.family.check(merging([1]))
    assert set(FAMILIES) == {*TOWER_BLOCKS, "llava_next"}
