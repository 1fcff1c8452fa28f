"""Random pruning: the baseline that every score must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from illava.host_copies import to_device
from illava.reducers.base import Evidence, EvidenceKind, Reducer, Stage
from illava.reducers.budget import Budget

if TYPE_CHECKING:
    from illava.tokens import Assignment, Tokens


class Random(Budget, Reducer):
    """Keep a uniformly drawn subset of each segment, in order.

    Each segment draws from its own generator, seeded by the evidence (seed, item, layer), on the CPU: the subset
    depends neither on the batch nor on the device. Loops over segments, one generator each.

    Attributes:
        per, num_merged, keep_ratio, keep_per_frame: see `Budget`; ``num_merged`` counts the dropped tokens.

    Source: "random" of Tables 4 and 7 in arXiv 2412.06263v1.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"vision_block", "vision_output", "decoder_input", "decoder_layer"})

    kind: Literal["random"] = "random"

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset({"seed"})

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        import torch

        from illava.reducers.ops.selection import prune_lowest

        if evidence.seeds is None:
            raise RuntimeError("the reducer asked for 'seed' but the caller gave none; see Reducer.evidence")
        draws = [
            torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for n, seed in zip(tokens.lengths, evidence.seeds, strict=True)
        ]
        score_T = to_device(torch.cat([torch.empty(0), *draws]), tokens.hidden_TD.device)
        return prune_lowest(score_T, tokens.lengths, tuple(self.num_kept(n) for n in tokens.lengths))
