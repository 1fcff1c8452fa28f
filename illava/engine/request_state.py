"""Keeps the state of one request in the engine: its phase, its seconds, its tokens, and the generation it becomes.

A request is in exactly one phase. Each change of phase takes the time, so the seconds of all phases add up to the
request's life.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

from torch import Tensor

from illava.engine.answer_end import AnswerEnd, DecodeText
from illava.engine.penalties import History
from illava.engine.prompt import Prompt, TextSpan
from illava.engine.sampling import ChoiceIds
from illava.grammar.answer import AnswerGrammar
from illava.plan import ReductionPlan
from illava.preprocess import VisualInput
from illava.requests import (
    ContentKind,
    FinishReason,
    Generation,
    KeptEncoding,
    Request,
    Timing,
    TokenTrace,
    TokenUsage,
    derive_seed,
)
from illava.visual_tokens import EncodedVisual

Phase = Literal["queue", "vision", "prefill", "decode"]


class RequestState:
    """Keeps a request's state from its submission to its end.

    Attributes:
        request: as submitted.
        plan: the plan it is reduced by; with `budget: auto` the plan that its ``content`` chose.
        shown: the request with the media that stage ``media`` left.
        media: the images and videos of ``shown``.
        num_patches: tokens that enter the tower.
        num_patches_kept: tokens that leave it.
        num_vision_tokens: visual tokens of the unreduced model.
        encoded: the encoded media, until prefill.
        prompt: the assembled prompt, between tower and prefill.
        prefix: the prompt's content, span by span; see `illava.engine.prefix_sharing`.
        num_computed: leading tokens, as assembled, whose keys and values another request has computed.
        snapshot_len: leading tokens, as assembled, behind which recurrent states are kept for others; 0 for none.
        computed_by_layer: cached tokens of these per decoder layer, and the visual tokens among them.
        reserved: tokens per decoder layer that blocks are allocated for, the answer included.
        lengths: tokens per decoder layer that prefill left in the cache.
        num_visual: visual tokens among them, per layer.
        num_biased: leading tokens among them whose keys have a bias, per layer: all or none.
        next_position_P: position of the first generated token, from prefill on.
        token_ids: tokens drawn so far.
        token_logprobs: their log-probabilities, where the request asked for them.
        choice_ids: of each option the request asks about, the first tokens of its texts.
        choice_probabilities: of these options, from the first token on.
        grammar: what the answer must follow, where the request has a grammar; reads ``token_ids``.
        trace: the trace, where the request asked for it, from prefill on.
        device_s: its share of the steps' device time so far.
    """

    def __init__(
        self,
        request: Request,
        plan: ReductionPlan,
        media: Sequence[VisualInput],
        *,
        now: float,
        content: ContentKind | None = None,
    ) -> None:
        self.request, self.plan, self.media = request, plan, tuple(media)
        self.shown, self.content = request, content
        self.num_patches = self.num_patches_kept = self.num_vision_tokens = 0
        self.encoded: list[EncodedVisual] = []
        self.prompt: Prompt
        self.prefix: list[tuple[Hashable, int]] = []
        self.num_computed = self.snapshot_len = 0
        self.computed_by_layer: tuple[list[int], list[int]] = ([], [])
        self.reserved: list[int] = []
        self.lengths: list[int] = []
        self.num_visual: list[int] = []
        self.num_biased: list[int] = []
        self.next_position_P: Tensor
        self.token_ids: list[int] = []
        self.token_logprobs: list[float] = []
        self.choice_ids: ChoiceIds = ()
        self.choice_probabilities: tuple[float, ...] | None = None
        self.grammar: AnswerGrammar | None = None
        self.trace: TokenTrace | None = None
        self.device_s = 0.0
        self._seconds: dict[Phase, float] = {"queue": 0.0, "vision": 0.0, "prefill": 0.0, "decode": 0.0}
        self._phase: Phase = "queue"
        self._since = now
        self._end = AnswerEnd(request.sampling)
        self._kept: KeptEncoding | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def mm_seeds(self) -> tuple[int, ...]:
        """The root seed of what reducers draw in the tower, one for each visual input."""
        return tuple(derive_seed(*self._drawn_by, n) for n in range(len(self.media)))

    @property
    def decoder_seed(self) -> int:
        """The root seed of what reducers draw in the decoder."""
        return derive_seed(*self._drawn_by)

    @property
    def _drawn_by(self) -> tuple[int, str]:
        return self.request.sampling.seed, self.request.reduction_id or self.request_id

    def take_encoding(self) -> None:
        """Take the media as the request brings them, encoded; nothing of them enters the tower."""
        kept = self.request.encoding
        if kept is None:
            raise RuntimeError(f"request {self.request_id!r} brings no encoded media")
        media = iter(kept.media)
        self.show(self.request.map_media(lambda _: next(media)))
        self.encoded = list(kept.encoded)

    def show(self, reduced: Request) -> None:
        """Take the request with the media that the tower will see."""
        self.shown, self.media = reduced, reduced.media

    def enter(self, phase: Phase, now: float) -> None:
        """Leave the present phase for ``phase``, which may be the same one."""
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def release_prompt(self) -> None:
        """Drop features and embeddings: from prefill on the cache holds all that is needed."""
        if self.request.keep_encoding:
            self._kept = KeptEncoding(self.plan, self.media, tuple(self.encoded))
        self.encoded.clear()
        del self.prompt

    def history(self) -> History:
        """The tokens of the prompt's text and of the answer so far; from assembly on."""
        spans = (span for span, _ in self.prefix if isinstance(span, TextSpan))
        return History(tuple(token_id for span in spans for token_id in span.token_ids), tuple(self.token_ids))

    def accept(self, token_id: int, stop_token_ids: frozenset[int], decode_text: DecodeText) -> FinishReason | None:
        """Take a drawn token; returns why it ends the answer, or None."""
        self.token_ids.append(token_id)
        return self._end.reason(self.token_ids, stop_token_ids, decode_text)

    def finish(self, reason: FinishReason, decode_text: DecodeText, now: float) -> Generation:
        """End the request with its answer."""
        self.enter("queue", now)
        text = self._end.text(self.token_ids, decode_text)
        return self._generation(text, reason, None, None if self.grammar is None else self.grammar.accepts(text))

    def fail(self, error: Exception, now: float) -> Generation:
        """End the request with the error that ended it alone."""
        self.enter("queue", now)
        return self._generation("", None, error)

    def _generation(
        self, text: str, reason: FinishReason | None, error: Exception | None, follows_grammar: bool | None = None
    ) -> Generation:
        seconds = self._seconds
        timing = Timing(seconds["queue"], seconds["vision"], seconds["prefill"], seconds["decode"], self.device_s)
        usage = None
        if self.lengths:
            usage = TokenUsage(
                num_patches=self.num_patches,
                num_patches_kept=self.num_patches_kept,
                num_vision_tokens=self.num_vision_tokens,
                num_vision_tokens_kept=self.num_visual[0],
                num_decoder_tokens_kept=self.num_visual[-1],
                num_prompt_tokens=self.lengths[0],
                num_generated_tokens=len(self.token_ids),
                content=self.content,
            )
        drawn, logprobs = tuple(self.token_ids), None
        if self.request.sampling.logprobs:
            logprobs = tuple(self.token_logprobs[: len(drawn)])
        return Generation(
            self.request_id,
            text,
            drawn,
            reason,
            usage,
            timing,
            trace=self.trace,
            error=error,
            token_logprobs=logprobs,
            choice_probabilities=self.choice_probabilities,
            follows_grammar=follows_grammar,
            encoding=self._kept,
        )
