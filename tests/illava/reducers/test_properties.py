"""What every registered reducer must satisfy, whatever its formula."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from illava.plan import ReductionPlan
from illava.reducers import REDUCERS, Evidence
from illava.tokens import Tokens, merge, pad, unpad
from tests.support.closeness import assert_close
from tests.support.reducer_cases import ADAPTER, CONFIGS, assign_each, build, dense, ragged, segments

PRUNING = {"attention_pruning", "fastv", "random", "uniform_stride", "divprune", "scope", "vidcom2", "evs"}
PRUNING |= {"fewer_frames", "lower_resolution", "pixel_prune", "pixel_dedup", "clip_crop", "clipseg_crop"}
PRUNING |= {"free_videollm", "pyramiddrop"}
SHAPES_DECIDE = {"greedy", "pooling", "prumerge", "vidcom2", "frame_merging", "fewer_frames", "pixel_prune"}
SHAPES_DECIDE |= {"flashvid", "pixel_dedup", "clip_crop", "clipseg_crop", "free_videollm", "bounded_error"}
cases = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(str(v) for v in c.values()))


def check_valid(reducer, tokens, assignment):
    expected = [reducer.num_kept(n) for n in tokens.lengths]
    if None not in expected:
        assert assignment.lengths == tuple(expected)
    assert assignment.num_tokens == sum(tokens.lengths)
    assert assignment.num_kept == sum(assignment.lengths)
    kept_K = assignment.kept_K
    assert kept_K.dtype == torch.int64
    assert (kept_K.diff() > 0).all()
    segment_T = torch.arange(len(tokens.lengths)).repeat_interleave(torch.tensor(tokens.lengths))
    segment_K = torch.arange(len(tokens.lengths)).repeat_interleave(torch.tensor(assignment.lengths))
    assert torch.equal(segment_T[kept_K], segment_K)
    assert len(set(assignment.target_G.tolist())) == len(assignment.target_G)
    assert assignment.size_G.sum() == len(assignment.source_E) == len(assignment.weight_E)
    assert (assignment.size_G > 0).all()
    row_E = assignment.target_G.repeat_interleave(assignment.size_G)
    assert torch.equal(segment_T[assignment.source_E], segment_K[row_E])
    if assignment.group_size is not None:
        assert (assignment.size_G == assignment.group_size).all()
    matrix_KT = dense(assignment)
    assert (matrix_KT[torch.arange(len(kept_K)), kept_K] > 0).all(), "a token must be part of what stands at its place"
    if reducer.kind in PRUNING:
        assert torch.equal(matrix_KT, torch.eye(assignment.num_tokens)[kept_K])
    elif reducer.kind == "prumerge":
        assert (matrix_KT.sum(1) >= 1 - 1e-6).all()
    else:
        assert_close(matrix_KT.sum(1), torch.ones(len(kept_K)))


@cases
def test_assignment_is_valid_and_ordered(config):
    reducer, stage = build(config)
    for seed, missing in ((0, 0.0), (1, 0.3)):
        tokens, evidence = ragged(seed, missing=missing)
        check_valid(reducer, tokens, reducer.assign(tokens, evidence, stage))


@cases
def test_something_is_reduced(config):
    reducer, stage = build(config)
    tokens, evidence = ragged(2)
    takes_cells = reducer.resolution == 1  # else fewer pixels, and of the cells that are left all
    assert (reducer.assign(tokens, evidence, stage).num_kept < sum(tokens.lengths)) == takes_cells


@pytest.mark.numeric
@cases
def test_a_batch_is_its_segments_alone(config):
    reducer, stage = build(config)
    tokens, evidence = ragged(3, missing=0.2)
    together = assign_each(reducer, tokens, evidence, stage)
    for block, (own_tokens, own_evidence) in zip(together, segments(tokens, evidence), strict=True):
        assert_close(block, dense(reducer.assign(own_tokens, own_evidence, stage)))


@pytest.mark.numeric
@cases
def test_equal_lengths_are_no_special_case(config):
    reducer, stage = build(config)
    tokens, evidence = ragged(4, ((2, 3, 4),) * 3)
    together = assign_each(reducer, tokens, evidence, stage)
    for block, (own_tokens, own_evidence) in zip(together, segments(tokens, evidence), strict=True):
        assert_close(block, dense(reducer.assign(own_tokens, own_evidence, stage)))


@cases
def test_the_same_call_gives_the_same_answer(config):
    reducer, stage = build(config)
    tokens, evidence = ragged(5)
    first, second = (reducer.assign(tokens, evidence, stage) for _ in range(2))
    assert torch.equal(first.kept_K, second.kept_K)
    assert torch.equal(dense(first), dense(second))


@cases
def test_blank_media_are_reduced_too(config):
    """Identical and all-zero tokens: nothing but ties, and cosines of nothing."""
    reducer, stage = build(config)
    tokens, evidence = ragged(6)
    for value in (0.0, 1.0):
        measured = [n for n in evidence.__slots__ if n not in ("seeds", "size_T")]
        flat = Evidence(
            **{n: torch.full_like(getattr(evidence, n), value) for n in measured},
            seeds=evidence.seeds,
        )
        blank = Tokens(torch.full_like(tokens.hidden_TD, value), tokens.lengths, tokens.coord_T3)
        check_valid(reducer, blank, reducer.assign(blank, flat, stage))


@cases
def test_half_precision_tokens(config):
    reducer, stage = build(config)
    tokens, evidence = ragged(7)
    half = Tokens(tokens.hidden_TD.bfloat16(), tokens.lengths, tokens.coord_T3)
    assignment = reducer.assign(half, replace(evidence, keys_THd=evidence.keys_THd.bfloat16()), stage)
    check_valid(reducer, half, assignment)
    assert merge(assignment, half.hidden_TD).dtype == torch.bfloat16


@cases
def test_training_works_after_inference(config):
    """Gradients reach every token that counts, with indices that an inference-mode call may have cached."""
    reducer, stage = build(config)
    tokens, evidence = ragged(13, ((1, 3, 7), (2, 2, 5)))
    with torch.inference_mode():
        reducer.assign(tokens, evidence, stage)
    hidden_TD = tokens.hidden_TD.requires_grad_()
    assignment = reducer.assign(Tokens(hidden_TD.detach(), tokens.lengths, tokens.coord_T3), evidence, stage)
    merge(assignment, hidden_TD).sum().backward()
    assert_close(hidden_TD.grad[:, 0], dense(assignment).sum(0))
    unpad(pad(hidden_TD, tokens.lengths, 0.0), tokens.lengths).sum().backward()


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor))])
        return made


@cases
def test_no_map_of_all_pairs(config):
    """Greedy and SCOPE compare all pairs by their formula, FlashVID a frame's, Ward those of up to 1,024 tokens."""
    reducer, stage = build(config)
    tokens, evidence = ragged(11, ((1, 30, 30),))
    with LargestTensor() as largest:
        reducer.assign(tokens, evidence, stage)
    assert (largest.numel >= 900 * 900) == (reducer.kind in {"greedy", "scope", "ward", "flashvid"})


