"""Defines the input and output of a model: requests, generations, their counts, times and traces.

Only the trace holds tensors. Knows nothing of storage, items or rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from illava.preprocess import VisualInput

FinishReason = Literal["stop", "length", "loop"]
OnLoop = Literal["stop", "cut", "keep"]
OnError = Literal["raise", "return"]  # what becomes of a request's error: it is raised, or stands in its generation
ContentKind = Literal["document", "image", "video"]  # what a request's media are, judged by their pixels


@dataclass(frozen=True, slots=True)
class Grammar:
    """Says what an answer may be, by exactly one of its fields.

    Attributes:
        json_schema: the answer is one JSON value of this schema (draft 2020-12), without blanks between its parts and
            with the properties in the schema's order; a mapping, or JSON text.
        regex: the whole answer matches it; the syntax is that of Rust, which has neither look-around nor references.
        choices: the answer is one of these texts.
    """

    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choices: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.json_schema is not None and not isinstance(self.json_schema, str):
            object.__setattr__(self, "json_schema", json.dumps(self.json_schema, ensure_ascii=False))
        if self.choices is not None:
            object.__setattr__(self, "choices", tuple(self.choices))


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Says how the answer is drawn. Temperature 0 is greedy.

    Attributes:
        max_new_tokens: generation stops after this many.
        temperature: 0 for greedy, else the divisor of the logits.
        top_p: nucleus share in (0, 1].
        top_k: draw from so many of the most probable tokens; 0 from all.
        min_p: draw from tokens at least this share as probable as the most probable one.
        repetition_penalty: divides the positive logits of tokens that stand in the prompt's text or the answer so far,
            and multiplies the negative ones; 1 changes nothing.
        presence_penalty: subtracted from the logits of tokens that stand in the answer so far.
        frequency_penalty: subtracted once for each time a token stands in the answer so far.
        stop: texts that end the answer, which is cut before them.
        loop_tokens: an answer whose last so many tokens repeat a period of at most 64 tokens is a loop; None looks for
            none. See `illava.engine.loop_detector`.
        on_loop: ``stop`` ends a loop and leaves its text whole; ``cut`` ends it and cuts the text to the first period;
            ``keep`` lets it go on, and tells of it if it lasts to the end.
        seed: every draw comes from hash(seed, request_id, step), never from a shared generator.
        min_new_tokens: stop tokens are ignored before this many (for timing at forced lengths).
        logprobs: give `Generation.token_logprobs`.
        choices: of each option, the texts by which an answer may name it: gives `Generation.choice_probabilities`;
            needs ``logprobs``.
        grammar: only answers of this grammar are drawn; see `illava.grammar`.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    min_new_tokens: int = 0
    logprobs: bool = False
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    loop_tokens: int | None = None
    on_loop: OnLoop = "stop"
    choices: tuple[tuple[str, ...], ...] = ()
    grammar: Grammar | None = None

    @property
    def penalised(self) -> bool:
        """Whether tokens that were drawn or read before count."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation: whose it is, and its text and media in the order they are read."""

    role: Literal["system", "user", "assistant"]
    content: tuple[str | VisualInput, ...]


