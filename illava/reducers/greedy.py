"""Greedy merging: merge the most similar pair, r times. The thorough and slow way to merge by similarity."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from illava.host_copies import constant_on
from illava.reducers.base import Evidence, EvidenceKind, Reducer, Stage
from illava.reducers.budget import Budget
from illava.reducers.proportional import ProportionalAttention

if TYPE_CHECKING:
    from torch import Tensor

    from illava.tokens import Assignment, Tokens


class Greedy(ProportionalAttention, Budget, Reducer):
    """Merge, r times, the two tokens of largest key cosine into their size-weighted mean, at the earlier one.

    The key of a merged token is the size-weighted mean of the two (head-averaged) keys; it may merge again.

    The formula needs all pairs: an n x n map of similarities. Row maxima are kept, so a merge costs one new row and a
    fresh maximum only for the rows whose best partner was one of the two: O(n^2 + r n) as long as those are few. Which
    they are depends on the data: one host synchronisation a merge, for all segments.

    Attributes:
        per, num_merged, keep_ratio, keep_per_frame: see `Budget`.
        proportional_attention: see `ProportionalAttention`.

    Source: "greedy merging" of Tables 4 and 7 in arXiv 2412.06263v1, which gives no formula for a merged token's key.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"vision_block", "vision_output", "decoder_layer"})

    kind: Literal["greedy"] = "greedy"

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset({"keys", "sizes"})

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        from illava.tokens import cluster, offsets, pad, unpad

        kept = tuple(self.num_kept(n) for n in tokens.lengths)
        size_T = evidence.sizes(tokens)
        key_SND = pad(evidence.measured("keys").float().mean(1), tokens.lengths, 0.0).clone()
        into_SN = _merge_pairs(key_SND, pad(size_T.float(), tokens.lengths, 1.0).clone(), tokens.lengths, kept)
        into_T = unpad(into_SN + offsets(tokens.lengths, size_T.device)[:, None], tokens.lengths)
        return cluster(into_T, size_T, tokens.lengths, kept)


def _merge_pairs(key_SND: Tensor, size_SN: Tensor, lengths: tuple[int, ...], kept: tuple[int, ...]) -> Tensor:
    """The token of its segment that each one ends up in, int64 [S, N]. Overwrites its arguments."""
    import torch

    from illava.reducers.ops.similarity import inside, unit, without_rounding

    num_segments, width = size_SN.shape
    device = size_SN.device
    into_SN = torch.arange(width, device=device).repeat(num_segments, 1)
    if kept == lengths:
        return into_SN
    alive_SN = inside(lengths, width, device)
    unit_SND = unit(key_SND)
    similarity_SNN = without_rounding(torch.bmm(unit_SND, unit_SND.transpose(1, 2)))
    similarity_SNN.masked_fill_(~(alive_SN[:, :, None] & alive_SN[:, None]), float("-inf"))
    similarity_SNN.diagonal(dim1=1, dim2=2).fill_(float("-inf"))
    best_SN, partner_SN = similarity_SNN.max(-1)

    for step in range(max(n - k for n, k in zip(lengths, kept, strict=True))):
        seg = constant_on([s for s in range(num_segments) if lengths[s] - kept[s] > step], device)
        one = best_SN[seg].argmax(1)
        other = partner_SN[seg, one]
        low, high = torch.minimum(one, other), torch.maximum(one, other)
        into_SN[seg] = torch.where(into_SN[seg] == high[:, None], low[:, None], into_SN[seg])

        low_size, high_size = size_SN[seg, low][:, None], size_SN[seg, high][:, None]
        key = (low_size * key_SND[seg, low] + high_size * key_SND[seg, high]) / (low_size + high_size)
        key_SND[seg, low], size_SN[seg, low] = key, (low_size + high_size).squeeze(1)
        unit_SND[seg, low] = unit(key)
        alive_SN[seg, high] = False

        row = without_rounding(torch.bmm(unit_SND[seg], unit(key)[:, :, None]).squeeze(2))
        row.masked_fill_(~alive_SN[seg], float("-inf")).scatter_(1, low[:, None], float("-inf"))
        similarity_SNN[seg, high] = similarity_SNN[seg, :, high] = float("-inf")
        similarity_SNN[seg, low] = similarity_SNN[seg, :, low] = row
        best_SN[seg, high] = float("-inf")

        # The new pairs are found through the new token's row; others change only where they lost their partner.
        orphan = (partner_SN[seg] == low[:, None]) | (partner_SN[seg] == high[:, None])
        orphan.scatter_(1, low[:, None], True)
        which, token = orphan.nonzero(as_tuple=True)
        best_SN[seg[which], token], partner_SN[seg[which], token] = similarity_SNN[seg[which], token].max(-1)
    return into_SN
