"""Compiles the grammars of a model's requests, and follows each answer, token by token, through its grammar.

All of it is the host's work. A special token is never part of an answer, and a stop token may come exactly where the
grammar accepts the answer so far. Loads llguidance where a grammar is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from illava.errors import RequestError
from illava.grammar.check import grammar_problem, grammar_text
from illava.requests import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_KNOWN = 64  # grammars that are kept compiled


class GrammarCompiler:
    """Compiles the grammars of one model's requests, each once.

    Args:
        tokenizer: of Hugging Face.
        num_tokens: logits of a token; the vocabulary is extended to so many.
        stop_token_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, num_tokens: int, stop_token_ids: frozenset[int]) -> None:
        self._tokenizer, self._num_tokens, self._stop_token_ids = tokenizer, num_tokens, stop_token_ids
        self._known: LLTokenizer | None = None
        self._compile = lru_cache(_KNOWN)(self._compiled)

    def begin(self, grammar: Grammar, token_ids: Sequence[int]) -> AnswerGrammar:
        """Begin an answer of this grammar, whose tokens will stand in ``token_ids``.

        Raises:
            RequestError: no answer can be drawn by the grammar, or with this tokenizer.
        """
        return AnswerGrammar(self._compile(grammar), token_ids, self._spell)

    def _compiled(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher

        if problem := grammar_problem(grammar):
            raise RequestError(f"grammar.{problem}")
        return LLMatcher(self._vocabulary(), grammar_text(grammar), log_level=0)

    def _spell(self, text: str) -> list[int]:
        return self._vocabulary().tokenize_str(text)

    def _vocabulary(self) -> LLTokenizer:
        if self._known is None:
            from llguidance.hf import from_tokenizer

            stop = sorted(self._stop_token_ids)
            try:
                self._known = from_tokenizer(self._tokenizer, n_vocab=self._num_tokens, eos_token=stop)
            except ValueError as error:
                raise RequestError(
                    f"grammar: llguidance cannot read this model's tokenizer ({error}); leave the grammar out"
                ) from error
        return self._known


class AnswerGrammar:
    """Follows one answer through its grammar.

    Args:
        compiled: at the grammar's beginning; copied, never changed.
        token_ids: the answer's tokens; more may have come at each call.
        spell: returns some tokens of a text.

    Attributes:
        problem: why the answer can be followed no further; None while it can.
    """

    def __init__(self, compiled: LLMatcher, token_ids: Sequence[int], spell: Callable[[str], list[int]]) -> None:
        self._compiled, self._token_ids, self._spell = compiled, token_ids, spell
        self._matcher, self._num_followed = compiled.deep_copy(), 0
        self.problem: str | None = None

    def fill(self, allowed_W: NDArray[np.int32]) -> None:
        """Write which tokens may come next, one bit each and 32 to a word; all may where there is a `problem`."""
        drawn = list(self._token_ids[self._num_followed :])
        self._num_followed += len(drawn)
        self._matcher.consume_tokens(drawn)
        self._matcher.unsafe_compute_mask_ptr(allowed_W.ctypes.data, allowed_W.nbytes)
        if self._matcher.is_error():  # the mask then has nothing but stop tokens
            reason = self._matcher.get_error().partition("\n")[0]
            self.problem = f"its answer cannot be followed through its grammar any further ({reason}); simplify it"
            allowed_W.fill(-1)

    def accepts(self, text: str) -> bool:
        """Whether a text is a whole answer."""
        matcher = self._compiled.deep_copy()
        return matcher.consume_tokens(self._spell(text)) and matcher.is_accepting()