@dataclass(frozen=True, slots=True, eq=False)
class KeptEncoding:
    """Holds a request's media as the model encoded them; its features stay on the device as long as this lives.

    Attributes:
        plan: the plan that reduced them.
        media: the media as the tower saw them.
        encoded: `illava.visual_tokens.EncodedVisual` of each.
    """

    plan: Any
    media: tuple[VisualInput, ...]
    encoded: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """Asks one question about some media.

    Attributes:
        request_id: names the request; part of the random seed of its draws.
        content: text and media of one user turn, in the order they are read.
        sampling: how the answer is drawn.
        trace: record the patches that every kept token is made of (costs host copies).
        history: the conversation before that turn: a system prompt, earlier turns and their answers.
        template_args: values of variables of the model's chat template, such as ``enable_thinking``; JSON types.
        reduction_id: in place of ``request_id``, the name by which reducers draw: requests of one name (and one seed)
            keep the same tokens of the same media. None: the request's own.
        keep_encoding: give `Generation.encoding`.
        encoding: the media as an earlier request about them had them encoded: the tower does not run for this request.
    """

    request_id: str
    content: tuple[str | VisualInput, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    trace: bool = False
    history: tuple[Message, ...] = ()
    template_args: Mapping[str, Any] = field(default_factory=dict)
    reduction_id: str | None = None
    keep_encoding: bool = False
    encoding: KeptEncoding | None = None

    @property
    def messages(self) -> tuple[Message, ...]:
        """The whole conversation; the last message is the user turn that is answered."""
        return (*self.history, Message("user", self.content))

    @property
    def media(self) -> tuple[VisualInput, ...]:
        """The images and videos in the order they are read."""
        return tuple(part for one in self.messages for part in one.content if not isinstance(part, str))

    @property
    def text_beside_media(self) -> tuple[str, ...]:
        """The texts of the messages that hold media, which the media may be compared with; all texts without media."""
        with_media = [one for one in self.messages if any(not isinstance(part, str) for part in one.content)]
        return tuple(part for one in with_media or self.messages for part in one.content if isinstance(part, str))

    def map_media(self, change: Callable[[VisualInput], VisualInput]) -> Request:
        """The same request with every image and video changed."""

        def changed(content: tuple[str | VisualInput, ...]) -> tuple[str | VisualInput, ...]:
            return tuple(part if isinstance(part, str) else change(part) for part in content)

        history = tuple(replace(one, content=changed(one.content)) for one in self.history)
        return replace(self, content=changed(self.content), history=history)


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Counts tokens, as read from tensor shapes while the request ran.

    Attributes:
        num_patches: tokens entering the vision tower.
        num_patches_kept: tokens leaving it.
        num_vision_tokens: visual tokens the unreduced model would give its LLM; from geometry.
        num_vision_tokens_kept: visual tokens entering the LLM's first layer.
        num_decoder_tokens_kept: visual tokens in the LLM's last layer.
        num_prompt_tokens: all tokens entering the LLM's first layer.
        num_generated_tokens: tokens drawn, the stop token included.
        content: the content kind by which `budget: auto` chose the plan; None under any other plan.
    """

    num_patches: int
    num_patches_kept: int
    num_vision_tokens: int
    num_vision_tokens_kept: int
    num_decoder_tokens_kept: int
    num_prompt_tokens: int
    num_generated_tokens: int
    content: ContentKind | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall seconds of one request, by phase; they add up to its time from submission to its last token.

    Attributes:
        queue_s: waiting for the tower, for prefill or for key/value blocks.
        vision_s: in the vision tower, projector and layout.
        prefill_s: in the LLM's prefill.
        decode_s: from the first token to the last, including waits for other requests' prefill.
        device_s: the request's share, by tokens, of the device time of each step it took part in.
    """

    queue_s: float
    vision_s: float
    prefill_s: float
    decode_s: float
    device_s: float


@dataclass(frozen=True, slots=True)
class TraceStep:
    """The mixing matrix of one step over all visual tokens of a request, on the host.

    Attributes:
        stage: ``media``, ``vision_block``, ``vision_output``, ``layout`` (projector, pooling, newlines),
            ``decoder_input``, ``decoder_layer``.
        layer: block or layer, where the stage has one.
        matrix: sparse float32 [tokens out, tokens in]; a separator's row is empty.
        coords: int64 [tokens out, 4]: (visual input, frame or tile, row, col) of each output token.
    """

    stage: str
    layer: int | None
    matrix: Tensor
    coords: Tensor


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """Says which patches every kept token is made of.

    Attributes:
        patch_coords: int64 [patches, 4], (visual input, frame or tile, row, col) of every patch of the media; the first
            step drops those that stage ``media`` leaves out of the tower.
        steps: in the order of the data flow.
    """

    patch_coords: Tensor
    steps: tuple[TraceStep, ...]

    def matrix(self, upto: int | None = None) -> Tensor:
        """Sparse [kept tokens, patches]: the weight of each patch in each token after the first ``upto`` steps."""
        import torch

        from illava.tokens import compose

        num_patches = self.patch_coords.shape[0]
        index = torch.arange(num_patches).expand(2, num_patches)
        size = (num_patches, num_patches)
        total = torch.sparse_coo_tensor(index, torch.ones(num_patches), size, check_invariants=False).coalesce()
        for step in self.steps[:upto]:
            total = compose(total, step.matrix)
        return total


@dataclass(frozen=True, slots=True)
class Generation:
    """The answer to one request, or the error that ended this request alone.

    Attributes:
        request_id: of the request.
        text: decoded, special tokens removed.
        token_ids: as drawn.
        finish_reason: ``stop`` (a stop token or stop text), ``length``, or ``loop`` (the answer repeats itself); None
            where ``error`` is set.
        usage: counts; None where the error came before any were measured.
        timing: seconds by phase.
        trace: where the request asked for it.
        error: the error that ended this request.
        token_logprobs: natural logarithm of each drawn token's probability by the model itself, before temperature,
            top_p and the grammar; where the request asked for it.
        choice_probabilities: of each of `SamplingParams.choices`, the probability by the model itself that the answer
            begins with it, judged by its first token; what begins no option is the rest to 1. None where an option has
            no first token that is its own.
        follows_grammar: whether the text is a whole answer of the request's grammar; an answer that ended by its
            length, a loop or a stop text may be none. None where the request has no grammar.
        encoding: the media's features, for further requests about the media; where the request asked to keep them.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    usage: TokenUsage | None
    timing: Timing
    trace: TokenTrace | None = None
    error: Exception | None = None
    token_logprobs: tuple[float, ...] | None = None
    choice_probabilities: tuple[float, ...] | None = None
    follows_grammar: bool | None = None
    encoding: KeptEncoding | None = None

    @classmethod
    def failed(cls, request_id: str, error: Exception, *, queue_s: float = 0.0) -> Generation:
        """Make the generation of a request that failed before anything was computed, after a wait of ``queue_s``."""
        timing = Timing(queue_s=queue_s, vision_s=0.0, prefill_s=0.0, decode_s=0.0, device_s=0.0)
        return cls(request_id, "", (), None, None, timing, error=error)


def derive_seed(*parts: int | str) -> int:
    """Derive a seed of 63 bits from the parts, the same on every machine and in every process."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
