"""The reduction call that a family's vision tower makes: in a block between attention and MLP, and after the last one.

Computes the evidence a reducer asks for and nothing else, keeps the assignments that the layout after the tower needs,
checks that every configured step fired, and turns assignments into trace steps. Knows no tower, no layout and no
reducer by name.

Where a tower has a CLS token, it leads every segment: it is a query and a key of the scored attention like any other
token (attention received is the mean over all queries of the segment, CLS included), but no reducer sees it, so it is
never merged, dropped or counted. It leaves behind the last block, before ``vision_output``. What ``vision_output``
measures (attention received, keys) is the last block's; a token merged there keeps the value of its own place.

Sizes count the patches (or groups) that a token stands for since the tower's first step; the decoder counts anew.

Where a tower's merger joins square groups of patches, reducers see whole groups as their tokens (`illava.groups`).

Shape suffixes: T tokens packed end to end, P patches among them (all of them without CLS), K kept tokens, D channels,
H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from illava.errors import ReductionDidNotFireError
from illava.groups import group_evidence, group_tokens, spread
from illava.plan import ReductionPlan
from illava.reducers import Evidence, EvidenceKind, Reducer, Stage
from illava.requests import TraceStep
from illava.sampling import derive_seed
from illava.scores import attention_received, one_query_attention
from illava.tokens import Assignment, Tokens, carry, lift, merge, merged_sizes, offsets

# What can be measured in and after a tower, by stage; a family's `check` refuses a reducer that needs more.
VISION_EVIDENCE: dict[Stage, frozenset[EvidenceKind]] = {
    "vision_block": frozenset({"attention_received", "keys", "sizes", "seed"}),
    "vision_output": frozenset({"attention_received", "keys", "sizes", "seed"}),
}
# The same in a tower with a CLS token.
CLS_EVIDENCE: dict[Stage, frozenset[EvidenceKind]] = {
    **VISION_EVIDENCE,
    "vision_block": VISION_EVIDENCE["vision_block"] | {"cls_attention"},
    "vision_output": VISION_EVIDENCE["vision_output"] | {"cls_attention"},
}
# What a block's attention gives; the rest is kept from step to step.
_OF_BLOCK: frozenset[EvidenceKind] = frozenset({"attention_received", "cls_attention", "keys"})


@dataclass(frozen=True, slots=True)
class VisionStep:
    """One reduction that took place.

    Attributes:
        stage: ``vision_block`` or ``vision_output``.
        block: 0-based, None after the tower.
        assignment: over all patches of the packed call; a CLS token is not among them.
        of_groups: the same over whole groups, as the reducer gave it.
        lengths_before: patches per segment that went in.
        place_K3: int64 (tile, row, col) of what came out.
    """

    stage: Stage
    block: int | None
    assignment: Assignment
    of_groups: Assignment
    lengths_before: tuple[int, ...]
    place_K3: Tensor


class VisionReduction:
    """The reductions of one packed call of a tower.

    Attributes:
        lengths: tokens per segment as they are now, CLS included while it is there: what attention runs over.
        place_T3: int64 (tile, row, col) of the patches as they are now.
        score_T: float32 attention received in the last block by the patches as they are now; None before that block,
            and where no later stage of the plan asks for it.
        steps: what took place, in order.
    """

    def __init__(
        self,
        plan: ReductionPlan,
        lengths: tuple[int, ...],
        place_T3: Tensor,
        *,
        num_blocks: int,
        has_cls: bool = False,
        group_side: int = 1,
        seeds: Sequence[int] | None = None,
    ) -> None:
        """Begin a packed call.

        Args:
            plan: its ``vision_block`` and ``vision_output`` steps act here.
            lengths: patches per segment.
            place_T3: int64 (tile, row, col) of every patch.
            num_blocks: blocks of the tower.
            has_cls: one more token leads every segment, in no count and no place.
            group_side: patches per side of a group that is kept or merged as a whole; its patches lie side by side.
            seeds: an integer per segment, the root of what reducers draw there; see `segment_seeds`.
        """
        self.lengths = tuple(n + has_cls for n in lengths)
        self.place_T3 = place_T3
        self.score_T: Tensor | None = None
        self.steps: list[VisionStep] = []
        self._plan, self._has_cls, self._group_side, self._seeds = plan, has_cls, group_side, seeds
        self._cls_score_T: Tensor | None = None
        self._keys_THd: Tensor | None = None
        of_tower = [step for step in plan.steps if step.stage in ("vision_block", "vision_output")]
        sized = any("sizes" in step.reducer.evidence(step.stage) for step in of_tower)
        self._size_T = torch.ones(sum(lengths), device=place_T3.device) if sized else None
        self._last_block = num_blocks - 1
        later: tuple[Stage, ...] = ("vision_output", "decoder_input")
        self._later = _OF_BLOCK & {kind for stage in later for kind in _asked(plan.at(stage), stage)}

    def at(self, block: int, hidden_TD: Tensor, q_THd: Tensor, k_THd: Tensor, *, scale: float) -> Tensor:
        """Reduce inside a block, after attention and its residual, before the MLP's norm: [T, D] -> [K, D].

        Args:
            block: 0-based.
            hidden_TD: residual stream with this block's attention added.
            q_THd: queries of this block's attention.
            k_THd: keys of this block's attention.
            scale: factor of its scores.

        Raises:
            ReductionDidNotFireError: a step is configured here and removed nothing.
        """
        reducer = self._plan.at("vision_block", block)
        here, later = _asked(reducer, "vision_block"), self._later if block == self._last_block else frozenset()
        if reducer is None and not later:
            return hidden_TD
        patch_P = self._patch_index(hidden_TD.device)
        score_T = cls_score_T = None
        if "attention_received" in here | later:
            score_T = _only(patch_P, attention_received(q_THd, k_THd, self.lengths, scale=scale))
        if "cls_attention" in here | later:
            cls_score_T = _only(patch_P, one_query_attention(q_THd, k_THd, self.lengths, query=0, scale=scale))
        keys_THd = _only(patch_P, k_THd) if "keys" in here | later else None
        if later:
            self.score_T, self._cls_score_T, self._keys_THd = score_T, cls_score_T, keys_THd
        if reducer is None:
            return hidden_TD
        evidence = Evidence(attention_received_T=score_T, keys_THd=keys_THd, cls_attention_T=cls_score_T)
        return self._reduce(reducer, "vision_block", block, hidden_TD, evidence)

    def after_tower(self, hidden_TD: Tensor) -> Tensor:
        """Drop CLS, reduce at ``vision_output`` where configured, and check that every step of the tower fired.

        Raises:
            ReductionDidNotFireError: a configured block was never run, or a step removed nothing.
        """
        hidden_TD = _only(self._patch_index(hidden_TD.device), hidden_TD)
        self.lengths, self._has_cls = self._num_patches, False
        reducer = self._plan.at("vision_output")
        if reducer is not None:
            evidence = Evidence(
                attention_received_T=self.score_T, keys_THd=self._keys_THd, cls_attention_T=self._cls_score_T
            )
            hidden_TD = self._reduce(reducer, "vision_output", None, hidden_TD, evidence)
        missing = set(self._plan.layers("vision_block")) - {step.block for step in self.steps}
        if missing:
            raise ReductionDidNotFireError(
                f"vision_block steps at {sorted(missing)} did not run: the tower ended before them. Run "
                "`family.check(plan)` first; it names the blocks there are"
            )
        return hidden_TD

    def trace(self, num_segments: Sequence[int]) -> list[tuple[TraceStep, ...]]:
        """The steps as sparse matrices on the host, apart for each medium.

        Args:
            num_segments: tiles or frames of each medium, in packed order.
        """
        media: list[list[TraceStep]] = [[] for _ in num_segments]
        for step in self.steps:
            parts = _split_matrix(step.assignment, step.lengths_before, num_segments)
            places = step.place_K3.cpu().split([matrix.shape[0] for matrix in parts])
            for steps, matrix, place_K3 in zip(media, parts, places, strict=True):
                steps.append(TraceStep(step.stage, step.block, matrix, medium_place(place_K3)))
        return [tuple(steps) for steps in media]

    def _reduce(
        self, reducer: Reducer, stage: Stage, block: int | None, hidden_TD: Tensor, evidence: Evidence
    ) -> Tensor:
        num_patches, patch_P = self._num_patches, self._patch_index(hidden_TD.device)
        patches = Tokens(_only(patch_P, hidden_TD), num_patches, self.place_T3)
        groups = group_tokens(patches, self._group_side)
        evidence = self._with_history(evidence, reducer, stage, block)
        of_groups = reducer.assign(groups, group_evidence(evidence, self._group_side), stage)
        assignment = spread(of_groups, self._group_side)
        if assignment.num_kept >= assignment.num_tokens and not self._too_small(reducer, groups.lengths):
            where = stage if block is None else f"{stage} {block}"
            raise ReductionDidNotFireError(
                f"reducer {reducer.kind!r} at {where} removed none of {of_groups.num_tokens} tokens "
                f"({groups.lengths[0]} in the first tile); lower its budget or leave the step out"
            )
        self.lengths = tuple(n + self._has_cls for n in assignment.lengths)
        self.place_T3 = carry(assignment, self.place_T3)
        of_last_block = (self.score_T, self._cls_score_T, self._keys_THd)
        self.score_T, self._cls_score_T, self._keys_THd = (
            None if value_T is None else carry(assignment, value_T) for value_T in of_last_block
        )
        if self._size_T is not None:
            self._size_T = merged_sizes(assignment, self._size_T)
        self.steps.append(VisionStep(stage, block, assignment, of_groups, num_patches, self.place_T3))
        if patch_P is None:
            return merge(assignment, hidden_TD)
        return merge(lift(assignment, patch_P, hidden_TD.shape[0], self.lengths), hidden_TD)

    def _with_history(self, evidence: Evidence, reducer: Reducer, stage: Stage, block: int | None) -> Evidence:
        """What a block measured, with sizes and with a seed for every segment and step where they are asked for."""
        kinds, seeds = reducer.evidence(stage), None
        if "seed" in kinds and self._seeds is not None:
            seeds = tuple(derive_seed(root, stage, block or 0) for root in self._seeds)
        return replace(evidence, size_T=self._size_T if "sizes" in kinds else None, seeds=seeds)

    def _too_small(self, reducer: Reducer, lengths: tuple[int, ...]) -> bool:
        """Whether pictures of native resolution have too few groups for the budget to take one of them.

        No check of the plan could have known, and among larger pictures of a batch nobody would object.
        """
        return self._group_side > 1 and all(reducer.num_kept(length) == length for length in lengths)

    @property
    def _num_patches(self) -> tuple[int, ...]:
        """Patches per segment as they are now."""
        return tuple(n - self._has_cls for n in self.lengths)

    def _patch_index(self, device: torch.device) -> Tensor | None:
        """Where the patches lie among the packed tokens: int64 [P]; None where they are all there is."""
        if not self._has_cls:
            return None
        is_patch_T = torch.ones(sum(self.lengths), dtype=torch.bool)
        is_patch_T[offsets(self.lengths, is_patch_T.device)] = False
        return is_patch_T.nonzero().squeeze(1).to(device, non_blocking=True)


def segment_seeds(seeds: Sequence[int] | None, num_segments: Sequence[int]) -> list[int]:
    """A root for every segment, from its medium's seed and its place in that medium, whatever is packed beside it.

    Args:
        seeds: one integer a medium; None is 0 for each.
        num_segments: tiles or frames of each medium, in packed order.
    """
    of_medium = [0] * len(num_segments) if seeds is None else seeds
    return [derive_seed(seed, n) for seed, count in zip(of_medium, num_segments, strict=True) for n in range(count)]


def _only(patch_P: Tensor | None, value_T: Tensor) -> Tensor:
    """The patches' share: [T, ...] -> [P, ...]."""
    return value_T if patch_P is None else value_T.index_select(0, patch_P)


