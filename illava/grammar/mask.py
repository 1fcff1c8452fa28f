"""Masks the logits of the rows of a batch that have a grammar; other rows are as they were.

What may come next follows from the tokens drawn before, so the host works it out while the device runs the step whose
logits are masked. It reaches the device as one bit a token, without a host sync.

Shape suffixes: B rows, G rows with a grammar, V vocabulary, W words of 32 tokens, N bytes of 8 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from illava.grammar.answer import AnswerGrammar
from illava.host_copies import on_device

_WORD = 32
_LEAST = torch.finfo(torch.float32).min  # finite, since what is not ends a request


class GrammarMask:
    """Keeps the grammars of a batch's rows, and the words that bring them to the device.

    Args:
        grammars: of the rows that have one.
        device: where the logits are.
    """

    def __init__(self, grammars: Mapping[int, AnswerGrammar], device: torch.device) -> None:
        self._grammars = tuple(grammars.values())
        self._index_G = on_device(list(grammars), device, torch.long)
        bits = [[not byte >> bit & 1 for bit in range(8)] for byte in range(256)]
        self._forbidden_by_byte = on_device(bits, device)  # [256, 8]
        self._words_GW: Tensor | None = None

    def apply(self, logits_BV: Tensor) -> Tensor:
        """Return float32 logits, with the least float where a row's grammar forbids a token."""
        forbidden_GV = self._forbidden(logits_BV.shape[-1], logits_BV.device)
        if len(forbidden_GV) == len(logits_BV):
            return logits_BV.masked_fill(forbidden_GV, _LEAST)
        logits_GV = logits_BV.index_select(0, self._index_G).masked_fill_(forbidden_GV, _LEAST)
        return logits_BV.index_copy(0, self._index_G, logits_GV)

    def _forbidden(self, num_tokens: int, device: torch.device) -> Tensor:
        if self._words_GW is None:
            shape = len(self._grammars), -(-num_tokens // _WORD)
            self._words_GW = torch.empty(shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        # The words that were copied last are on the device: a step ends with the copy of its tokens to the host.
        for grammar, words_W in zip(self._grammars, self._words_GW.numpy(), strict=True):
            grammar.fill(words_W)
        byte_GN = self._words_GW.view(torch.uint8).to(device, non_blocking=True).int()
        forbidden_GV = self._forbidden_by_byte.index_select(0, byte_GN.flatten()).view(len(byte_GN), -1)
        return forbidden_GV[:, :num_tokens]
