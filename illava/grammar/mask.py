"""Masks the logits of the rows of a batch that have a grammar; other rows are as they were.

What may come next follows from the tokens drawn before, so the host works it out while the device runs the step whose
logits are masked. It reaches the device as one bit a token, without a host sync.

Shape suffixes: B rows, G rows with a grammar, V vocabulary, W words of 32 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from illava.grammar.answer import AnswerGrammar

_WORD = 32
_FORBIDDEN = torch.finfo(torch.float32).min  # finite, since what is not ends a request


class GrammarMask:
    """Keeps the grammars of a batch's rows, and the words that bring them to the device.

    Args:
        grammars: of the rows that have one.
        device: where the logits are.
    """

    def __init__(self, grammars: Mapping[int, AnswerGrammar], device: torch.device) -> None:
        self._grammars = tuple(grammars.values())
        self._index_G = torch.tensor(list(grammars), dtype=torch.long).to(device)
        self._shift_32 = torch.arange(_WORD, dtype=torch.int32).to(device)
        self._words_GW: Tensor | None = None

    def apply(self, logits_BV: Tensor) -> Tensor:
        """Return float32 logits, with the least float where a row's grammar forbids a token."""
        num_tokens = logits_BV.shape[-1]
        allowed_GV = self._allowed(num_tokens, logits_BV.device)
        logits_GV = logits_BV.index_select(0, self._index_G)
        return logits_BV.index_copy(0, self._index_G, torch.where(allowed_GV, logits_GV, _FORBIDDEN))

    def _allowed(self, num_tokens: int, device: torch.device) -> Tensor:
        if self._words_GW is None:
            shape = len(self._grammars), -(-num_tokens // _WORD)
            self._words_GW = torch.empty(shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        # The words that were copied last are on the device: a step ends with the copy of its tokens to the host.
        for grammar, words_W in zip(self._grammars, self._words_GW.numpy(), strict=True):
            grammar.fill(words_W)
        words_GW = self._words_GW.to(device, non_blocking=True)
        bits_GW32 = words_GW[:, :, None].bitwise_right_shift(self._shift_32).bitwise_and_(1)
        return bits_GW32.flatten(1)[:, :num_tokens].bool()