def medium_place(place_K3: Tensor) -> Tensor:
    """(tile, row, col) -> (medium, tile, row, col) with medium 0, as an `EncodedMedium` carries it."""
    return torch.cat([place_K3.new_zeros(place_K3.shape[0], 1), place_K3], dim=1)


def _asked(reducer: Reducer | None, stage: Stage) -> frozenset[EvidenceKind]:
    return frozenset() if reducer is None else reducer.evidence(stage)


def _split_matrix(assignment: Assignment, lengths_before: tuple[int, ...], num_segments: Sequence[int]) -> list[Tensor]:
    """The block-diagonal mixing matrix, one sparse block for each medium."""
    matrix = assignment.matrix().cpu()
    (row, col), value = matrix.indices(), matrix.values()
    row_bounds = _bounds(assignment.lengths, num_segments)
    col_bounds = _bounds(lengths_before, num_segments)
    edge_bounds = torch.searchsorted(row.contiguous(), torch.tensor(row_bounds)).tolist()
    blocks = []
    for rows, cols, edges in zip(pairwise(row_bounds), pairwise(col_bounds), pairwise(edge_bounds), strict=True):
        index = torch.stack([row[slice(*edges)] - rows[0], col[slice(*edges)] - cols[0]])
        size = (rows[1] - rows[0], cols[1] - cols[0])
        own = value[slice(*edges)]
        blocks.append(torch.sparse_coo_tensor(index, own, size, is_coalesced=True, check_invariants=False))
    return blocks


def _bounds(lengths: tuple[int, ...], num_segments: Sequence[int]) -> list[int]:
    """First token of each medium, and the end."""
    ends = [0, *accumulate(lengths)]
    return [ends[segment] for segment in accumulate(num_segments, initial=0)]
