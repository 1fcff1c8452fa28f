"""Defines reducers: a reducer is a frozen model of its hyper-parameters with one pure function, `assign`.

A reducer sees packed tokens and the evidence it asked for; it knows no model family. Its fields are the YAML keys of a
plan, so the object in the config is the object that runs. Importing a reducer must not import torch, since a config is
validated in well under a second, before any model is loaded: `assign` imports torch inside.
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
    "own_layer_query_attention",
    "keys",
    "cls_attention",
    "sizes",
    "seed",
    "text_relevance",
    "padding",
    "packet_bytes",
]
MediaKind = Literal["image", "video"]
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
    "own_layer_query_attention": "own_layer_query_attention_T",
    "keys": "keys_THd",
    "cls_attention": "cls_attention_T",
    "text_relevance": "text_relevance_T",
    "padding": "padding_T",
    "packet_bytes": "packet_bytes_T",
}


def score_evidence(score: AttentionScore, stage: Stage) -> EvidenceKind:
    """The evidence that ranks tokens; the variants differ before decoder layers only."""
    return _DECODER_EVIDENCE[score] if stage == "decoder_layer" else "attention_received"


@dataclass(frozen=True, slots=True)
class Evidence:
    """Holds what was measured for a reducer, aligned with its tokens. A kind is absent unless asked for.

    Attributes:
        attention_received_T: float32, mean attention a token receives (over heads and queries of its scope).
        causal_normalised_attention_T: float32, the same without the causal mask's bias; decoder stages only.
        last_query_attention_T: float32, attention of the prompt's last token to each token; decoder stages only.
        own_layer_query_attention_T: float32, the same in the layer about to run; ``decoder_layer`` only.
        keys_THd: keys of the scored attention, before head averaging.
        cls_attention_T: float32, the CLS token's attention, families with one.
        size_T: float32, how many of the stage's first tokens are merged into each token; absent means one each.
        text_relevance_T: float32 in 0 .. 1, how relevant each cell is to the request's text; ``media`` only.
        padding_T: bool, cells of a canvas beside the picture, which no LLM reads; ``media`` only.
        packet_bytes_T: int64, bytes of the file that code what is new in each cell's frame; ``media`` only.
        seeds: one integer a segment, from (seed, item, layer); for reducers that draw.
    """

    attention_received_T: Tensor | None = None
    causal_normalised_attention_T: Tensor | None = None
    last_query_attention_T: Tensor | None = None
    own_layer_query_attention_T: Tensor | None = None
    keys_THd: Tensor | None = None
    cls_attention_T: Tensor | None = None
    size_T: Tensor | None = None
    text_relevance_T: Tensor | None = None
    padding_T: Tensor | None = None
    packet_bytes_T: Tensor | None = None
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


class TextScorer(BaseModel):
    """Names a model that scores how relevant each part of a picture is to a text; safetensors only, no own code.

    Attributes:
        model_id: folder or hub id; CLIP or CLIPSeg, as the method says.
        revision: hub commit; None for a local folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    kind: ClassVar[Literal["clip", "clipseg"]]
    model_id: str
    revision: str | None = None


class ClipScorer(TextScorer):
    """CLIP: see `illava.families.text_scorer`."""

    kind = "clip"


class ClipSegScorer(TextScorer):
    """CLIPSeg: see `illava.families.text_scorer`."""

    kind = "clipseg"


class Reducer(BaseModel, ABC):
    """Is the base of all reducers.

    Class attributes:
        stages: where this method may act.
        merges_frames: in the tower it sees a whole video as one segment and makes fewer frames of it.
        may_keep_all: it drops redundant tokens only, so dropping nothing is no error.
        drops_cells: at ``media`` it leaves gaps in a frame's grid, rather than fewer frames or fewer pixels.
        deprecated: the next release no longer has it; `illava.plan.deprecations` says what takes its place.
        media_kinds: the kinds it acts on at ``media``; other media of the request pass unchanged.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    stages: ClassVar[frozenset[Stage]]
    merges_frames: ClassVar[bool] = False
    may_keep_all: ClassVar[bool] = False
    media_kinds: ClassVar[frozenset[MediaKind]] = frozenset({"image", "video"})
    drops_cells: ClassVar[bool] = True
    deprecated: ClassVar[bool] = False
    kind: str
    per: Scope = "medium"

    @property
    def resolution(self) -> float:
        """Share of a picture's patches that is left after resampling before the tower; 1 does not resample."""
        return 1.0

    @property
    def text_scorer(self) -> TextScorer | None:
        """The model that measures ``text_relevance`` for this method, if it needs one."""
        return None

    @property
    def frames_in_window(self) -> int | None:
        """Neighbouring frames of a video that are one scope: in place of each frame, or of what ``per`` names."""
        return None

    @property
    def biases_attention(self) -> bool:
        """Whether the tower's blocks behind this step attend with log size (ToMe's proportional attention)."""
        return False

    def frames_kept(self, num_frames: int) -> tuple[int, ...]:
        """The frames of a video that are kept: all of them, unless the method merges frames."""
        return tuple(range(num_frames))

    @abstractmethod
    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        """The evidence that `assign` needs at this stage; nothing else is computed."""

    @abstractmethod
    def num_kept(self, num_tokens: int) -> int | None:
        """Tokens kept of a segment of ``num_tokens``; None where the data decide."""

    def most_kept(self, num_tokens: int) -> int:
        """`num_kept`, or an upper bound of it where the data decide."""
        kept = self.num_kept(num_tokens)
        return num_tokens if kept is None else kept

    @abstractmethod
    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        """Decide which input tokens every output token is made of. Segments are independent of one another."""
