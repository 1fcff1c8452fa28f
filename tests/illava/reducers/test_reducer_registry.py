"""What holds for the registry as a whole: nothing untested, keep-all is the identity, groups stay whole."""

from __future__ import annotations

import inspect
import pkgutil

import pytest
import torch

import illava.reducers
from illava.reducers import REDUCERS, Evidence
from illava.reduction.patch_groups import group_evidence, group_tokens, spread
from illava.tokens import Tokens, gather_kept, merge
from tests.support.closeness import assert_close
from tests.support.reducer_cases import CONFIGS, build, dense, ragged

# How each method is told to keep everything; those with `keep_per_frame` have that.
KEEP_ALL = {
    "pooling": {"grid": [99, 99]},
    "vidcom2": {"keep_ratio": 0.9999},
    "evs": {"keep_ratio": 0.9999},
    "flashvid": {"keep_ratio": 0.9999},
    "pyramiddrop": {"keep_ratio": 0.9999},
    "fewer_frames": {"num_frames": 99},
    "lower_resolution": {"keep_ratio": 0.5},  # takes pixels, never cells
    "pixel_prune": {"skip_padding": False},  # of noise
    "pixel_dedup": {},  # of noise
    "bounded_error": {"epsilon": 1e-6},
}
ALWAYS_TAKES = {"prumerge", "frame_merging", "clip_crop", "clipseg_crop", "free_videollm"}
PER_FRAME = {kind: {"keep_per_frame": 10_000} for kind, cls in REDUCERS.items() if "keep_per_frame" in cls.model_fields}


def test_every_method_is_registered_tested_and_sourced():
    modules = {m.name for m in pkgutil.iter_modules(illava.reducers.__path__)}
    assert set(REDUCERS) == modules - {"base", "budget", "proportional", "ops", "out_of_tree"}
    assert {c["kind"] for c in CONFIGS} == set(REDUCERS)
    for kind, cls in REDUCERS.items():
        text = inspect.getdoc(inspect.getmodule(cls)) + inspect.getdoc(cls)
        assert "Source: " in text, f"{kind} names no source"
        assert cls.stages


def test_every_method_can_keep_all_or_is_known_to_take_something():
    assert PER_FRAME.keys() | KEEP_ALL.keys() | ALWAYS_TAKES == REDUCERS.keys()


@pytest.mark.parametrize("kind", sorted(PER_FRAME.keys() | KEEP_ALL.keys()))
def test_keeping_all_is_the_identity(kind):
    reducer, stage = build({"kind": kind, **(KEEP_ALL.get(kind) or PER_FRAME.get(kind, {}))})
    tokens, evidence = ragged(8)
    assignment = reducer.assign(tokens, evidence, stage)
    assert torch.equal(dense(assignment), torch.eye(sum(tokens.lengths)))
    assert torch.equal(merge(assignment, tokens.hidden_TD), tokens.hidden_TD)


def grouped(seed: int) -> tuple[Tokens, Evidence]:
    """Patches of 2 x 2 groups, the four of a group side by side."""
    groups, _ = ragged(seed)
    corner_P3 = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]).repeat(sum(groups.lengths), 1)
    coord_P3 = groups.coord_T3.repeat_interleave(4, 0) * torch.tensor([1, 2, 2]) + corner_P3
    _, evidence = ragged(seed, ((1, 1, 4 * sum(groups.lengths)),))
    lengths = tuple(4 * n for n in groups.lengths)
    own = Evidence(
        attention_received_T=evidence.attention_received_T,
        cls_attention_T=evidence.cls_attention_T,
        keys_THd=evidence.keys_THd,
        size_T=torch.ones(len(coord_P3)),
        seeds=tuple(range(len(lengths))),
    )
    return Tokens(torch.randn(len(coord_P3), 5, generator=torch.Generator().manual_seed(seed)), lengths, coord_P3), own


IN_TOWER = [c for c in CONFIGS if REDUCERS[c["kind"]].stages & {"vision_block", "vision_output"}]


@pytest.mark.parametrize("config", IN_TOWER, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_groups_stay_whole(config):
    reducer, _ = build(config)
    stage = "vision_block" if "vision_block" in reducer.stages else "vision_output"
    patches, evidence = grouped(15)
    of_groups = reducer.assign(group_tokens(patches, 2), group_evidence(evidence, 2), stage)
    of_patches = spread(of_groups, 2)
    assert of_patches.lengths == tuple(4 * n for n in of_groups.lengths)
    assert_close(dense(of_patches), torch.kron(dense(of_groups), torch.eye(4)))
    coord_K43 = gather_kept(of_patches, patches.coord_T3).view(-1, 4, 3)
    assert torch.equal(coord_K43[..., 1:] // 2, (coord_K43[:, :1, 1:] // 2).expand(-1, 4, -1))
