"""What a model family is to the engine: media to visual tokens, prompt to ids and positions, borrowed decoder layers.

A family knows no reducer: it calls the reduction between attention and MLP of its own block loop and gets shorter
tokens back. One file a family; subclasses are one level deep.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from illava.plan import ReductionPlan
from illava.reduction.probe import AttentionProbe
from illava.visual_tokens import EncodedMedium

if TYPE_CHECKING:
    from illava.decoder.decoder import Decoder
    from illava.preprocess import Preprocessor, VisualInput


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """Token ids of a chat turn with every medium's placeholders in place.

    Attributes:
        token_ids: host integers, placeholders repeated ``num_slots`` times.
        spans: (first slot, number) of each medium's placeholders, in the order of the media.
        starts: of a medium whose frames have text between them, the first slot of each frame; by medium.
    """

    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    starts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


class Family(ABC):
    """One model family, holding one loaded Hugging Face model whose sub-modules it borrows."""

    model_type: ClassVar[str]
    decoder: Decoder
    preprocessor: Preprocessor
    stop_token_ids: frozenset[int]
    num_vision_blocks: int
    has_random_weights: bool = False  # the model's folder declares it
    _embedding: Any  # the borrowed model's word embeddings
    _tokenizer: Any

    @abstractmethod
    def check(self, plan: ReductionPlan) -> None:
        """Refuse, in words, a plan that makes no sense here.

        Raises:
            PlanError: what is wrong, where, and what would be right.
        """

    @abstractmethod
    def num_patches(self, medium: VisualInput) -> int:
        """Tokens the medium brings into the tower; from geometry, for admission."""

    @abstractmethod
    def num_vision_tokens(self, medium: VisualInput) -> int:
        """Visual tokens the unreduced model gives its LLM for this medium; from geometry."""

    @abstractmethod
    def encode(
        self,
        media: Sequence[VisualInput],
        plan: ReductionPlan,
        *,
        trace: bool,
        seeds: Sequence[int] | None = None,
        probe: AttentionProbe | None = None,
    ) -> list[EncodedMedium]:
        """Tower, projector and layout over all media in packed calls.

        Args:
            media: as the family's preprocessor made them.
            plan: checked before.
            trace: whether mixing matrices are copied to the host.
            seeds: an integer per medium, the root of what reducers draw in the tower; None is 0 for each.
            probe: is told the tower's attention, block by block.
        """

    @abstractmethod
    def render(self, content: Sequence[str | VisualInput], num_slots: Sequence[int]) -> RenderedPrompt:
        """Chat template and tokenizer. ``num_slots`` gives each medium's placeholders, in order."""

    @abstractmethod
    def position_ids(self, prompt: RenderedPrompt, media: Sequence[VisualInput]) -> Tensor:
        """Rotary positions of every prompt slot: int64 [P, slots], P = 1, or 3 for M-RoPE.

        A generated token's position follows from the last column: one more on every axis per token.
        """

    def embed(self, token_ids: Tensor) -> Tensor:
        """Word embeddings: [T] -> [T, D]."""
        return self._embedding(token_ids)

    def decode_text(self, token_ids: Sequence[int]) -> str:
        """Token ids to text without special tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
