"""Lower input resolution: the baseline that every reduction of a picture must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from illava.reducers.base import Evidence, EvidenceKind, Reducer, Stage

if TYPE_CHECKING:
    from illava.tokens import Assignment, Tokens


class LowerResolution(Reducer):
    """Resample the picture before the tower, as if it had been given smaller.

    Towers of native resolution: both sides of every image and frame times sqrt(``keep_ratio``), rounded down to whole
    groups of patches. Towers of fixed input size: the picture is fitted to the best canvas with at most that share of
    its tiles, base tile counted; the base tile stays. A picture in one tile, or a video's frame, cannot be read smaller
    there: such a request is refused.

    The picture is resampled from model size, to which the readers bring it.

    Attributes:
        keep_ratio: share of a picture's patches; the model reads the nearest size below.

    Source: a baseline of ours; the model's own resize, at another size.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"media"})
    drops_cells: ClassVar[bool] = False

    kind: Literal["lower_resolution"] = "lower_resolution"
    keep_ratio: float = Field(gt=0.0, lt=1.0)

    @property
    def resolution(self) -> float:
        """See `Reducer.resolution`."""
        return self.keep_ratio

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset()

    def num_kept(self, num_tokens: int) -> None:
        """None: shapes decide."""

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        """Every cell of the smaller picture is kept."""
        from illava.tokens import identity

        return identity(tokens.lengths, tokens.hidden_TD.device)
