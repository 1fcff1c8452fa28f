"""Reduces tokens in a family's vision tower: in a block between attention and MLP, and after the last block.

The module computes the evidence that a reducer asks for and nothing else, keeps the assignments that the layout after
the tower needs, checks that no configured step was a no-op, and turns assignments into trace steps. Knows no tower, no
layout and no reducer by name.

- A CLS token, where a tower has one, leads every segment. It is a query and a key of the scored attention like any
  other token: attention received is the mean over all queries of the segment, CLS included. No reducer sees it, so it
  is never merged, dropped or counted. It is dropped behind the last block, before ``vision_output``.
- ``vision_output`` uses the last block's evidence (attention received, keys). A token merged there keeps the value of
  its own position.
- Sizes count the patches (or groups) that were merged into a token since the tower's first step; the decoder counts
  anew.
- If a tower's merger joins square groups of patches, reducers see whole groups as their tokens
  (`illava.reduction.patch_groups`).
- A method that merges frames sees a video's frames as one segment; afterwards each merged frame is a segment.
- A method with windows of frames sees each window as one segment, and so does all that follows: a token that was merged
  across frames is a key and a query for every frame of its window, as its sources were for theirs.
- Under proportional attention (ToMe) every block behind the first such step attends with `key_bias_T`, the log size,
  and is scored with it.
- Under the plan's ``unmerge`` the whole grid is restored behind the last block (`illava.reduction.unmerge`).

Shape suffixes: T tokens packed end to end, P patches among them (all of them without CLS), K kept tokens, D channels,
H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from illava.attention.scores import attention_received, one_query_attention
from illava.errors import ReductionDidNotFireError
from illava.host_copies import constant_on
from illava.plan import ReductionPlan
from illava.reducers import Evidence, EvidenceKind, Reducer, Stage
from illava.reduction.patch_groups import among_all, group_evidence, group_tokens, only_patches, patch_index, spread
from illava.reduction.probe import AttentionProbe
from illava.reduction.segments import Segments, starts
from illava.reduction.trace import PackedTrace, VisionStep, media_traces
from illava.reduction.unmerge import Unmerging
from illava.requests import TraceStep, derive_seed
from illava.tokens import Assignment, Tokens, embed_in_batch, gather_kept, merge, merged_sizes

# What a block's attention gives; the rest is kept from step to step.
_OF_BLOCK: frozenset[EvidenceKind] = frozenset({"attention_received", "cls_attention", "keys"})

_State = tuple[tuple[int, ...], Tensor, Segments, Tensor | None, Sequence[int] | None, list[VisionStep]]


class VisionReduction:
    """Carries out the reductions of one packed call of a tower.

    Attributes:
        lengths: tokens per segment as they are now, CLS included while it is there: what attention runs over.
        coord_T3: int64 (tile, row, col) of the patches as they are now.
        score_T: float32 attention received in the last block by the patches as they are now; None before that block,
            and where no later stage of the plan asks for it.
        segments: which tile or frame each segment is.
        steps: the reductions since the grid was last whole, in order.
        key_bias_T: float32 log size of the tokens as they are now, CLS included; None where attention has no bias.
        noop_steps: by visual input, the steps that removed nothing from it, in words.
    """

    def __init__(
        self,
        plan: ReductionPlan,
        lengths: tuple[int, ...],
        coord_T3: Tensor,
        *,
        num_blocks: int,
        has_cls: bool = False,
        group_side: int = 1,
        seeds: Sequence[int] | None = None,
        segments: Segments | None = None,
        probe: AttentionProbe | None = None,
    ) -> None:
        """Begin a packed call.

        Args:
            plan: its ``vision_block`` and ``vision_output`` steps act here.
            lengths: patches per segment.
            coord_T3: int64 (tile, row, col) of every patch.
            num_blocks: blocks of the tower.
            has_cls: a CLS token leads every segment; it is not in ``lengths`` or ``coord_T3``.
            group_side: patches per side of a group that is kept or merged as a whole; its patches lie side by side.
            seeds: an integer per segment, the root of what reducers draw there; see `illava.reduction.segments`.
            segments: the tiles or frames that they are; None: tiles of one image.
            probe: is given every block's attention.
        """
        self.segments = segments or Segments.of([len(lengths)], [False])
        self.key_bias_T: Tensor | None = None
        self.noop_steps: list[list[str]] = [[] for _ in self.segments.videos]
        self._trace: list[PackedTrace] = []
        self._unmerging = None if plan.unmerge is None else Unmerging(plan.unmerge.num_neighbours, group_side)
        self.lengths = tuple(n + has_cls for n in lengths)
        self.coord_T3 = coord_T3
        self.score_T: Tensor | None = None
        self.steps: list[VisionStep] = []
        self._plan, self._has_cls, self._group_side, self._seeds = plan, has_cls, group_side, seeds
        self._cls_score_T: Tensor | None = None
        self._keys_THd: Tensor | None = None
        of_tower = [step for step in plan.steps if step.stage in ("vision_block", "vision_output")]
        sized = any(s.reducer.biases_attention or "sizes" in s.reducer.evidence(s.stage) for s in of_tower)
        self._size_T = torch.ones(sum(lengths), device=coord_T3.device) if sized else None
        self._last_block, self._probe = num_blocks - 1, probe
        later: tuple[Stage, ...] = ("vision_output", "decoder_input")
        self._entered = self._state()
        self._later = _OF_BLOCK & {kind for stage in later for kind in _asked(plan.at(stage), stage)}

    def at(
        self, block: int, hidden_TD: Tensor, q_THd: Tensor, k_THd: Tensor, *, scale: float, lse_HT: Tensor | None = None
    ) -> Tensor:
        """Reduce inside a block, after attention and its residual, before the MLP's norm: [T, D] -> [K, D].

        Args:
            block: 0-based.
            hidden_TD: residual stream with this block's attention added.
            q_THd, k_THd: queries and keys of this block's attention.
            scale, lse_HT: factor of its scores, and their log-sum-exps where the attention gave them.

        Raises:
            ReductionDidNotFireError: a step is configured here and removed nothing.
        """
        if self._probe is not None:
            received_T = attention_received(q_THd, k_THd, self.lengths, scale=scale)
            self._probe("vision_block", block, only_patches(self._patch_index(hidden_TD.device), received_T))
        reducer = self._plan.at("vision_block", block)
        here, later = _asked(reducer, "vision_block"), self._later if block == self._last_block else frozenset()
        if reducer is None and not later:
            return hidden_TD
        patch_P = self._patch_index(hidden_TD.device)
        score_T = cls_score_T = None
        if "attention_received" in here | later:
            received_T = attention_received(
                q_THd, k_THd, self.lengths, scale=scale, key_bias_T=self.key_bias_T, lse_HT=lse_HT
            )
            score_T = only_patches(patch_P, received_T)
        if "cls_attention" in here | later:
            of_cls_T = one_query_attention(q_THd, k_THd, self.lengths, query=0, scale=scale, key_bias_T=self.key_bias_T)
            cls_score_T = only_patches(patch_P, of_cls_T)
        keys_THd = only_patches(patch_P, k_THd) if "keys" in here | later else None
        if later:
            self.score_T, self._cls_score_T, self._keys_THd = score_T, cls_score_T, keys_THd
        if reducer is None:
            return hidden_TD
        evidence = Evidence(attention_received_T=score_T, keys_THd=keys_THd, cls_attention_T=cls_score_T)
        return self._reduce(reducer, "vision_block", block, hidden_TD, evidence)

    def asks(self, block: int) -> bool:
        """Whether `at` needs this block's queries and keys; otherwise it need not be called."""
        measured_later = block == self._last_block and bool(self._later)
        return measured_later or self._plan.at("vision_block", block) is not None or self._probe is not None

    def after_tower(self, hidden_TD: Tensor) -> Tensor:
        """Drop CLS, unmerge and reduce at ``vision_output`` where configured; check that every step of the tower ran.

        Raises:
            ReductionDidNotFireError: a configured block was never run, or a step removed nothing.
        """
        hidden_TD = only_patches(self._patch_index(hidden_TD.device), hidden_TD)
        self.lengths, self._has_cls = self._num_patches, False
        missing = set(self._plan.layers("vision_block")) - {step.block for step in self.steps}
        if missing:
            raise ReductionDidNotFireError(
                f"vision_block steps at {sorted(missing)} did not run: the tower ended before them. Run "
                "`family.check(plan)` first; it names the blocks there are"
            )
        if self._unmerging is not None:
            hidden_TD = self._unmerge(self._unmerging, hidden_TD)
        reducer = self._plan.at("vision_output")
        if reducer is not None:
            evidence = Evidence(
                attention_received_T=self.score_T, keys_THd=self._keys_THd, cls_attention_T=self._cls_score_T
            )
            hidden_TD = self._reduce(reducer, "vision_output", None, hidden_TD, evidence)
        return hidden_TD

    @property
    def unmerges(self) -> bool:
        """Whether the plan restores the grid behind the last block."""
        return self._plan.unmerge is not None

    def unmerged(self, hidden_TD: Tensor) -> Tensor:
        """Restore the whole grid of the present patches, for deepstack; without ``unmerge`` returns them as given."""
        return hidden_TD if self._unmerging is None else self._unmerging.restore(hidden_TD)

    def trace(self) -> list[tuple[TraceStep, ...]]:
        """The steps as sparse matrices on the host, separately for each visual input."""
        return media_traces(self._trace, len(self.segments.videos))

    def _reduce(
        self, reducer: Reducer, stage: Stage, block: int | None, hidden_TD: Tensor, evidence: Evidence
    ) -> Tensor:
        num_patches, patch_P = self._num_patches, self._patch_index(hidden_TD.device)
        scopes = self._scopes(reducer)
        patches = Tokens(only_patches(patch_P, hidden_TD), scopes, self.coord_T3)
        groups = group_tokens(patches, self._group_side)
        evidence = self._with_history(evidence, reducer, stage, block)
        of_groups = reducer.assign(groups, group_evidence(evidence, self._group_side), stage)
        where = f"{reducer.kind!r} at {stage if block is None else f'{stage} {block}'}"
        if of_groups.num_kept >= of_groups.num_tokens and not self._may_keep_all(reducer, groups.lengths):
            raise ReductionDidNotFireError(
                f"reducer {where} removed none of {of_groups.num_tokens} tokens ({groups.lengths[0]} in the first "
                f"{'video or ' if reducer.merges_frames else ''}tile); lower its budget or leave the step out"
            )
        segments = self.segments
        kept_PD = self._take(stage, block, hidden_TD, of_groups, reducer)
        if not reducer.may_keep_all:
            self._note_noop(reducer, where, segments.of_media(num_patches))
        if self._unmerging is not None and stage == "vision_block":
            after_PD = only_patches(self._patch_index(hidden_TD.device), kept_PD)
            self._unmerging.add(of_groups, groups.lengths, patches.hidden_TD, after_PD)
        if self._size_T is not None and (reducer.biases_attention or self.key_bias_T is not None):
            self.key_bias_T = self._log_sizes(self._size_T, kept_PD.shape[0])
        return kept_PD

    def _log_sizes(self, size_P: Tensor, num_tokens: int) -> Tensor:
        """Log size of every token: [P] -> [T]; a window's CLS token stands for those of all its frames."""
        bias_T = among_all(self._patch_index(size_P.device), size_P.log(), num_tokens)
        if self._has_cls and self.segments.are_windows:
            frames = constant_on([len(own) for own in self.segments.tiles], size_P.device, torch.float32)
            bias_T[constant_on(starts(self.lengths)[:-1], size_P.device)] = frames.log()
        return bias_T

    def _scopes(self, reducer: Reducer) -> tuple[int, ...]:
        """Patches of what a method sees as one segment each."""
        if reducer.merges_frames:
            return self.segments.scopes(self._num_patches)
        if reducer.frames_in_window is not None:
            return self.segments.join_frames(self._num_patches, reducer.frames_in_window)[1]
        return self._num_patches

    def _take(
        self, stage: Stage, block: int | None, hidden_TD: Tensor, of_groups: Assignment, reducer: Reducer
    ) -> Tensor:
        """Apply an assignment to everything that is kept from step to step."""
        before, num_patches, patch_P = self.segments, self._num_patches, self._patch_index(hidden_TD.device)
        assignment = spread(of_groups, self._group_side)
        lengths = assignment.lengths
        if reducer.merges_frames:
            self.segments, lengths = before.merge_frames(num_patches, lengths, reducer.frames_kept)
        elif reducer.frames_in_window is not None:
            self.segments, _ = before.join_frames(num_patches, reducer.frames_in_window)
        if self.segments is not before:
            self._seeds = self.segments.select(before, self._seeds)
        self.lengths = tuple(n + self._has_cls for n in lengths)
        self.coord_T3 = gather_kept(assignment, self.coord_T3)
        of_last_block = (self.score_T, self._cls_score_T, self._keys_THd)
        self.score_T, self._cls_score_T, self._keys_THd = (
            None if value_T is None else gather_kept(assignment, value_T) for value_T in of_last_block
        )
        if self._size_T is not None:
            self._size_T = merged_sizes(assignment, self._size_T)
        self.steps.append(VisionStep(stage, block, assignment, of_groups, num_patches, self.coord_T3))
        counts = before.of_media(num_patches), self.segments.of_media(lengths)
        self._trace.append(PackedTrace(stage, block, assignment.matrix, self.coord_T3, *counts))
        if patch_P is None:
            return merge(assignment, hidden_TD)
        dropped_X = before.cls_dropped(self.segments, num_patches, hidden_TD.device)
        return merge(
            embed_in_batch(assignment, patch_P, hidden_TD.shape[0], self.lengths, dropped_X=dropped_X), hidden_TD
        )

    def _unmerge(self, unmerging: Unmerging, hidden_TD: Tensor) -> Tensor:
        """Restore the grid that entered the blocks; a cell takes the evidence of the kept token it follows most."""
        before = self.segments.of_media(self.lengths)
        self.score_T, self._cls_score_T, self._keys_THd = (
            None if value_T is None else unmerging.followed(value_T)
            for value_T in (self.score_T, self._cls_score_T, self._keys_THd)
        )
        hidden_TD = unmerging.restore(hidden_TD)
        self.lengths, self.coord_T3, self.segments, self._size_T, self._seeds, self.steps = self._entered
        after, self._unmerging = self.segments.of_media(self.lengths), None
        self._trace.append(PackedTrace("unmerge", None, unmerging.matrix, self.coord_T3, before, after))
        return hidden_TD

    def _state(self) -> _State:
        """The state that unmerging restores."""
        return self._num_patches, self.coord_T3, self.segments, self._size_T, self._seeds, list(self.steps)

    def _note_noop(self, reducer: Reducer, where: str, tokens_before: tuple[int, ...]) -> None:
        """Note the visual inputs that lost nothing. Prompt assembly checks whether a whole request lost nothing."""
        left = self.segments.of_media(self._num_patches)
        for mm_index, (had, has) in enumerate(zip(tokens_before, left, strict=True)):
            own = [n // self._group_side**2 for n in self.segments.counts(mm_index, self._num_patches)]
            if had == has and not self._may_keep_all(reducer, own):
                self.noop_steps[mm_index].append(where)

    def _with_history(self, evidence: Evidence, reducer: Reducer, stage: Stage, block: int | None) -> Evidence:
        """Add sizes, and a seed for every segment and step, to a block's evidence where the reducer asks for them."""
        kinds, seeds = reducer.evidence(stage), None
        if "seed" in kinds and self._seeds is not None:
            seeds = tuple(derive_seed(root, stage, block or 0) for root in self._seeds)
        return replace(evidence, size_T=self._size_T if "sizes" in kinds else None, seeds=seeds)

    def _may_keep_all(self, reducer: Reducer, lengths: Sequence[int]) -> bool:
        """Whether it is no error to keep all these groups.

        A method may drop redundant tokens only. And pictures of native resolution may have too few groups for a budget
        to remove one of them, which no check of the plan could have known.
        """
        too_small = self._group_side > 1 and all(reducer.num_kept(length) == length for length in lengths)
        return reducer.may_keep_all or too_small

    @property
    def _num_patches(self) -> tuple[int, ...]:
        """Patches per segment as they are now."""
        return tuple(n - self._has_cls for n in self.lengths)

    def _patch_index(self, device: torch.device) -> Tensor | None:
        """Indices of the patches among the packed tokens: int64 [P]; None where all tokens are patches."""
        return patch_index(self.lengths, device) if self._has_cls else None


def _asked(reducer: Reducer | None, stage: Stage) -> frozenset[EvidenceKind]:
    return frozenset() if reducer is None else reducer.evidence(stage)
