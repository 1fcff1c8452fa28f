"""iLLaVA as revised in 2026: keep the informative tokens, recycle a few of the redundant ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from illava.host_copies import constant_on
from illava.reducers.base import AttentionScore, Evidence, EvidenceKind, Reducer, Stage, score_evidence
from illava.reducers.budget import Budget
from illava.reducers.proportional import ProportionalAttention

if TYPE_CHECKING:
    from torch import Tensor

    from illava.tokens import Assignment, Tokens

_RECYCLED_SHARE = 0.05
_NUM_SOURCES = 5


class ILLaVA2026(ProportionalAttention, Budget, Reducer):
    """Keep p tokens: the p - c of highest score as they are, the next c = max(1, round(0.05 p)) recycling.

    The other n - p tokens are redundant. Each recycling token i takes the five redundant tokens j of largest
    x_j . x_i and becomes (x_i + sum_j softmax_j(x_j . x_i / sqrt(D)) x_j) / 2. Order is kept; a
    redundant token may be taken by several. Where fewer than five are redundant all of them are taken.

    No n x n map: recycling tokens against redundant ones.

    Attributes:
        score: what ranks tokens before a decoder layer, as in `ILLaVA`; elsewhere the attention received.
        per, num_merged, keep_ratio, keep_per_frame: see `Budget`.
        proportional_attention: see `ProportionalAttention`.

    Source: the ICLR 2026 revision of arXiv 2412.06263; hulianyuyy/iLLaVA, later README. Written from the formula.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"vision_block", "vision_output", "decoder_input", "decoder_layer"})

    kind: Literal["illava_2026"] = "illava_2026"
    score: AttentionScore = "paper"

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset({score_evidence(self.score, stage)})

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        from illava.tokens import identity

        kept = tuple(self.num_kept(n) for n in tokens.lengths)
        if kept == tokens.lengths:
            return identity(kept, tokens.hidden_TD.device)
        return _recycle(tokens, evidence.measured(score_evidence(self.score, stage)), kept)


def _recycle(tokens: Tokens, score_T: Tensor, kept: tuple[int, ...]) -> Assignment:
    import torch

    from illava.reducers.ops.selection import rank_highest
    from illava.tokens import Assignment, offsets, unpad

    lengths, device = tokens.lengths, score_T.device
    removed = [n - k for n, k in zip(lengths, kept, strict=True)]
    recycling = tuple(max(1, round(_RECYCLED_SHARE * k)) if r else 0 for k, r in zip(kept, removed, strict=True))
    rank_SN = rank_highest(score_T, lengths)
    order_SN = torch.empty_like(rank_SN).scatter_(
        1, rank_SN, torch.arange(rank_SN.shape[1], device=device).expand_as(rank_SN)
    )
    start_S1, kept_S1 = offsets(lengths, device)[:, None], constant_on(kept, device)[:, None]
    first_S1 = kept_S1 - constant_on(recycling, device)[:, None]
    index_SC = order_SN.gather(1, _counting(first_S1, max(recycling)).clamp(max=rank_SN.shape[1] - 1))
    index_SR = order_SN.gather(1, _counting(kept_S1, max(removed)).clamp(max=rank_SN.shape[1] - 1))
    last = sum(lengths) - 1  # entries beyond a short last segment are masked or left out, but read
    packed_SC, packed_SR = ((index + start_S1).clamp(max=last) for index in (index_SC, index_SR))
    source_SCe, weight_SCe = _take_up(tokens.hidden_TD, packed_SC, packed_SR, removed)

    # One row of edges a recycling token; host counts, so that nothing waits for the device.
    sizes = [min(_NUM_SOURCES, r) + 1 for r in removed]
    per_row = tuple(size * (c < n) for size, n in zip(sizes, recycling, strict=True) for c in range(max(recycling)))
    keep_SN = rank_SN < kept_S1
    row_SN = keep_SN.cumsum(1) - 1 + offsets(kept, device)[:, None]
    used = [size for size in per_row if size]
    return Assignment(
        num_tokens=sum(lengths),
        lengths=kept,
        kept_K=unpad(torch.argsort((~keep_SN).byte(), dim=1, stable=True) + start_S1, kept),
        source_E=unpad(source_SCe.flatten(0, 1), per_row),
        weight_E=unpad(weight_SCe.flatten(0, 1), per_row),
        target_G=unpad(row_SN.gather(1, index_SC), recycling),
        size_G=constant_on(used, device),
        group_size=used[0] if len(set(used)) == 1 else None,
    )


def _counting(first_S1: Tensor, count: int) -> Tensor:
    import torch

    return first_S1 + torch.arange(count, device=first_S1.device)


def _take_up(hidden_TD: Tensor, index_SC: Tensor, index_SR: Tensor, removed: list[int]) -> tuple[Tensor, Tensor]:
    """Edges of every recycling token, itself first: sources int64 and weights float32, [S, C, 1 + five]."""
    import torch

    device, dim = hidden_TD.device, hidden_TD.shape[1]
    x_SCD, x_SRD = hidden_TD[index_SC].float(), hidden_TD[index_SR].float()
    beyond_S1R = (torch.arange(index_SR.shape[1], device=device) >= constant_on(removed, device)[:, None])[:, None]
    dot_SCR = torch.bmm(x_SCD, x_SRD.transpose(1, 2)).masked_fill_(beyond_S1R, float("-inf"))
    top = dot_SCR.topk(min(_NUM_SOURCES, index_SR.shape[1]), dim=2)
    taken_SCk = index_SR[:, None].expand(-1, index_SC.shape[1], -1).gather(2, top.indices)
    weight_SCk = torch.softmax(top.values / dim**0.5, dim=2) / 2
    half_SC1 = torch.full_like(weight_SCk[..., :1], 0.5)
    return torch.cat([index_SC[..., None], taken_SCk], 2), torch.cat([half_SC1, weight_SCk], 2)
