"""Draws the next token of every row of a batch: greedy, temperature, min-p, top-k, top-p; penalties and grammars.

A row's draw depends on its own logits and on hash(seed, request_id, step) alone, never on a shared generator or on the
other rows.

Shape suffixes: B rows, R rows that are drawn at random, V vocabulary, K options, M texts of an option.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from illava.attention.backend import kernels_on
from illava.engine.loop_detector import MIN_LOOP_TOKENS
from illava.engine.nucleus import draw_nucleus
from illava.engine.penalties import History, Penalties
from illava.errors import RequestError
from illava.grammar.answer import AnswerGrammar
from illava.grammar.mask import GrammarMask
from illava.host_copies import on_device, to_device
from illava.requests import OnLoop, SamplingParams, derive_seed

ChoiceIds = tuple[tuple[int, ...], ...]  # of each option, the first tokens of its texts


def check_sampling(params: SamplingParams) -> None:
    """Refuse parameters out of bounds.

    Raises:
        RequestError: names the value and its bounds.
    """
    if params.max_new_tokens < 1:
        raise RequestError(f"max_new_tokens must be at least 1; got {params.max_new_tokens}")
    if not 0 <= params.min_new_tokens <= params.max_new_tokens:
        raise RequestError(
            f"min_new_tokens must lie in 0 .. max_new_tokens ({params.max_new_tokens}); got {params.min_new_tokens}"
        )
    if not 0.0 <= params.temperature < float("inf"):
        raise RequestError(f"temperature must be 0 (greedy) or a positive number; got {params.temperature}")
    if not 0.0 < params.top_p <= 1.0:
        raise RequestError(f"top_p must lie in (0, 1]; got {params.top_p}")
    if params.top_k < 0:
        raise RequestError(f"top_k must be 0 (all tokens) or a positive number; got {params.top_k}")
    if not 0.0 <= params.min_p <= 1.0:
        raise RequestError(f"min_p must lie in [0, 1]; got {params.min_p}")
    _check_penalties(params)
    if any(not text for text in params.stop):
        raise RequestError("stop holds an empty text, which would end every answer; leave it out")
    if params.loop_tokens is not None and params.loop_tokens < MIN_LOOP_TOKENS:
        raise RequestError(f"loop_tokens must be None or at least {MIN_LOOP_TOKENS}; got {params.loop_tokens}")
    if params.on_loop not in get_args(OnLoop):
        raise RequestError(f"on_loop must be one of {', '.join(get_args(OnLoop))}; got {params.on_loop!r}")
    if params.grammar is not None and params.min_new_tokens:
        raise RequestError("an answer ends where its grammar ends: leave out min_new_tokens, or the grammar")
    if params.choices and not params.logprobs:
        raise RequestError("choices are told together with log-probabilities: set logprobs=True")


def _check_penalties(params: SamplingParams) -> None:
    if not 0.0 < params.repetition_penalty < float("inf"):
        raise RequestError(f"repetition_penalty must be a positive number; got {params.repetition_penalty}")
    for name in ("presence_penalty", "frequency_penalty"):
        if not -2.0 <= getattr(params, name) <= 2.0:
            raise RequestError(f"{name} must lie in [-2, 2]; got {getattr(params, name)}")


def uniform_draw(seed: int, request_id: str, step: int) -> float:
    """The number in [0, 1) that decides a request's token number ``step``."""
    return (derive_seed(seed, request_id, step) >> 10) / 2**53


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Holds how the rows of a batch are drawn, as long as the batch has this composition.

    Attributes:
        params: parameters of each row.
        random: rows that are drawn at random.
        index_R: these rows, on the device.
        wanted_R2: float32 temperature and top-p of these rows, on the device.
        limits_R2: float32 top-k (infinite where it is off) and min-p; None where no row has any, or a grammar: with
            limits, what has no probability is not drawn by rounding either.
        penalties: of the rows that have any; None where no row has.
        grammars: of the rows that have one; None where no row has.
        choice_ids: int64 [B, K, M] first tokens of the options' texts, and whether one stands there; None where no row
            has options.
    """

    params: tuple[SamplingParams, ...]
    random: tuple[int, ...]
    index_R: Tensor
    wanted_R2: Tensor
    limits_R2: Tensor | None = None
    penalties: Penalties | None = None
    grammars: GrammarMask | None = None
    choice_ids: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        device: torch.device,
        *,
        histories: Callable[[int], History] = lambda row: History(),
        grammars: Sequence[AnswerGrammar | None] = (),
        choice_ids: Sequence[ChoiceIds] = (),
    ) -> SamplingBatch:
        """Make the batch of rows with these parameters.

        Args:
            params: of each row.
            device: where the logits are.
            histories: what a row's penalties count so far; asked of rows with penalties only.
            grammars: of each row, where any has one.
            choice_ids: first tokens of the options of each row, where the rows' first tokens are drawn.
        """
        random = tuple(row for row, own in enumerate(params) if own.temperature > 0)
        wanted = [[params[row].temperature, params[row].top_p] for row in random]
        index_R, wanted_R2 = torch.tensor(random, dtype=torch.long), torch.tensor(wanted).view(-1, 2)
        ruled = {row: own for row, own in enumerate(grammars) if own is not None}
        limits_R2 = None
        if any(params[row].top_k or params[row].min_p or row in ruled for row in random):
            limits = [[params[row].top_k or float("inf"), params[row].min_p] for row in random]
            limits_R2 = on_device(limits, device)
        penalties = None
        if any(own.penalised for own in params):
            penalties = Penalties(params, histories, device)
        mask = GrammarMask(ruled, device) if ruled else None
        choices = _padded_choices(choice_ids, device) if any(choice_ids) else None
        index_R, wanted_R2 = to_device(index_R, device), to_device(wanted_R2, device)
        return cls(tuple(params), random, index_R, wanted_R2, limits_R2, penalties, mask, choices)

    @property
    def is_greedy(self) -> bool:
        """Whether every row takes the largest of its own logits: `draw_greedy` draws the same."""
        return not self.random and self.penalties is None and self.grammars is None and self.choice_ids is None

    @property
    def num_greedy_rows(self) -> int:
        """Rows of `draw_greedy` that are wanted: log-probabilities only where a row asks for them."""
        return 2 + any(own.logprobs for own in self.params)

    def wanted(self, logits_BV: Tensor) -> Tensor:
        """Return float32 logits as penalties leave them, and what a row's grammar forbids at the least float."""
        if self.penalties is not None:
            logits_BV = self.penalties.apply(logits_BV)
        return logits_BV if self.grammars is None else self.grammars.apply(logits_BV)

    def count(self, token_B: Tensor) -> None:
        """Take the tokens that the rows were given, for their penalties."""
        if self.penalties is not None:
            self.penalties.count(token_B)

    def draws(self, steps: Sequence[tuple[str, int]]) -> list[float]:
        """The numbers that decide for the random rows; ``steps`` gives every row's request id and step."""
        return [uniform_draw(self.params[row].seed, *steps[row]) for row in self.random]


