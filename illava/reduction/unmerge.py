"""Unmerges: restores cells that the tower dropped or merged away, before pooling or the 2x2 merger.

A dropped cell keeps its hidden state of the moment it was dropped, and takes over the mean change since then of the
kept tokens most like it: x_i + mean over k of (x_k' - x_k). Here k are the kept tokens of largest cosine with x_i in
its segment (all of them if there are no more), x_k their states after that step, x_k' their states now. A kept token is
as it is now. Steps are undone in reverse order.

Source: a delta reconstruction of ours over nearest kept tokens. The idea to unmerge a token at its sources' positions
is ToMe's for dense outputs (arXiv 2303.17604, facebookresearch/ToMeSD), which copies the merged token instead.

Shape suffixes: T tokens before a step, K after it, D channels, S segments, N and M tokens of the longest segment
before and after, n neighbours, B rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from illava.host_copies import constant_on
from illava.reducers.ops.similarity import inside, unit
from illava.tokens import Assignment, compose, offsets, pad, unpad

_BLOCK_ROWS = 256


@dataclass(frozen=True, slots=True)
class _Undo:
    """Holds what is needed to undo one step.

    Attributes:
        assignment: the step, over whole groups where the tower has groups.
        before_TD: hidden states before the step.
        after_KD: hidden states after the step.
        near_Tn: int64, for each token before the step the kept tokens that it follows, nearest first; a kept token's
            first is itself.
        num_near_T1: int64, how many of these count: a segment may have fewer kept tokens than neighbours are asked for.
    """

    assignment: Assignment
    before_TD: Tensor
    after_KD: Tensor
    near_Tn: Tensor
    num_near_T1: Tensor

    @classmethod
    def of(
        cls, assignment: Assignment, lengths: tuple[int, ...], before_TD: Tensor, after_KD: Tensor, num_neighbours: int
    ) -> _Undo:
        """Find the kept tokens that each token follows; ``lengths`` as the step's reducer saw them."""
        near_Tn, num_near_T1 = _nearest(before_TD, after_KD, lengths, assignment.lengths, num_neighbours)
        near_Tn[assignment.kept_K, 0] = torch.arange(assignment.num_kept, device=near_Tn.device)
        return cls(assignment, before_TD, after_KD, near_Tn, num_near_T1)

    def apply(self, now_KD: Tensor) -> Tensor:
        """Restore the dropped cells among the present hidden states: [K, D] -> [T, D]."""
        moved_KD = now_KD.float() - self.after_KD.float()
        moved_TD = moved_KD[self.near_Tn[:, 0]]
        for n in range(1, self.near_Tn.shape[1]):  # a neighbour at a time: no [T, n, D] is ever whole in memory
            moved_TD = moved_TD + torch.where(n < self.num_near_T1, moved_KD[self.near_Tn[:, n]], 0.0)
        restored_TD = (self.before_TD.float() + moved_TD / self.num_near_T1).to(now_KD.dtype)
        return restored_TD.index_copy(0, self.assignment.kept_K, now_KD)

    def matrix(self) -> Tensor:
        """Sparse float32 [T, K]; see `Unmerging.matrix`."""
        num_tokens, num_near = self.near_Tn.shape
        near_Tn = self.near_Tn.clone()
        weight_Tn = (torch.arange(num_near, device=near_Tn.device) < self.num_near_T1) / self.num_near_T1
        kept_K = self.assignment.kept_K
        near_Tn[kept_K] = torch.arange(self.assignment.num_kept, device=near_Tn.device)[:, None]
        index = torch.stack(
            [torch.arange(num_tokens, device=near_Tn.device).repeat_interleave(num_near), near_Tn.flatten()]
        )
        size = (num_tokens, self.assignment.num_kept)
        return torch.sparse_coo_tensor(index, weight_Tn.flatten(), size, check_invariants=False).coalesce()


