"""Error-bounded pruning: keep as few tokens as an error bound allows. `budget: auto` runs it; `ward` replaces it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from illava.reducers.base import Evidence, EvidenceKind, Reducer, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from illava.tokens import Assignment, Tokens

_STEPS_BETWEEN_LOOKS = 8  # steps between two checks by the host whether the segment is done


class BoundedError(Reducer):
    """Keep the fewest tokens, by the traversal below, whose restoration error stays under a bound, in each segment.

    With X the n tokens of a segment, merge(X) the means of their groups and unmerge giving each token its group's mean:

        ||X - unmerge(merge(X))|| / ||X|| < epsilon     (Frobenius norms, float32)

    Groups are those of a farthest-first traversal: the first centre is the token nearest to the mean of all, every
    next one the token farthest from its own centre; each token belongs to the nearest centre, among equals to the
    earlier. The first number of centres that keeps the bound is taken; n centres always keep it. A group's mean has its
    centre's coordinates. Ties go to the earlier token. Separators (row = -1) are groups of their own, and not in X.

    It costs k products of all tokens with one token, for k kept tokens, and a host synchronisation every few of them.
    Deprecated: ``ward`` with ``max_merge_error`` loses fewer answers at equal tokens, and takes less time.

    Attributes:
        epsilon: the bound; nearly 1 keeps a single token, 0 could never be kept and is refused.

    Source: ours. The traversal is Gonzalez 1985 (k-centre, twice the optimum's radius).
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"vision_output", "decoder_input"})
    may_keep_all: ClassVar[bool] = True
    deprecated: ClassVar[bool] = True

    kind: Literal["bounded_error"] = "bounded_error"
    epsilon: float = Field(gt=0.0, lt=1.0)

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset()

    def num_kept(self, num_tokens: int) -> None:
        """None: the tokens decide."""

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        import torch

        from illava.tokens import cluster

        representative, start, kept = [], 0, []
        for hidden_ND, row_N in zip(
            tokens.hidden_TD.float().split(tokens.lengths), tokens.coord_T3[:, 1].split(tokens.lengths), strict=True
        ):
            own_N = torch.arange(len(row_N), device=row_N.device)
            cells_M = (row_N >= 0).nonzero().squeeze(1)
            if len(cells_M):
                own_N[cells_M] = cells_M[_grouped(hidden_ND[cells_M], self.epsilon)]
            kept.append(int(own_N.unique().numel()))
            representative.append(own_N + start)
            start += len(row_N)
        into_T = torch.cat(representative)
        return cluster(into_T, torch.ones_like(into_T, dtype=torch.float32), tokens.lengths, tuple(kept))


def _grouped(hidden_ND: Tensor, epsilon: float) -> Tensor:
    """The centre of every token: int64 [N]. Distances and the error's sums are in float32, as merge and unmerge are."""
    import torch

    from illava.reducers.ops.similarity import group_mean

    num, ones_N = len(hidden_ND), torch.ones_like(hidden_ND[:, 0])
    allowed = epsilon**2 * hidden_ND.pow(2).sum()
    centre = (hidden_ND - hidden_ND.mean(0)).pow(2).sum(1).argmin()
    representative_N = centre.expand(num).clone()
    gap_N = (hidden_ND - hidden_ND[centre]).pow(2).sum(1)
    done = torch.zeros((), dtype=torch.bool, device=hidden_ND.device)
    answer_N = torch.arange(num, device=hidden_ND.device)
    for step in range(num):
        mean_ND = group_mean(hidden_ND, ones_N, representative_N, num)
        fits = (hidden_ND - mean_ND[representative_N]).pow(2).sum() < allowed
        answer_N = torch.where(fits & ~done, representative_N, answer_N)
        done = done | fits
        if step % _STEPS_BETWEEN_LOOKS == 0 and bool(done):
            break
        centre = gap_N.argmax()
        distance_N = (hidden_ND - hidden_ND[centre]).pow(2).sum(1)
        nearer_N = distance_N < gap_N
        representative_N, gap_N = torch.where(nearer_N, centre, representative_N), torch.minimum(gap_N, distance_N)
    return answer_N
