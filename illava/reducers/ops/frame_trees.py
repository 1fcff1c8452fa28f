"""Picks diverse tokens frame by frame, merges the others along trees through time, and clusters the trees.

See `illava.reducers.flashvid` for the formula. One visual input at a time.

Shape suffixes: N tokens of the input, F frames, n tokens of one frame, R roots of trees, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from illava.reducers.ops.similarity import group_mean, unit, without_rounding

_NEIGHBOURS = 7
_MOST_ATTENTION = 1.0  # a mean of softmax rows; newlines have more, by the convention of the layouts


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """Holds one visual input.

    Attributes:
        unit_ND: hidden states of length one.
        worth_N: what distances from others are multiplied by; not negative.
        frame_N: int64, the rank of each token's frame; newlines between frames come last.
        is_cell_N: bool, False for newlines.
        hidden_ND: float32.
    """

    unit_ND: Tensor
    worth_N: Tensor
    frame_N: Tensor
    is_cell_N: Tensor
    hidden_ND: Tensor

    def members(self) -> list[Tensor]:
        """The tokens of each frame, ascending."""
        return [(self.frame_N == frame).nonzero().squeeze(1) for frame in range(int(self.frame_N.max()) + 1)]


def visual_of(hidden_ND: Tensor, coord_N3: Tensor, attention_N: Tensor, *, relevance: bool) -> VisualTokens:
    """Measure one visual input; ``relevance`` weighs attention by likeness to the frames' means."""
    is_cell_N = coord_N3[:, 1] >= 0
    frame_N = torch.where(coord_N3[:, 0] < 0, coord_N3[:, 0].max() + 1, coord_N3[:, 0]).unique(return_inverse=True)[1]
    worth_N = attention_N.clamp(min=0.0, max=_MOST_ATTENTION)
    if relevance:
        mean_FD = group_mean(hidden_ND, torch.ones_like(worth_N), frame_N, int(frame_N.max()) + 1)
        worth_N = worth_N * (hidden_ND @ mean_FD.mean(0)).clamp(min=0.0)
    return VisualTokens(unit(hidden_ND), worth_N, frame_N, is_cell_N, hidden_ND)


def into_trees(visual: VisualTokens, num_kept: int, *, num_picks: int, threshold: float) -> tuple[Tensor, Tensor]:
    """The representative of each token, int64 [N], and its weight in the mean, float32 [N]; ``num_kept`` are left."""
    members, device = visual.members(), visual.frame_N.device
    if num_kept == len(visual.frame_N):
        return torch.arange(num_kept, device=device), torch.ones_like(visual.worth_N)
    sizes = [len(own) for own in members]
    is_pick_N = torch.zeros_like(visual.is_cell_N)
    for own, count in zip(members, _shared_out(num_picks, sizes), strict=True):
        is_pick_N[own[_pick(visual.unit_ND[own], visual.worth_N[own], count)]] = True
    root_N = _roots(visual, members, is_pick_N, threshold, num_kept - num_picks)
    index_N = torch.arange(len(root_N), device=device)
    roots_R = ((root_N == index_N) & ~is_pick_N).nonzero().squeeze(1)
    tree_ND = group_mean(visual.hidden_ND, torch.ones_like(visual.worth_N), root_N, len(root_N))
    centre_N = index_N.clone()
    centre_N[roots_R] = _centres(tree_ND[roots_R], visual.frame_N[roots_R], roots_R, num_kept - num_picks)
    size_N = torch.bincount(root_N, minlength=len(root_N))
    return centre_N[root_N], size_N[root_N].reciprocal().to(visual.worth_N.dtype)


def _shared_out(count: int, sizes: list[int]) -> list[int]:
    """Share out ``count`` places to frames by size: Sainte-Lague, ties to the earlier, none more than its own."""
    order = sorted((((r + 0.5) / n, frame) for frame, n in enumerate(sizes) for r in range(n)))[:count]
    shares = [0] * len(sizes)
    for _, frame in order:
        shares[frame] += 1
    return shares


