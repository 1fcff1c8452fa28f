"""Un-merging: cells that were dropped or merged away in the tower come back before pooling or the 2x2 merger.

Each dropped cell keeps what it held when it left and takes over what has happened since to the survivors most like
it: x_i + mean over k of (x_k' - x_k), k the survivors of largest cosine with x_i in its segment (all of them where it
has no more), x_k as they left that step, x_k' as they are now. A survivor is as it is now. Steps are undone last
first. Knows no tower and no reducer.

Source: a delta reconstruction of ours over nearest survivors; the idea of un-merging a token to its sources' places is
ToMe's for dense outputs (arXiv 2303.17604, facebookresearch/ToMeSD), which copies the merged token instead.

Shape suffixes: T tokens before a step, K after it, D channels, S segments, N and M tokens of the longest segment
before and after, n neighbours, B rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from illava.reducers.ops.similarity import inside, unit
from illava.tokens import Assignment, compose, offsets, pad, unpad

_BLOCK_ROWS = 256


@dataclass(frozen=True, slots=True)
class _Undo:
    """What undoing one step takes.

    Attributes:
        assignment: the step, over whole groups where the tower has groups.
        before_TD: hidden states that went in.
        after_KD: hidden states that came out.
        near_Tn: int64, for each token that went in the survivors it follows, nearest first; a survivor's first is
            itself.
        num_near_T1: int64, how many of these count: a segment may have fewer survivors than another has neighbours.
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
        """Find each token's survivors; ``lengths`` as the step's reducer saw them."""
        near_Tn, num_near_T1 = _nearest(before_TD, after_KD, lengths, assignment.lengths, num_neighbours)
        near_Tn[assignment.kept_K, 0] = torch.arange(assignment.num_kept, device=near_Tn.device)
        return cls(assignment, before_TD, after_KD, near_Tn, num_near_T1)

    def apply(self, now_KD: Tensor) -> Tensor:
        """Hidden states as they are now, [K, D], with the dropped cells restored: [T, D]."""
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
    """The undoing of all steps of one packed call of a tower, gathered step by step."""

    def __init__(self, num_neighbours: int, group_side: int) -> None:
        """Follow so many survivors; whole groups of ``group_side`` x ``group_side`` patches are restored at a time."""
        self._num_neighbours, self._size = num_neighbours, group_side**2
        self._undos: list[_Undo] = []

    def add(self, of_groups: Assignment, lengths: tuple[int, ...], before_TD: Tensor, after_KD: Tensor) -> None:
        """Take note of a step.

        Args:
            of_groups: over whole groups.
            lengths: groups per segment, as the step's reducer saw them.
            before_TD: patches that went in.
            after_KD: patches that came out.
        """
        before_GX, after_KX = self._grouped(before_TD), self._grouped(after_KD)
        self._undos.append(_Undo.of(of_groups, lengths, before_GX, after_KX, self._num_neighbours))

    def restore(self, now_KD: Tensor) -> Tensor:
        """Patches as they are now, with every step undone, the last first: [K, D] -> [T, D]."""
        now_KX = self._grouped(now_KD)
        for undo in reversed(self._undos):
            now_KX = undo.apply(now_KX)
        return now_KX.view(-1, now_KD.shape[1])

    def followed(self, value_K: Tensor) -> Tensor:
        """What belongs to a place, of the survivor that each restored cell follows most: [K, ...] -> [T, ...]."""
        value_GX = value_K.unflatten(0, (-1, self._size))
        for undo in reversed(self._undos):
            value_GX = value_GX.index_select(0, undo.near_Tn[:, 0])
        return value_GX.flatten(0, 1)

    def matrix(self) -> Tensor:
        """The survivors that each restored cell follows, in equal parts: sparse float32 [T, K].

        What a cell kept of itself is not in it: no matrix over survivors can say so.
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
    token_TD: Tensor, survivor_KD: Tensor, lengths: tuple[int, ...], kept: tuple[int, ...], num_neighbours: int
) -> tuple[Tensor, Tensor]:
    """int64 [T, n], nearest first, and how many of them count: [T, 1]. No N x M map is ever whole.

    A segment of fewer than n survivors repeats its nearest.
    """
    token_SND, survivor_SMD = pad(unit(token_TD), lengths, 0.0), pad(unit(survivor_KD), kept, 0.0)
    outside_S1M = ~inside(kept, survivor_SMD.shape[1], token_TD.device)[:, None]
    num_near, best = min(num_neighbours, max(kept)), []
    for block_SBD in token_SND.split(_BLOCK_ROWS, dim=1):
        cosine_SBM = torch.bmm(block_SBD, survivor_SMD.transpose(1, 2)).masked_fill_(outside_S1M, float("-inf"))
        best.append(cosine_SBM.topk(num_near, dim=-1).indices)
    own_S11 = torch.tensor(kept, device=token_TD.device).clamp(max=num_near)[:, None, None]
    near_SNn = torch.cat(best, 1)
    near_SNn = torch.where(torch.arange(num_near, device=near_SNn.device) < own_S11, near_SNn, near_SNn[..., :1])
    near_SNn = near_SNn + offsets(kept, token_TD.device)[:, None, None]
    return unpad(near_SNn, lengths), unpad(own_S11.expand(-1, near_SNn.shape[1], 1), lengths)