@cases
def test_fixed_counts_wait_for_no_device(config):
    """Fake tensors have no values: whatever would copy one to the host fails."""
    reducer, stage = build(config)
    tokens, evidence = ragged(12, missing=0.2)
    assignment = reducer.assign(tokens, evidence, stage)  # fills the caches of host-made indices
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {n: mode.from_tensor(getattr(evidence, n)) for n in evidence.__slots__ if n != "seeds"}
        fake_tokens = Tokens(mode.from_tensor(tokens.hidden_TD), tokens.lengths, mode.from_tensor(tokens.coord_T3))
        arguments = fake_tokens, Evidence(**fake, seeds=evidence.seeds), stage
        if reducer.kind in SHAPES_DECIDE or config.get("threshold") or config.get("max_merge_error"):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                reducer.assign(*arguments)
        else:
            shape = merge(reducer.assign(*arguments), fake_tokens.hidden_TD).shape
            assert shape == (assignment.num_kept, tokens.hidden_TD.shape[1])


def test_another_seed_draws_other_tokens():
    reducer, stage = build({"kind": "random", "keep_ratio": 0.5})
    tokens, evidence = ragged(9)
    other = replace(evidence, seeds=tuple(s + 1 for s in evidence.seeds))
    assert not torch.equal(reducer.assign(tokens, evidence, stage).kept_K, reducer.assign(tokens, other, stage).kept_K)


def test_reducers_ask_only_for_evidence_they_read():
    """With every other kind of evidence missing, `assign` still works; with its own missing it says so."""
    for config in CONFIGS:
        reducer, stage = build(config)
        tokens, evidence = ragged(10)
        fields = {"keys": "keys_THd", "sizes": "size_T", "seed": "seeds"}
        asked = {fields.get(kind, f"{kind}_T") for kind in reducer.evidence(stage)}
        only = Evidence(**{name: getattr(evidence, name) for name in asked})
        assert torch.equal(dense(reducer.assign(tokens, only, stage)), dense(reducer.assign(tokens, evidence, stage)))
        if asked - {"size_T"}:
            with pytest.raises(RuntimeError, match="asked for"):
                reducer.assign(tokens, Evidence(), stage)


def test_unknown_kind_lists_the_kinds():
    def refuse(reducer):
        with pytest.raises(ValidationError) as caught:
            ReductionPlan.model_validate({"steps": [{"stage": "vision_block", "layers": [3], "reducer": reducer}]})
        return str(caught.value)

    message = refuse({"kind": "fastvv", "keep_ratio": 0.5})
    assert "no reducer of kind 'fastvv'; did you mean 'fastv'?" in message
    assert all(kind in message for kind in REDUCERS)
    assert "needs a `kind`" in refuse({"keep_ratio": 0.5})
    assert "num_mergd" in refuse({"kind": "tome", "num_mergd": 3})
    assert "exactly one of num_merged" in refuse({"kind": "tome"})
    assert "exactly one of keep_ratio, threshold" in refuse({"kind": "evs"})


def test_a_plan_survives_yaml_and_back():
    for config in CONFIGS:
        reducer, _ = build(config)
        assert ADAPTER.validate_python(reducer.model_dump(mode="json")) == reducer


def test_importing_reducers_leaves_torch_alone():
    code = "import sys, illava.reducers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
