"""Ward: merge tokens by agglomeration, so that what is merged lies as close together as the budget allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from illava.reducers.base import Evidence, EvidenceKind, Reducer, Stage, score_evidence
from illava.reducers.budget import Budget

if TYPE_CHECKING:
    from torch import Tensor

    from illava.tokens import Assignment, Tokens

_GRID = 2**12  # steps of a channel of a unit vector: sums of products of such numbers are exact in float32
_OF_MEANS = 4  # the power of a contrast in the means, of its power in the costs
_LEAST_SHARE = 1e-6  # of the mean attention; a token that nothing attends to still has a weight


class Ward(Budget, Reducer):
    """Join the two groups of tokens whose union adds least to the squared error, until the budget is met.

    Joining a and b adds w_a w_b / (w_a + w_b) |x_a - x_b|^2 to the error of replacing every token by its group's mean.
    At first every token is a group: x_a its hidden state, scaled to length one; w_a its size, how many of the stage's
    first tokens it stands for. A joined group has the sum of the weights and the weighted mean of the x. In the end
    each group becomes the weighted mean of its members' hidden states, with the coordinates of the member nearest to
    that mean. ``alpha`` and ``contrast`` let some tokens weigh more.

    The joins of least cost are made a sixteenth of the groups at a time, in rounds of equal factors, three or more;
    a round compares groups with their nearest ones alone. The whole error is within a few per cent of one join a round.
    Ties go to the earlier token. At most 1,024 rows of the n x n map of costs are in memory at a time.

    Attributes:
        alpha: above 0, w_a is scaled by (attention received / its mean)^alpha, so that joins of attended tokens cost
            more; before a decoder layer, by the attention received divided by what flat causal attention would give.
        contrast: above 0, w_a is scaled by (a token's contrast)^contrast, and in the means by the fourth power of that.
            A token's contrast is its squared distance to the mean of what lies around it in its frame, where near ones
            count most (`local_contrast`). So joins across an edge cost more, and a group says what its members at an
            edge are rather than those inside: the top of a bar stays where it is. Needs no attention. With a count, and
            ``per`` medium or frame.
        proportional_attention: as in ToMe: every block of the tower behind a ``vision_block`` step adds the log of a
            token's size to the scores of its key. None: it does. At other stages there are no such blocks.
        per, num_merged, keep_ratio, keep_per_frame: see `Budget`.
        max_merge_error: in place of a count: groups join while the square root of their error, divided by that of all
            weights, stays under this, segment by segment. It is the distance of the tokens, scaled to length one, to
            the means of their groups; 0 would keep all but equal ones, 1 a single token. What looks alike goes, in any
            picture; counts depend on the picture, and cost host synchronisations.
        max_tokens: beside ``max_merge_error``: keep at most so many of a segment, whatever the error. Segments are what
            ``per`` says: ``prompt`` holds a ceiling over all visual inputs of a request, ``medium`` over each.
        window: tokens join within windows of so many neighbouring frames of a video (0 .. W - 1, W .. 2 W - 1, ...; a
            temporal patch counts as one frame), so that what stands still is told once a window, and no token is of
            frames further apart. A window takes the place of the frame in the tower, of the medium before the language
            model: its tokens get its share of a ``keep_ratio``, or an error bound of their own. In the tower, every
            block behind the step attends over whole windows (an attention the model was not trained with), and later
            steps take a window for a frame. Before the language model a frame that an earlier step left without tokens
            is not counted. Images, which have no frames, are one window each, tile by tile in the tower; newlines stay.

    Source: ours. The criterion is that of Ward 1963 (Journal of the American Statistical Association 58, 236-244);
    attention by log size is ToMe's (arXiv 2210.09461).
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"vision_block", "vision_output", "decoder_input", "decoder_layer"})
    budgets: ClassVar[tuple[str, ...]] = (*Budget.budgets, "max_merge_error")

    kind: Literal["ward"] = "ward"
    alpha: float = Field(default=0.0, ge=0.0, le=2.0)
    contrast: float = Field(default=0.0, ge=0.0, le=2.0)
    proportional_attention: bool | None = None
    max_merge_error: float | None = Field(default=None, ge=0.01, lt=1.0)
    max_tokens: int | None = Field(default=None, ge=1)
    window: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.window is not None and self.per != "medium":
            raise ValueError(
                f"`window` ranks within windows of a medium's frames, and per: {self.per} ranks otherwise: leave "
                "`per`, or `keep_per_frame`, or `window` out"
            )
        if self.contrast and self.per in {"span", "prompt"}:
            raise ValueError(
                f"`contrast` compares a token with its frame, and per: {self.per} ranks frames of several inputs "
                "together: take per: medium or per: frame, or leave `contrast` out"
            )
        if self.contrast and self.max_merge_error is not None:
            raise ValueError(
                "max_merge_error bounds the distance to the groups' means, which `contrast` weighs otherwise: give a "
                "count (keep_ratio, num_merged, keep_per_frame), or leave `contrast` out"
            )
        if self.max_tokens is not None and self.max_merge_error is None:
            raise ValueError("max_tokens is a ceiling for max_merge_error: give that, too, or leave it out")
        return self

    def num_kept(self, num_tokens: int) -> int | None:  # type: ignore[override]
        """See `Budget`; None where an error decides."""
        return None if self.max_merge_error is not None else super().num_kept(num_tokens)

    def most_kept(self, num_tokens: int) -> int:
        return min(super().most_kept(num_tokens), self.max_tokens or num_tokens)

    @property
    def frames_in_window(self) -> int | None:
        return self.window

    @property
    def may_keep_all(self) -> bool:  # type: ignore[override]
        """Whether it is no error to remove nothing: where an error decides."""
        return self.max_merge_error is not None

    @property
    def biases_attention(self) -> bool:
        return self.proportional_attention is not False

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        sizes: frozenset[EvidenceKind] = frozenset({"sizes"})
        return sizes | {score_evidence("causal_normalised", stage)} if self.alpha else sizes

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        from illava.reducers.ops.agglomeration import agglomerate, agglomerate_within
        from illava.reducers.ops.contrast import local_contrast
        from illava.reducers.ops.partition import merge_groups
        from illava.reducers.ops.similarity import unit
        from illava.tokens import identity, pad

        lengths, kept = tokens.lengths, tuple(self.num_kept(n) or 0 for n in tokens.lengths)
        if kept == lengths:
            return identity(kept, tokens.hidden_TD.device)
        weight_T = size_T = evidence.sizes(tokens)
        if self.alpha:
            score_T = evidence.measured(score_evidence("causal_normalised", stage))
            weight_T = weight_T * _relative(score_T, lengths).pow(self.alpha)
        unit_TD = unit(tokens.hidden_TD).mul_(_GRID).round_().div_(_GRID)
        point_SND, mean_weight_T = pad(unit_TD, lengths, 0.0), weight_T
        if self.contrast:
            contrast_T = local_contrast(point_SND, size_T, tokens.coord_T3, lengths).pow_(self.contrast)
            mean_weight_T, weight_T = weight_T * contrast_T.pow(_OF_MEANS), weight_T * contrast_T
        weight_SN = pad(weight_T, lengths, 1.0)
        if self.max_merge_error is None:
            group_SN = agglomerate(point_SND, weight_SN, lengths, kept)
        else:
            allowed_S = self.max_merge_error**2 * pad(weight_T, lengths, 0.0).sum(1)
            at_most = tuple(min(n, self.max_tokens or n) for n in lengths)
            group_SN, kept = agglomerate_within(point_SND, weight_SN, lengths, allowed_S, at_most)
        return merge_groups(unit_TD, mean_weight_T, group_SN, lengths, kept)


def _relative(score_T: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Scores divided by the mean of their segment, and at least `_LEAST_SHARE`: [T]."""
    from illava.host_copies import constant_on
    from illava.tokens import pad, unpad

    score_SN = pad(score_T.float(), lengths, 0.0)
    count_S1 = constant_on(lengths, score_SN.device)[:, None]
    share_SN = score_SN * count_S1 / score_SN.sum(1, keepdim=True).clamp(min=1e-30)
    return unpad(share_SN.clamp(min=_LEAST_SHARE), lengths)