class Unmerging:
    """Undoes all steps of one packed call of a tower; is told of each step as it happens."""

    def __init__(self, num_neighbours: int, group_side: int) -> None:
        """Follow so many kept tokens; restore whole groups of ``group_side`` x ``group_side`` patches at a time."""
        self._num_neighbours, self._size = num_neighbours, group_side**2
        self._undos: list[_Undo] = []

    def add(self, of_groups: Assignment, lengths: tuple[int, ...], before_TD: Tensor, after_KD: Tensor) -> None:
        """Record a step.

        Args:
            of_groups: over whole groups.
            lengths: groups per segment, as the step's reducer saw them.
            before_TD: patches before the step.
            after_KD: patches after the step.
        """
        before_GX, after_KX = self._grouped(before_TD), self._grouped(after_KD)
        self._undos.append(_Undo.of(of_groups, lengths, before_GX, after_KX, self._num_neighbours))

    def restore(self, now_KD: Tensor) -> Tensor:
        """Undo every step on the present patches, the last step first: [K, D] -> [T, D]."""
        now_KX = self._grouped(now_KD)
        for undo in reversed(self._undos):
            now_KX = undo.apply(now_KX)
        return now_KX.view(-1, now_KD.shape[1])

    def followed(self, value_K: Tensor) -> Tensor:
        """Give each restored cell the value of the kept token that it follows most: [K, ...] -> [T, ...]."""
        value_GX = value_K.unflatten(0, (-1, self._size))
        for undo in reversed(self._undos):
            value_GX = value_GX.index_select(0, undo.near_Tn[:, 0])
        return value_GX.flatten(0, 1)

    def matrix(self) -> Tensor:
        """The kept tokens that each restored cell follows, in equal parts: sparse float32 [T, K].

        It leaves out the state that a cell kept of itself: no matrix over kept tokens can express that.
        """
        *first, last = self._undos
        matrix = last.matrix()
        for undo in reversed(first):
            matrix = compose(matrix, undo.matrix())
        corner_m = torch.arange(self._size, device=matrix.device)
        index_2Em = matrix.indices()[:, :, None] * self._size + corner_m
        size = (matrix.shape[0] * self._size, matrix.shape[1] * self._size)
        value_E = matrix.values().repeat_interleave(self._size)
        return torch.sparse_coo_tensor(index_2Em.flatten(1), value_E, size, check_invariants=False).coalesce()

    def _grouped(self, hidden_TD: Tensor) -> Tensor:
        """Patches of a group side by side in one row."""
        return hidden_TD.reshape(hidden_TD.shape[0] // self._size, -1)


def _nearest(
    token_TD: Tensor, kept_KD: Tensor, lengths: tuple[int, ...], kept: tuple[int, ...], num_neighbours: int
) -> tuple[Tensor, Tensor]:
    """int64 [T, n], nearest first, and how many of them count: [T, 1]. No N x M map is ever whole.

    A segment of fewer than n kept tokens repeats its nearest.
    """
    token_SND, kept_SMD = pad(unit(token_TD), lengths, 0.0), pad(unit(kept_KD), kept, 0.0)
    outside_S1M = ~inside(kept, kept_SMD.shape[1], token_TD.device)[:, None]
    num_near, best = min(num_neighbours, max(kept)), []
    for block_SBD in token_SND.split(_BLOCK_ROWS, dim=1):
        cosine_SBM = torch.bmm(block_SBD, kept_SMD.transpose(1, 2)).masked_fill_(outside_S1M, float("-inf"))
        best.append(cosine_SBM.topk(num_near, dim=-1).indices)
    own_S11 = constant_on(kept, token_TD.device).clamp(max=num_near)[:, None, None]
    near_SNn = torch.cat(best, 1)
    near_SNn = torch.where(torch.arange(num_near, device=near_SNn.device) < own_S11, near_SNn, near_SNn[..., :1])
    near_SNn = near_SNn + offsets(kept, token_TD.device)[:, None, None]
    return unpad(near_SNn, lengths), unpad(own_S11.expand(-1, near_SNn.shape[1], 1), lengths)