def draw_tokens(logits_BV: Tensor, batch: SamplingBatch, draws: Sequence[float], *, first: int | None = None) -> Tensor:
    """Draw the next token of each row, and tell whether its logits were finite: int64 [2, B], without a host sync.

    If a row wants log-probabilities, a third row has those of all drawn tokens, as the bits of a float32; K more rows
    have the options' probabilities, if any row has options.

    Args:
        logits_BV: any float dtype.
        batch: how the same rows are drawn.
        draws: a number in [0, 1) for each random row.
        first: see `draw_nucleus`; the second row is then 2 or more where a draw is not certain.
    """
    logits_BV = logits_BV.float()
    finite_B = logits_BV.isfinite().all(-1)
    wanted_BV = batch.wanted(logits_BV)
    token_B = wanted_BV.argmax(-1)
    if batch.random:
        draw_R = on_device(draws, logits_BV.device, torch.float32)
        temperature_R, top_p_R = batch.wanted_R2[:, 0], batch.wanted_R2[:, 1]
        logits_RV = wanted_BV.index_select(0, batch.index_R)
        chosen_R, certain_R = draw_nucleus(logits_RV, temperature_R, top_p_R, draw_R, batch.limits_R2, first=first)
        token_B = token_B.index_copy(0, batch.index_R, chosen_R)
    drawn = [token_B, finite_B.long()]
    if batch.random and first is not None:
        drawn[1] = drawn[1].index_add(0, batch.index_R, 2 * (~certain_R).long())
    if any(own.logprobs for own in batch.params):
        total_B = logits_BV.logsumexp(-1)
        drawn.append(_logprob_bits(logits_BV, token_B, total_B))
        if batch.choice_ids is not None:
            drawn += map(_as_bits, _choice_probabilities(logits_BV, total_B, *batch.choice_ids))
    return torch.stack(drawn)


