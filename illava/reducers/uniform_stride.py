"""Uniform stride: keep evenly spaced tokens. The baseline without any evidence."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal

from illava.reducers.base import Evidence, EvidenceKind, Reducer, Stage
from illava.reducers.budget import Budget

if TYPE_CHECKING:
    from torch import Tensor

    from illava.tokens import Assignment, Tokens


class UniformStride(Budget, Reducer):
    """Keep tokens floor((i + 1/2) n / k), i = 0 .. k - 1, of each segment: evenly spaced, centred.

    Attributes:
        per, num_merged, keep_ratio, keep_per_frame: see `Budget`; ``num_merged`` counts the dropped tokens.

    Source: a baseline of ours; the spacing that subsampled grids use.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"vision_block", "vision_output", "decoder_input", "decoder_layer"})

    kind: Literal["uniform_stride"] = "uniform_stride"

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset()

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        from illava.host_copies import to_device
        from illava.tokens import prune

        kept = tuple(self.num_kept(n) for n in tokens.lengths)
        kept_K = to_device(_spaced(tokens.lengths, kept), tokens.hidden_TD.device)
        return prune(kept_K, kept, sum(tokens.lengths))


@lru_cache(maxsize=256)
def _spaced(lengths: tuple[int, ...], kept: tuple[int, ...]) -> Tensor:
    """Packed indices on the host; cached, since plans repeat the same counts."""
    import torch

    with torch.inference_mode(False):  # cached, and training may use what inference made
        start, parts = 0, [torch.empty(0, dtype=torch.long)]
        for n, k in zip(lengths, kept, strict=True):
            parts.append(start + (2 * torch.arange(k) + 1) * n // (2 * max(k, 1)))
            start += n
        return torch.cat(parts)
