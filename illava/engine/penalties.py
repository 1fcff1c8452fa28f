"""Lowers the logits of tokens that an answer, or the prompt's text, holds already; on the device, without a host sync.

Formulas as in vLLM and transformers: repetition first, then frequency and presence. Each row counts its own tokens, so
no row depends on its neighbours.

Shape suffixes: B rows, P rows with a penalty, H tokens of the longest history, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from illava.host_copies import on_device, to_device
from illava.requests import SamplingParams


@dataclass(frozen=True, slots=True)
class History:
    """Holds the tokens that a row's penalties count: ids of the prompt's text, and of the answer so far."""

    prompt: Sequence[int] = ()
    answer: Sequence[int] = ()


class Penalties:
    """Keeps the penalties of a batch's rows, and on the device how often each token was read or drawn.

    Args:
        params: of all rows.
        histories: what a row has read and drawn so far.
        device: where the logits are.
    """

    def __init__(
        self, params: Sequence[SamplingParams], histories: Callable[[int], History], device: torch.device
    ) -> None:
        rows = [row for row, own in enumerate(params) if own.penalised]
        weights = [
            [params[row].repetition_penalty, params[row].frequency_penalty, params[row].presence_penalty]
            for row in rows
        ]
        known = [histories(row) for row in rows]
        self._index_P = on_device(rows, device, torch.long)
        self._weights_P3 = on_device(weights, device, torch.float32)
        self._read_PH, self._is_read_PH = _padded([history.prompt for history in known], device)
        self._drawn_PH, self._is_drawn_PH = _padded([history.answer for history in known], device)
        self._ones_P1 = torch.ones(len(rows), 1, device=device)
        self._counts: tuple[Tensor, Tensor] | None = None  # of the prompt and of the answer, [P, V] each

    def apply(self, logits_BV: Tensor) -> Tensor:
        """Return float32 logits with the penalties of the rows that have any; other rows are as they were."""
        read_PV, drawn_PV = self._counted(logits_BV.shape[-1])
        repetition_P1, frequency_P1, presence_P1 = self._weights_P3.split(1, dim=-1)
        logits_PV, is_drawn_PV = logits_BV.index_select(0, self._index_P), drawn_PV > 0
        repeated_PV = torch.where(logits_PV > 0, logits_PV / repetition_P1, logits_PV * repetition_P1)
        logits_PV = torch.where((read_PV > 0) | is_drawn_PV, repeated_PV, logits_PV)
        logits_PV = logits_PV - frequency_P1 * drawn_PV - presence_P1 * is_drawn_PV
        return logits_BV.index_copy(0, self._index_P, logits_PV)

    def count(self, token_B: Tensor) -> None:
        """Count the tokens that were drawn, before the next ones are."""
        if self._counts is not None:
            self._counts[1].scatter_add_(1, token_B.index_select(0, self._index_P)[:, None], self._ones_P1)

    def _counted(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        if self._counts is None:
            zeros_PV = torch.zeros(len(self._index_P), num_tokens, device=self._index_P.device)
            self._counts = (
                zeros_PV.scatter_add(1, self._read_PH, self._is_read_PH),
                zeros_PV.scatter_add(1, self._drawn_PH, self._is_drawn_PH),
            )
        return self._counts


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [P, H], and 1 where one stands, 0 where a row is filled up."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.long)
    stands = torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows])
    return to_device(ids.view(len(rows), longest), device), to_device(stands.view(len(rows), longest), device)
