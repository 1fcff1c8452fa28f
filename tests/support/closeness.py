"""How near two results must be that are the same by their formula, but not by their operations.

A sum of K float32 terms depends on its order, and the order on the processor's kernels (MKL, oneDNN, ATen's vectors),
on the number of threads, and on the shape that a row is part of: alone or in a batch, in one piece or in chunks. So one
comparison serves all of them, relative to the tensor's scale (its largest value), as rounding is: an entry near zero is
a sum of terms that are not. Bit equality is asked for only of copies, of sums whose terms are exact (counts, zeros and
ones), and of the same operations on the same shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

from illava.engine import batching
from illava.engine.sampling import SamplingBatch, draw_tokens

# One order against another moves a product of K terms by about sqrt(K) roundings of 2^-24: 6e-7 of the scale for
# K = 100, near which the tiny models' widths and lengths lie; 4 to 8 layers, whose gain is above 1, make up to 2.6e-6.
FLOAT32 = 1e-5
# Two results are at most 2 FLOAT32 apart; a choice that leads by more is the same in both.
_CLEAR = 5 * FLOAT32
_FORBIDDEN = torch.finfo(torch.float32).min / 2  # by a row's grammar
_NO_PENALTIES: dict[str, float] = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def assert_close(got, expected, *, tolerance: float = FLOAT32) -> None:
    """Every entry of ``got`` lies within ``tolerance`` times the largest finite value of ``expected``.

    Infinite entries must be the same. A larger tolerance is for numbers that were rounded to fewer bits on their way.
    """
    got, expected = (torch.as_tensor(value).detach().double() for value in (got, expected))
    assert got.shape == expected.shape, f"{tuple(got.shape)} instead of {tuple(expected.shape)}"
    finite = expected.isfinite()
    assert torch.equal(got[~finite], expected[~finite]), "other entries are infinite"
    nothing = torch.zeros(1, dtype=torch.double)  # for a tensor without finite entries
    gap, scale = (torch.cat([nothing, value[finite].abs()]).max().item() for value in (got - expected, expected))
    assert gap <= tolerance * scale, f"off by {gap:.3g} where the largest value is {scale:.3g}, not within {tolerance}"


def near_ties(logits_BV: Tensor, batch: SamplingBatch, draws: Sequence[float]) -> list[str]:
    """What rounding might decide of this draw: greedy rows without a clear lead, random ones at a token's edge."""
    found, draws = [], dict(zip(batch.random, draws, strict=True))
    logits_BV = batch.wanted(logits_BV.float())
    for row, logits_V in enumerate(logits_BV):
        if not logits_V.isfinite().all():
            continue
        if row not in draws:
            first, second = logits_V.topk(2).values.tolist()
            if first - second <= _CLEAR * float(logits_V[logits_V > _FORBIDDEN].abs().max()):
                found.append(f"{first:.6f} leads {second:.6f}")
            continue
        unpenalised = replace(batch.params[row], **_NO_PENALTIES)  # they are in the logits, as grammars are
        alone = SamplingBatch.of([unpenalised], logits_V.device)
        around = [min(max(draws[row] + shift, 0.0), 1.0 - _CLEAR) for shift in (-_CLEAR, 0.0, _CLEAR)]
        if len({int(draw_tokens(logits_V[None], alone, [draw])[0]) for draw in around}) > 1:
            found.append(f"{draws[row]:.6f} is drawn at the edge of a token's share")
    return found


@contextmanager
def no_near_ties() -> Iterator[None]:
    """Random weights draw near-ties too, and last digits would decide them: then another seed must be chosen."""
    draw, found = batching.draw_tokens, []

    def watched(logits_BV, batch, draws, **options):
        drawn = draw(logits_BV, batch, draws, **options)
        found.extend(near_ties(logits_BV, batch, draws))
        return drawn

    with mock.patch.object(batching, "draw_tokens", watched):
        yield
    assert not found, f"near-ties decide this test's answers ({', '.join(found)}): choose another seed"
