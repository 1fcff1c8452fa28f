"""LLaVA-PruMerge and PruMerge+: keep outliers of attention, each enriched by its nearest neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from illava.host_copies import constant_on
from illava.reducers.base import Evidence, EvidenceKind, Reducer, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from illava.tokens import Assignment, Tokens

_BLOCK_ROWS = 256


class PruMerge(Reducer):
    """Keep centres, the tokens with a_j > Q3 + 1.5 (Q3 - Q1): y_i = x_i + sum of a_j x_j over i's 32 nearest keys.

    a is the saliency, quartiles are linearly interpolated, neighbours are the other tokens of largest key cosine (all
    heads), centres included. Rows of the mixing matrix therefore sum to a little more than one: 1 + sum a_j.

    Counts depend on the data and cost one host synchronisation. No n x n map: centres against all, a block at a time.

    Attributes:
        plus: also make every s-th token from the first one a centre, s = max(1, floor(floor(n / outliers) / 3)).
        saliency: ``attention_received``, or ``cls_attention`` for towers with a CLS token, as in the paper.
        num_neighbours: neighbours a centre takes up, fewer where a segment has fewer.

    Source: arXiv 2403.15388; 42Shawn/LLaVA-PruMerge@1ca8b2b:llava/model/multimodal_encoder/clip_encoder.py
    (``token_prune_merge_advanced``, ``token_prune_merge_advanced_plus``). Written from the formula. Deviations: each
    tile or frame finds its own outliers; one without any keeps its most salient token; original order; no extra token
    for everything else, which would have no coordinates.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"vision_block", "vision_output"})

    kind: Literal["prumerge"] = "prumerge"
    plus: bool = False
    saliency: Literal["attention_received", "cls_attention"] = "attention_received"
    num_neighbours: int = Field(default=32, ge=1)

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset({self.saliency, "keys"})

    def num_kept(self, num_tokens: int) -> None:
        """None: the attention decides."""

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        import torch

        from illava.reducers.ops.similarity import unit
        from illava.tokens import Assignment, offsets, pad, unpad

        lengths, device = tokens.lengths, tokens.hidden_TD.device
        score_SN = pad(evidence.measured(self.saliency).float(), lengths, float("-inf"))
        centre_SN = _centres(score_SN, lengths, plus=self.plus)
        kept = tuple(centre_SN.sum(1).tolist())
        index_SC = torch.argsort((~centre_SN).byte(), dim=1, stable=True)[:, : max(kept)]
        key_SND = pad(unit(evidence.measured("keys").flatten(1)), lengths, 0.0)
        near_SCk = _neighbours(key_SND, index_SC, lengths, self.num_neighbours)

        sizes = tuple(1 + min(self.num_neighbours, max(n - 1, 0)) for n in lengths)
        start_S1 = offsets(lengths, device)[:, None]
        source_SCe = torch.cat([index_SC[..., None], near_SCk], 2)
        weight_SCe = score_SN[:, None].expand(-1, index_SC.shape[1], -1).gather(2, source_SCe)
        weight_SCe[..., 0] = 1.0
        edges = torch.arange(source_SCe.shape[2], device=device) < constant_on(sizes, device)[:, None, None]
        rows = torch.arange(max(kept), device=device) < constant_on(kept, device)[:, None]
        used_SCe = edges & rows[..., None]
        size_G = constant_on(sizes, device).repeat_interleave(constant_on(kept, device))
        return Assignment(
            num_tokens=sum(lengths),
            lengths=kept,
            kept_K=unpad(index_SC + start_S1, kept),
            source_E=(source_SCe + start_S1[..., None])[used_SCe],
            weight_E=weight_SCe[used_SCe],
            target_G=torch.arange(sum(kept), device=device),
            size_G=size_G,
            group_size=sizes[0] if len(set(sizes)) == 1 else None,
        )


def _centres(score_SN: Tensor, lengths: tuple[int, ...], *, plus: bool) -> Tensor:
    """bool [S, N]: the tokens that stay."""
    import torch

    from illava.reducers.ops.similarity import inside

    inside_SN = inside(lengths, score_SN.shape[1], score_SN.device)
    lengths_S1 = constant_on(lengths, score_SN.device)[:, None]
    sorted_SN = score_SN.masked_fill(~inside_SN, float("inf")).sort(1).values

    def quantile(share: float) -> Tensor:
        position_S1 = share * (lengths_S1 - 1).clamp(min=0)
        below_S1 = position_S1.floor().long()
        above_S1 = torch.minimum(below_S1 + 1, (lengths_S1 - 1).clamp(min=0))
        return torch.lerp(sorted_SN.gather(1, below_S1), sorted_SN.gather(1, above_S1), position_S1 - below_S1)

    lower_S1, upper_S1 = quantile(0.25), quantile(0.75)
    centre_SN = inside_SN & (score_SN > upper_S1 + 1.5 * (upper_S1 - lower_S1))
    centre_SN.scatter_(1, score_SN.argmax(1, keepdim=True), lengths_S1 > 0)
    if plus:
        stride_S1 = (lengths_S1 // centre_SN.sum(1, keepdim=True).clamp(min=1) // 3).clamp(min=1)
        centre_SN |= inside_SN & (torch.arange(score_SN.shape[1], device=score_SN.device) % stride_S1 == 0)
    return centre_SN


def _neighbours(key_SND: Tensor, index_SC: Tensor, lengths: tuple[int, ...], num_neighbours: int) -> Tensor:
    """The nearest other tokens of each centre, best first: int64 [S, C, k]; beyond a segment's n - 1, anything."""
    import torch

    from illava.reducers.ops.similarity import inside

    outside_S1N = ~inside(lengths, key_SND.shape[1], key_SND.device)[:, None]
    k = min(num_neighbours, max(key_SND.shape[1] - 1, 0))
    found = []
    for block_SC in index_SC.split(_BLOCK_ROWS, dim=1):
        centre_SCD = key_SND.gather(1, block_SC[..., None].expand(-1, -1, key_SND.shape[2]))
        cosine_SCN = torch.bmm(centre_SCD, key_SND.transpose(1, 2)).masked_fill_(outside_S1N, float("-inf"))
        cosine_SCN.scatter_(2, block_SC[..., None], float("-inf"))
        found.append(cosine_SCN.topk(k, dim=2).indices)
    return torch.cat(found, 1)