def _pick(unit_nD: Tensor, worth_n: Tensor, count: int) -> Tensor:
    """So many tokens of one frame that lie apart: int64 indices."""
    distance_nn = 1 - without_rounding(unit_nD @ unit_nD.T)
    gap_n = distance_nn.clone().fill_diagonal_(torch.inf).amin(1) if len(unit_nD) > 1 else torch.zeros_like(worth_n)
    picks: list[Tensor] = []
    free_n = torch.ones_like(worth_n, dtype=torch.bool)
    for step in range(count):
        pick = (gap_n * worth_n).masked_fill(~free_n, -1.0).argmax()
        picks.append(pick)
        free_n[pick] = False
        gap_n = distance_nn[pick] if step == 0 else torch.minimum(gap_n, distance_nn[pick])
    return torch.stack(picks) if picks else torch.empty(0, dtype=torch.long, device=worth_n.device)


def _roots(visual: VisualTokens, members: list[Tensor], is_pick_N: Tensor, threshold: float, least: int) -> Tensor:
    """The root of each token's tree, itself for a pick: int64 [N]; ``least`` roots remain at least."""
    near_N, cosine_N = (
        torch.arange(len(is_pick_N), device=is_pick_N.device),
        torch.full_like(visual.worth_N, -torch.inf),
    )
    may_N = ~is_pick_N & visual.is_cell_N
    for before, own in pairwise(frame_n[may_N[frame_n]] for frame_n in members):
        if len(before) and len(own):
            best = without_rounding(visual.unit_ND[own] @ visual.unit_ND[before].T).max(1)
            near_N[own], cosine_N[own] = before[best.indices], best.values
    joins_N = cosine_N > threshold
    most = int((~is_pick_N).sum()) - least
    if int(joins_N.sum()) > most:
        first = cosine_N.argsort(descending=True, stable=True)[:most]
        joins_N = torch.zeros_like(joins_N).index_fill_(0, first, True)
    root_N = torch.where(joins_N, near_N, torch.arange(len(near_N), device=near_N.device))
    for _ in members:  # to the end of every chain: it has a token a frame at most
        root_N = root_N[root_N]
    return root_N


def _centres(tree_RD: Tensor, frame_R: Tensor, roots_R: Tensor, count: int) -> Tensor:
    """The root whose place each tree's cluster takes: int64 [R]; ``count`` of them, frame by frame if that suffices."""
    groups = [(frame_R == frame).nonzero().squeeze(1) for frame in frame_R.unique().tolist()]
    shares = _shared_out(count, [len(own) for own in groups])
    if 0 in shares:
        groups, shares = [torch.arange(len(roots_R), device=roots_R.device)], [count]
    centre_R = torch.empty_like(roots_R)
    for own, share in zip(groups, shares, strict=True):
        centre_R[own] = roots_R[own[_density_peaks(tree_RD[own], share)]]
    return centre_R


def _density_peaks(tree_nD: Tensor, count: int) -> Tensor:
    """The centre that each tree belongs to, by DPC-kNN: int64 [n]."""
    distance_nn = torch.cdist(tree_nD, tree_nD, compute_mode="donot_use_mm_for_euclid_dist") / tree_nD.shape[1] ** 0.5
    near_nk = distance_nn.topk(min(_NEIGHBOURS, count), largest=False).values
    density_n = without_rounding((-near_nk.square().mean(1)).exp())
    index_n = torch.arange(len(tree_nD), device=tree_nD.device)
    tied_nn = (density_n == density_n[:, None]) & (index_n < index_n[:, None])
    denser_nn = (density_n > density_n[:, None]) | tied_nn
    apart_n = torch.where(denser_nn, distance_nn, distance_nn.max()).amin(1)
    centres = without_rounding(apart_n * density_n).argsort(descending=True, stable=True)[:count]
    centre_n = centres[distance_nn[:, centres].argmin(1)]
    return centre_n.index_copy(0, centres, centres)