def draw_greedy(logits_BV: Tensor) -> Tensor:
    """Greedy tokens, whether logits were finite, and the tokens' log-probabilities: int64 [3, B].

    What `draw_tokens` gives rows that are greedy and nothing else, whatever they are: a captured step holds it, as two
    Triton kernels where `kernels_on` says so.
    """
    if kernels_on(logits_BV.device) == "triton":
        from illava.decoder import triton_greedy

        return triton_greedy.draw_greedy(logits_BV)
    logits_BV = logits_BV.float()
    token_B = logits_BV.argmax(-1)
    logprob_B = _logprob_bits(logits_BV, token_B, logits_BV.logsumexp(-1))
    return torch.stack([token_B, logits_BV.isfinite().all(-1).long(), logprob_B])


def _logprob_bits(logits_BV: Tensor, token_B: Tensor, total_B: Tensor) -> Tensor:
    return _as_bits(logits_BV.gather(1, token_B[:, None]).squeeze(1) - total_B)


def _as_bits(value_B: Tensor) -> Tensor:
    return value_B.view(torch.int32).long()


def _choice_probabilities(logits_BV: Tensor, total_B: Tensor, id_BKM: Tensor, stands_BKM: Tensor) -> Tensor:
    """The probability of each option, of all first tokens that begin it: float32 [K, B]."""
    logits_BKM = logits_BV.gather(1, id_BKM.flatten(1)).view(id_BKM.shape)
    return ((logits_BKM - total_B[:, None, None]).exp() * stands_BKM).sum(-1).t().contiguous()


def own_first_tokens(choices: Sequence[Sequence[str]], first_token: Callable[[str], int | None]) -> ChoiceIds:
    """Of each option, the tokens that begin one of its texts and no text of another option; each token once."""
    found = [{token for text in texts if (token := first_token(text)) is not None} for texts in choices]
    times = Counter(token for tokens in found for token in tokens)
    return tuple(tuple(sorted(token for token in tokens if times[token] == 1)) for tokens in found)


def _padded_choices(choice_ids: Sequence[ChoiceIds], device: torch.device) -> tuple[Tensor, Tensor]:
    num_options = max(map(len, choice_ids))
    num_texts = max(len(ids) for own in choice_ids for ids in own)
    id_BKM = torch.zeros(len(choice_ids), num_options, num_texts, dtype=torch.long)
    stands_BKM = torch.zeros(len(choice_ids), num_options, num_texts)
    for row, own in enumerate(choice_ids):
        for option, ids in enumerate(own):
            id_BKM[row, option, : len(ids)] = torch.tensor(ids)
            stands_BKM[row, option, : len(ids)] = 1.0
    return to_device(id_BKM, device), to_device(stands_BKM, device)
