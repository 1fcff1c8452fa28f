"""What a reducer is: a frozen model of its hyper-parameters with one pure function, `assign`.

A reducer sees packed tokens and the evidence it asked for; it knows no model family. Its fields are the YAML keys of
a plan, so the object in the config is the object that runs. Importing a reducer must not import torch (a config is
validated in well under a second, before any model is loaded): torch is imported inside `assign`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

    from illava.tokens import Assignment, Tokens

Stage = Literal["media", "vision_block", "vision_output", "decoder_input", "decoder_layer"]
Scope = Literal["frame", "span", "medium", "prompt"]
EvidenceKind = Literal[
    "attention_received",
    "causal_normalised_attention",
    "last_query_attention",
    "keys",
    "cls_attention",
    "sizes",
    "seed",
]
AttentionScore = Literal["paper", "causal_normalised", "released"]

_DECODER_EVIDENCE: dict[AttentionScore, EvidenceKind] = {
    "paper": "attention_received",
    "causal_normalised": "causal_normalised_attention",
    "released": "last_query_attention",
}

_FIELDS: dict[EvidenceKind, str] = {
    "attention_received": "attention_received_T",
    "causal_normalised_attention": "causal_normalised_attention_T",
    "last_query_attention": "last_query_attention_T",
    "keys": "keys_THd",
    "cls_attention": "cls_attention_T",
}


def score_evidence(score: AttentionScore, stage: Stage) -> EvidenceKind:
    """The evidence that ranks tokens: the variants differ before decoder layers only."""
    return _DECODER_EVIDENCE[score] if stage == "decoder_layer" else "attention_received"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was measured for a reducer, aligned with the tokens it is to reduce. Absent unless asked for.

    Attributes:
        attention_received_T: float32, mean attention a token receives (over heads and queries of its scope).
        causal_normalised_attention_T: float32, the same freed of the causal mask's bias; decoder stages only.
        last_query_attention_T: float32, attention of the prompt's last token to each token; decoder stages only.
        keys_THd: keys of the scored attention, before head averaging.
        cls_attention_T: float32, the CLS token's attention, families with one.
        size_T: float32, how many of the stage's first tokens each token stands for; absent means one each.
        seeds: one integer a segment, from (seed, item, layer); for reducers that draw.
    """

    attention_received_T: Tensor | None = None
    causal_normalised_attention_T: Tensor | None = None
    last_query_attention_T: Tensor | None = None
    keys_THd: Tensor | None = None
    cls_attention_T: Tensor | None = None
    size_T: Tensor | None = None
    seeds: tuple[int, ...] | None = None

    def measured(self, kind: EvidenceKind) -> Tensor:
        """The evidence of one kind.

        Raises:
            RuntimeError: the caller did not measure what the reducer's `evidence` asked for.
        """
        value = getattr(self, _FIELDS[kind])
        if value is None:
            raise RuntimeError(f"the reducer asked for {kind!r} but the caller measured none; see Reducer.evidence")
        return value

    def sizes(self, tokens: Tokens) -> Tensor:
        """``size_T``, or one each."""
        return tokens.hidden_TD.new_ones(tokens.hidden_TD.shape[0]).float() if self.size_T is None else self.size_T


class Reducer(BaseModel, ABC):
    """Base of all reducers.

    Class attributes:
        stages: where this method may act.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stages: ClassVar[frozenset[Stage]]
    kind: str
    per: Scope = "medium"

    @abstractmethod
    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        """The evidence `assign` needs at this stage; nothing else is computed."""

    @abstractmethod
    def num_kept(self, num_tokens: int) -> int | None:
        """Tokens left of a segment of ``num_tokens``; None where the data decide."""

    @abstractmethod
    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        """Decide what every output token is made of. Segments are independent of one another."""
